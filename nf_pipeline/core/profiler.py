"""Predicts the device bytes of a training step before anything is trained, and fits them as a line per unit.

On the CPU the worker's own `train_step` runs on fake tensors under torch's `MemTracker`: no memory is taken and the
count is exact for tensor storages (tests hold it against `LiveBytes` on real training). On a GPU the step really
runs and the caching allocator is asked, because kernels take workspaces that no fake shows.

The true peak is a maximum of lines in the batch size (each moment of the step is one line), hence convex: the fit,
raised until it lies above every probe, lies above the peak everywhere between the smallest and the largest probe.

Knows nothing of budgets and blocks. Entry functions: `profile_units`, `predict_block_peak`.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeVar

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode

from nf_pipeline.config import TrainConfig
from nf_pipeline.core.local_unit import LocalUnit
from nf_pipeline.core.train_step import make_optimizer, train_step
from nf_pipeline.errors import ConfigError
from nf_pipeline.plan import UnitProfile

Shape = tuple[int, ...]
ModuleT = TypeVar("ModuleT", bound=nn.Module)

_UNTRACEABLE = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException)


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Device bytes of one block's training step.

    Attributes:
        peak_bytes: by batch size.
        resident_bytes: weights, buffers and optimiser state: what stays between steps.
    """

    peak_bytes: dict[int, int]
    resident_bytes: int


def profile_units(
    units: Sequence[LocalUnit],
    ranges: Sequence[tuple[int, int]],
    in_shapes: Sequence[Shape],
    *,
    train: TrainConfig,
    device: torch.device,
    batch_sizes: Sequence[int],
) -> list[UnitProfile]:
    """Profiles every unit alone: its weights, gradients, optimiser state, activations, batch and labels.

    Args:
        units: on the CPU; left as they are.
        ranges: half-open range of layers per unit.
        in_shapes: (C, H, W) of one sample at each unit's input.
        train: optimiser and precision.
        device: "cpu" predicts, "cuda" measures.
        batch_sizes: from `probe_batch_sizes`.

    Raises:
        ConfigError: a unit's memory cannot be predicted.
    """
    profiles = []
    for unit_idx, (unit, (start, stop), in_shape) in enumerate(zip(units, ranges, in_shapes, strict=True)):
        memory = step_memory([unit], in_shape, batch_sizes, train=train, device=device)
        slope, constant = fit_line(memory.peak_bytes)
        profiles.append(
            UnitProfile(
                unit_idx=unit_idx,
                start=start,
                stop=stop,
                bytes_per_sample=slope,
                constant_bytes=constant,
                resident_bytes=memory.resident_bytes,
                head_params=count_params(unit.head),
                head_flops=forward_flops([*unit.layers, unit.head], in_shape)[-1],
            )
        )
    return profiles


def predict_block_peak(
    units: Sequence[LocalUnit], in_shape: Shape, batch_size: int, *, train: TrainConfig, device: torch.device
) -> int:
    """Returns the peak bytes of the whole block's training step at one batch size.

    Args:
        units: all units of the block, on the CPU; left as they are.
        in_shape: (C, H, W) of one sample at the block's input.
        batch_size: samples.
        train: optimiser and precision.
        device: "cpu" predicts, "cuda" measures.

    Raises:
        ConfigError: the memory cannot be predicted.
    """
    return step_memory(units, in_shape, [batch_size], train=train, device=device).peak_bytes[batch_size]


