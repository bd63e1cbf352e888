"""Predicts the device bytes of a training step before anything is trained, and fits them as a line per unit.

For the CPU the worker's own `train_step` runs on fake tensors under the worker's own meter, `LiveBytes`: no
memory is taken, and the count is exact for tensor storages. On a GPU the step really runs and the caching
allocator is asked, because kernels take workspaces that no fake shows.

Each moment of the step holds bytes that are linear in the batch size; the peak, their maximum, is convex. So
a line that lies above the smallest and the largest probe lies above the peak everywhere between them.

torch's `MemTracker` counts the same bytes; it is the oracle of this module's tests and not used here, because
every operator costs it a walk over all modules: whole blocks take several times longer to verify.

Knows nothing of budgets and blocks. Entry: `profile_unit`, and `StepProbe` for a whole block.
"""

import contextlib
import copy
import gc
from collections.abc import Sequence

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from nf_pipeline.config import TrainConfig
from nf_pipeline.core import stand_ins
from nf_pipeline.core.collectives import pack_as_for_sum
from nf_pipeline.core.frozen import FrozenUnits, without_head
from nf_pipeline.core.layout import laid_out
from nf_pipeline.core.local_unit import LocalUnit
from nf_pipeline.core.memory import measure_peak, total_bytes
from nf_pipeline.core.mixup import any_mix
from nf_pipeline.core.probe import UNTRACEABLE, fake_copy
from nf_pipeline.core.train_step import make_optimizer, train_step
from nf_pipeline.core.user_code import user_code
from nf_pipeline.errors import ConfigError
from nf_pipeline.plans import UnitProfile, UnitSpan
from nf_pipeline.samples import InputSpec, TargetSpec

Shape = tuple[int, ...]

# BatchNorm takes no batch of 1.
_FIRST_BATCH = 2

# What a label of a class takes does not depend on how many there are.
_ANY_CLASSES = TargetSpec(size=2)

_FIX_STEP = "change the model: its layers must train on any batch of two samples or more"