def probe_batch_sizes(min_batch_size: int, max_batch_size: int) -> list[int]:
    """Returns the batch sizes to profile: both ends of what a plan may choose, and two between."""
    span = max(max_batch_size - min_batch_size, 3)
    return [min_batch_size, min_batch_size + span // 4, min_batch_size + span // 2, min_batch_size + span]


def fit_line(peak_bytes: dict[int, int]) -> tuple[int, int]:
    """Fits peak = slope * batch + intercept by least squares, in exact arithmetic.

    Args:
        peak_bytes: at least two batch sizes.

    Returns:
        Slope, at least 0, rounded up, and the smallest intercept with which no point lies above the line.
    """
    sizes, peaks = list(peak_bytes), list(peak_bytes.values())
    mean_size, mean_peak = Fraction(sum(sizes), len(sizes)), Fraction(sum(peaks), len(peaks))
    covariance = sum((size - mean_size) * (peak - mean_peak) for size, peak in zip(sizes, peaks, strict=True))
    variance = sum((size - mean_size) ** 2 for size in sizes)
    slope = max(0, -(-covariance // variance))
    return int(slope), max(peak - int(slope) * size for size, peak in zip(sizes, peaks, strict=True))


def step_memory(
    units: Sequence[LocalUnit],
    in_shape: Shape,
    batch_sizes: Sequence[int],
    *,
    train: TrainConfig,
    device: torch.device,
) -> StepMemory:
    """Returns the bytes of a block's training step at several batch sizes, momentum included.

    Raises:
        ConfigError: the memory cannot be predicted.
    """
    if device.type == "cuda":
        return _measure_on_gpu(units, in_shape, batch_sizes, train, device)
    try:
        return _predict_on_fakes(units, in_shape, batch_sizes, train)
    except _UNTRACEABLE as error:
        raise ConfigError(
            f"model: the memory of {type(units[0].layers[0]).__name__} and what follows cannot be predicted, "
            f"because its operators need values and not only shapes: {error}",
            "remove data-dependent operators (such as nonzero or item) from the model",
        ) from error


def forward_flops(modules: Sequence[nn.Module], in_shape: Shape) -> list[int]:
    """Counts multiply-adds x 2 of one sample through each of a chain of modules, on fake tensors.

    Args:
        modules: each takes what the one before returns; left as they are.
        in_shape: of one sample at the first.
    """
    counts = []
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        value = torch.empty(1, *in_shape)
        for module in modules:
            with FlopCounterMode(display=False) as counter:
                value = _fake_copy(module, mode).eval()(value)
            counts.append(counter.get_total_flops())
    return counts


def count_params(module: nn.Module) -> int:
    """Returns the number of weights of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def _predict_on_fakes(
    units: Sequence[LocalUnit], in_shape: Shape, batch_sizes: Sequence[int], train: TrainConfig
) -> StepMemory:
    peaks = {}
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        block = _Block([_fake_copy(unit, mode) for unit in units], in_shape, train, torch.device("cpu"))
        block.step(batch_sizes[0])
        for batch_size in batch_sizes:
            # One tracker per step: its peak cannot be reset.
            tracker = MemTracker()
            tracker.track_external(*block.units, *block.optimizers)
            with tracker:
                block.step(batch_size)
            peaks[batch_size] = _total_bytes(tracker, "peak")
            resident_bytes = _total_bytes(tracker, "current")
    return StepMemory(peak_bytes=peaks, resident_bytes=resident_bytes)


def _measure_on_gpu(
    units: Sequence[LocalUnit],
    in_shape: Shape,
    batch_sizes: Sequence[int],
    train: TrainConfig,
    device: torch.device,
) -> StepMemory:
    before_bytes = torch.cuda.memory_allocated(device)
    block = _Block([copy.deepcopy(unit).to(device) for unit in units], in_shape, train, device)
    block.step(batch_sizes[0])
    resident_bytes = torch.cuda.memory_allocated(device) - before_bytes
    peaks = {}
    for batch_size in batch_sizes:
        torch.cuda.reset_peak_memory_stats(device)
        try:
            block.step(batch_size)
        except torch.OutOfMemoryError:
            if len(peaks) < min(2, len(batch_sizes)):
                raise
            break  # two points make a line; the plan's own batch is verified again
        peaks[batch_size] = torch.cuda.max_memory_allocated(device) - before_bytes
    return StepMemory(peak_bytes=peaks, resident_bytes=resident_bytes)


class _Block:
    """Units with their optimisers, ready to step on zeros."""

    def __init__(
        self, units: list[LocalUnit], in_shape: Shape, train: TrainConfig, device: torch.device
    ) -> None:
        self.units = [unit.train() for unit in units]
        self.optimizers = [make_optimizer(unit, train, train.lr) for unit in units]
        self._in_shape = in_shape
        self._precision = train.precision
        self._device = device

    def step(self, batch_size: int) -> None:
        """Trains once; the batch has no name here, as `train_step` asks."""
        train_step(
            self.units,
            self.optimizers,
            torch.zeros(batch_size, *self._in_shape, device=self._device),
            torch.zeros(batch_size, dtype=torch.int64, device=self._device),
            self._precision,
        )


def _fake_copy(module: ModuleT, mode: FakeTensorMode) -> ModuleT:
    """Copies a module with fake parameters and buffers: deepcopy finds them in its memo and copies no data."""
    memo: dict[int, object] = {}
    for buffer in module.buffers():
        memo[id(buffer)] = mode.from_tensor(buffer)
    for parameter in module.parameters():
        fake = mode.from_tensor(parameter.detach())
        memo[id(parameter)] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
    return copy.deepcopy(module, memo)


def _total_bytes(tracker: MemTracker, kind: str) -> int:
    snapshot = tracker.get_tracker_snapshot(kind)
    return sum(by_type["Total"] for by_type in snapshot.values())