class StepProbe:
    """Copies of a block's units that answer how many bytes a training step takes, momentum included.

    What a GPU cannot hold counts as one byte more than the GPU has. Its memory is measured uncapped: a cap that
    training left behind in this process is lifted. Of probes for a GPU only one may live at a time.

    Args:
        units: on the CPU; left as they are.
        inputs: of one sample at the block's input.
        train: optimiser, precision, mixup and how many workers share a batch.
        device: "cpu" predicts on fake tensors, "cuda" measures.
        target: what labels are.
        frozen: trained units whose layers run on every batch first; `inputs` is then at the input of these.
        sample: the network's own, where units look at it; the very `inputs` where these are it: the batch is then its
            own sample, as for a worker that starts from the ingested ones.

    Attributes:
        resident_bytes: weights, buffers, optimiser state and losses: what stays while other units train.

    Raises:
        ConfigError: the memory cannot be predicted.
    """

    def __init__(
        self,
        units: Sequence[LocalUnit],
        inputs: InputSpec,
        *,
        train: TrainConfig,
        device: torch.device,
        target: TargetSpec = _ANY_CLASSES,
        frozen: Sequence[LocalUnit] = (),
        sample: InputSpec | None = None,
    ) -> None:
        self._inputs = inputs
        self._sample = sample
        self._target = target
        self._precision = train.precision
        self._mixup = train.mixup
        self._reduce = _pack_gradients if train.workers_per_block > 1 else None
        self._device = device
        self._fakes = None if device.type == "cuda" else FakeTensorMode(allow_non_fake_inputs=True)
        if device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0, device.index)
        free_probes(device)
        self._meter = measure_peak(device)
        self._before_bytes = self._meter.current_bytes
        self._units: list[LocalUnit] = []
        self._optimizers: list[torch.optim.SGD] = []
        self._frozen: FrozenUnits | None = None
        self._known_bytes: dict[int, int] = {}
        self.resident_bytes = self._settle(units, frozen, train)

    def peak_bytes(self, batch_size: int) -> int:
        """Returns the peak of one training step."""
        if batch_size in self._known_bytes:
            return self._known_bytes[batch_size]
        self._meter.reset_peak()
        if self._units:
            with contextlib.suppress(torch.OutOfMemoryError):
                self._step(batch_size)
                return self._meter.peak_bytes - self._before_bytes
        for optimizer in self._optimizers:
            optimizer.zero_grad()
        return self._more_than_device()

    def _settle(self, units: Sequence[LocalUnit], frozen: Sequence[LocalUnit], train: TrainConfig) -> int:
        """Makes copies, optimisers and momentum and returns their bytes; keeps nothing that does not fit."""
        with contextlib.suppress(torch.OutOfMemoryError):
            with self._on_fakes(), user_code("model: its layers cannot be made ready to train", _FIX_STEP):
                if frozen:
                    copies = [self._copy(without_head(unit)) for unit in frozen]
                    self._frozen = FrozenUnits(copies, self._precision)
                    self._meter.track(self._frozen)
                self._units = [self._copy(unit).train() for unit in units]
                self._optimizers = [make_optimizer(unit, train, train.lr) for unit in self._units]
            self._meter.track(*self._units)
            self._make_momentum()
            self._meter.reset_peak()
            losses = self._step(_FIRST_BATCH)
            if self._fakes is not None:
                # A GPU's first step takes what no other does.
                self._known_bytes[_FIRST_BATCH] = self._meter.peak_bytes - self._before_bytes
            resident_bytes = self._meter.current_bytes - self._before_bytes
            del losses
            return resident_bytes
        self._units, self._optimizers, self._frozen = [], [], None
        return self._more_than_device()

    def _make_momentum(self) -> None:
        with self._on_fakes(), self._meter:
            for optimizer in self._optimizers:
                for weight in optimizer.param_groups[0]["params"]:
                    weight.grad = torch.zeros_like(weight)
                optimizer.step()
                optimizer.zero_grad()

    def _more_than_device(self) -> int:
        free_probes(self._device)
        return (total_bytes(self._device) or 0) + 1

    def _step(self, batch_size: int) -> list[torch.Tensor]:
        try:
            with (
                user_code(f"model: a training step of batch {batch_size} fails", _FIX_STEP),
                self._on_fakes(),
                self._meter,
            ):
                sample_N = None if self._sample is None else self._stored(self._sample, batch_size)
                # The batch has no name here: `train_step` frees it after the first unit. Samples stay, as in a feed.
                return train_step(
                    self._units,
                    self._optimizers,
                    self._input(batch_size, sample_N),
                    stand_ins.labels(self._target, batch_size, self._device),
                    self._precision,
                    reduce=self._reduce,
                    mix=any_mix(self._mixup, batch_size, self._device),
                    sample_N=sample_N,
                )
        except ConfigError as error:
            if not isinstance(error.__cause__, UNTRACEABLE):
                raise
            raise ConfigError(
                "model: its memory cannot be predicted, an operator needs values, not only shapes: "
                f"{error.__cause__}",
                "remove data-dependent operators (such as nonzero or item) from the model",
            ) from error.__cause__

    def _input(self, batch_size: int, sample_N: torch.Tensor | None) -> torch.Tensor:
        is_sample = self._sample is self._inputs
        stored_N = sample_N if is_sample else self._stored(self._inputs, batch_size)
        return stored_N if self._frozen is None else self._frozen.output(stored_N, sample_N)

    def _stored(self, inputs: InputSpec, batch_size: int) -> torch.Tensor:
        return laid_out(stand_ins.zeros(inputs, batch_size, self._device))

    def _copy(self, unit: LocalUnit) -> LocalUnit:
        if self._fakes is None:
            return copy.deepcopy(unit).to(self._device)
        return fake_copy(unit, self._fakes)

    def _on_fakes(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext() if self._fakes is None else self._fakes


def _pack_gradients(unit: LocalUnit) -> None:
    """Holds what workers hold that average a unit's gradients."""
    pack_as_for_sum([parameter.grad for parameter in unit.parameters() if parameter.grad is not None])


def profile_unit(
    unit: LocalUnit,
    span: UnitSpan,
    ends: tuple[InputSpec, InputSpec],
    *,
    train: TrainConfig,
    device: torch.device,
    batch_sizes: Sequence[int],
    target: TargetSpec = _ANY_CLASSES,
    sample: InputSpec | None = None,
) -> UnitProfile:
    """Profiles a unit alone: its weights, gradients, optimiser state, activations, batch and labels.

    Args:
        unit: on the CPU; left as it is.
        span: its layers.
        ends: one sample at the input and at the output of its layers.
        train: optimiser and precision.
        device: "cpu" predicts, "cuda" measures.
        batch_sizes: from `probe_batch_sizes`.
        target: what labels are.
        sample: see `StepProbe`.

    Returns:
        The profile of unit 0.

    Raises:
        ConfigError: the unit's memory cannot be predicted.
    """
    # The probe ends with this function: a GPU counts what another one holds.
    probe = StepProbe([unit], ends[0], train=train, device=device, target=target, sample=sample)
    slope, constant = fit_line({batch_size: probe.peak_bytes(batch_size) for batch_size in batch_sizes})
    return UnitProfile(
        unit_idx=0,
        start=span.start,
        stop=span.stop,
        segment_layers=span.segment_layers,
        head=span.head,
        bytes_per_sample=slope,
        constant_bytes=constant,
        resident_bytes=probe.resident_bytes,
        head_params=count_params(unit.head),
        head_flops=forward_flops([unit.head], ends[1])[0],
        **context_costs(unit.context, sample),
    )


def context_costs(context: nn.Module | None, sample: InputSpec | None) -> dict[str, int]:
    """Returns the fields of a `UnitProfile` that say what a unit's context adds to the model; none without one."""
    if context is None:
        return {}
    return {"context_params": count_params(context), "context_flops": forward_flops([context], sample)[0]}


def free_probes(device: torch.device) -> None:
    """Gives back what ended probes hold of a GPU.

    Traced layers are reference cycles, which live on until some collection: in the middle of the next probe it
    would count as memory that the probe freed.
    """
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def probe_batch_sizes(min_batch_size: int, max_batch_size: int) -> list[int]:
    """Returns three batch sizes to profile: both ends of what a plan may choose and the middle.

    Where the ends are less than 2 apart the last one lies beyond.
    """
    last = max(max_batch_size, min_batch_size + 2)
    return [min_batch_size, (min_batch_size + last) // 2, last]


def fit_line(peak_bytes: dict[int, int]) -> tuple[int, int]:
    """Fits peak <= slope * batch + intercept: the line through both ends, raised until no point is above it.

    Of all lines above convex points this is the lowest one, and exact for the smallest batch, which decides
    whether a budget fits at all. (Least squares, raised alike, lies above it everywhere.)

    Args:
        peak_bytes: at least two batch sizes.

    Returns:
        Slope, at least 0, rounded up, and the smallest intercept with which no point lies above the line.
    """
    first, last = min(peak_bytes), max(peak_bytes)
    slope = max(0, -((peak_bytes[first] - peak_bytes[last]) // (last - first)))
    return slope, max(peak - slope * size for size, peak in peak_bytes.items())


def forward_flops(modules: Sequence[nn.Module], inputs: InputSpec) -> list[int]:
    """Counts multiply-adds x 2 of one sample through each of a chain of modules, on fake tensors.

    Args:
        modules: each takes what the one before returns; left as they are.
        inputs: one sample at the first.
    """
    counts = []
    failure = user_code(
        "model: a forward pass of one sample fails", "change the model: every layer must take any batch"
    )
    with failure, FakeTensorMode(allow_non_fake_inputs=True) as fakes, torch.no_grad():
        value = stand_ins.zeros(inputs, 1)
        for module in modules:
            with FlopCounterMode(display=False) as counter:
                value = fake_copy(module, fakes).eval()(value)
            counts.append(counter.get_total_flops())
    return counts


def count_params(module: nn.Module) -> int:
    """Returns the number of weights of a module."""
    return sum(parameter.numel() for parameter in module.parameters())
