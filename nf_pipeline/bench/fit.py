"""The batch with which a baseline fits the memory budget, by the meter that the pipeline plans with.

On a CPU the steps run on fake tensors and nothing is allocated; on a GPU they really run, under the budget's cap.
Entries: `fit_method`, `fit_budgets`, `FitProbe`.
"""

import gc
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nf_pipeline.bench.baseline_step import baseline_step
from nf_pipeline.bench.methods import REFERENCE_BATCH, Method
from nf_pipeline.bench.task import Task
from nf_pipeline.core.layout import laid_out
from nf_pipeline.core.memory import measure_peak
from nf_pipeline.core.mixup import any_mix
from nf_pipeline.core.train_step import forward_block, make_optimizer
from nf_pipeline.worker.evaluate import set_training
from nf_pipeline.worker.runtime import cap_device_memory

MIN_BATCH = 2
"""Batch norm takes no batch of one sample while it trains."""

PROBE_BATCH = 32  # large enough for activations to outweigh the weights of small models
OUT_OF_MEMORY = 2**62
"""More than any device has: the step did not fit."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How a method trains under a budget.

    Attributes:
        micro_batch: samples per forward pass; 0 if not even batch 2 fits.
        batch_size: samples per optimiser step.
        val_batch: samples per forward pass of a validation, which needs less than training.
        segment_layers: between activations that are kept; 0 without checkpointing.
        predicted_peak_bytes: at that size; of batch 2 if nothing fits.
    """

    micro_batch: int
    batch_size: int
    val_batch: int
    segment_layers: int
    predicted_peak_bytes: int


class FitProbe:
    """One method's training step on one task, asked for its peak at any batch.

    Args:
        cap_bytes: of a GPU's allocator; None lifts the cap.
    """

    def __init__(self, task: Task, method: Method, segment_layers: int = 0, cap_bytes: int | None = None) -> None:
        self._task, self._method, self._device = task, method, task.device
        self._fakes = FakeTensorMode(allow_non_fake_inputs=True) if self._device.type == "cpu" else None
        free_cached(self._device)
        cap_device_memory(self._device, cap_bytes)
        self._meter = measure_peak(self._device)
        with self._on_fakes():
            self._units = task.units(method, segment_layers)
            if self._fakes is None:  # fake tensors cannot be moved, not even to where they are
                self._units = [unit.to(self._device) for unit in self._units]
            train = task.config.train
            self._optimizers = [make_optimizer(unit.train(), train, train.lr) for unit in self._units]
        self._meter.track(*self._units)
        self._known: dict[tuple[str, int], int] = {}  # of fake tensors, which always take the same

    def peak_bytes(self, size: int) -> int:
        """Returns the peak of two optimiser steps, the second with momentum; `OUT_OF_MEMORY` if a GPU refuses."""
        return self._peak_of(("train", size), lambda: self._two_steps(size))

    def val_peak_bytes(self, size: int) -> int:
        """Returns the peak of a forward pass without gradients, momentum included."""
        return self._peak_of(("val", size), lambda: self._validate(size))

    def _peak_of(self, key: tuple[str, int], run: Callable[[], None]) -> int:
        if key in self._known:
            return self._known[key]
        self._meter.reset_peak()
        try:
            run()
        except torch.OutOfMemoryError:
            return OUT_OF_MEMORY
        finally:
            for optimizer in self._optimizers:
                optimizer.zero_grad(set_to_none=True)
            free_cached(self._device)
        if self._fakes is not None:
            self._known[key] = self._meter.peak_bytes
        return self._meter.peak_bytes

    def _two_steps(self, size: int) -> None:
        num_parts = 2 if self._method.micro_batch else 1
        with self._on_fakes(), self._meter:
            for part in range(2 * num_parts):
                baseline_step(
                    self._units,
                    self._optimizers,
                    lambda: self._images(size),
                    torch.zeros(size, dtype=torch.int64, device=self._device),
                    self._method.precision,
                    num_parts=num_parts,
                    ends_step=part % num_parts == num_parts - 1,
                    mix=any_mix(self._task.config.train.mixup, size, self._device),
                )

    def _validate(self, size: int) -> None:
        set_training(self._units, False)
        with self._on_fakes(), self._meter:
            forward_block(self._units, self._images(size), self._method.precision, with_heads=True)
        set_training(self._units, True)

    def _images(self, size: int) -> torch.Tensor:
        return laid_out(
            torch.zeros(size, *self._task.inputs.shape, device=self._device)
        )  # as the feed hands them out

    def _on_fakes(self) -> AbstractContextManager[object]:
        return nullcontext() if self._fakes is None else self._fakes


def fit_method(task: Task, method: Method) -> Fit:
    """Finds the largest batch whose step fits the task's budget, and the segments that allow it."""
    return fit_budgets([task], method)[0]


def fit_budgets(tasks: Sequence[Task], method: Method) -> list[Fit]:
    """Finds them for tasks that differ in nothing but the budget: on a CPU what a step holds is looked at once."""
    length = choose_segments(tasks[0], method) if method.checkpointing else 0
    shared = FitProbe(tasks[0], method, length) if tasks[0].device.type == "cpu" else None
    return [_fit(task, method, length, shared) for task in tasks]


def _fit(task: Task, method: Method, length: int, shared: FitProbe | None) -> Fit:
    try:
        fit = _fit_under_cap(task, method, length, shared)
    except torch.OutOfMemoryError:  # a GPU refused the weights alone
        fit = Fit(micro_batch=0, batch_size=0, val_batch=0, segment_layers=length, predicted_peak_bytes=OUT_OF_MEMORY)
    free_cached(task.device)
    if fit.predicted_peak_bytes == OUT_OF_MEMORY:
        fit = replace(fit, predicted_peak_bytes=FitProbe(task, method, length).peak_bytes(MIN_BATCH))
    return fit


def _fit_under_cap(task: Task, method: Method, length: int, shared: FitProbe | None) -> Fit:
    budget, max_batch = task.budget_bytes, task.config.memory.max_batch_size
    probe = shared or FitProbe(task, method, length, budget)
    sizes = batch_sizes(max_batch, divide_reference=method.micro_batch)
    size, peak = largest_that_fits(sizes, budget, probe.peak_bytes)
    val_sizes = batch_sizes(max_batch, divide_reference=True)
    return Fit(
        micro_batch=size,
        batch_size=REFERENCE_BATCH if method.micro_batch and size else size,
        val_batch=largest_that_fits(val_sizes, budget, probe.val_peak_bytes)[0] if size else 0,
        segment_layers=length,
        predicted_peak_bytes=peak,
    )


def batch_sizes(max_batch: int, *, divide_reference: bool) -> list[int]:
    """Returns what a forward pass may take, ascending; micro-batches divide `REFERENCE_BATCH`."""
    sizes = range(MIN_BATCH, max_batch + 1)
    return [size for size in sizes if not divide_reference or REFERENCE_BATCH % size == 0]


def largest_that_fits(sizes: Sequence[int], budget: int, peak_bytes: Callable[[int], int]) -> tuple[int, int]:
    """Searches ascending sizes by halving; peaks grow with the size.

    Returns:
        The largest size and its peak; 0 and the first size's peak if none fits.
    """
    peaks: dict[int, int] = {}
    low, high = 0, len(sizes)  # sizes[:low] fit, sizes[high:] do not
    while low < high:
        middle = (low + high) // 2
        peak = peaks[middle] = peak_bytes(sizes[middle])
        low, high = (middle + 1, high) if peak <= budget else (low, middle)
    return (sizes[low - 1], peaks[low - 1]) if low else (0, peaks[0])


def choose_segments(task: Task, method: Method) -> int:
    """Returns the segment length, in layers, whose training step needs the least memory.

    Up to the square root of the number of layers, which is best when all layers are alike (Chen et al. 2016,
    https://arxiv.org/abs/1604.06174), and less where one segment at full resolution outweighs all borders.
    """
    num_layers = len(task.cut_model().layers)
    peaks = {}
    for length in range(1, math.isqrt(num_layers - 1) + 2):
        peaks[length] = FitProbe(task, method, length).peak_bytes(PROBE_BATCH)
    return min(peaks, key=peaks.__getitem__)


def free_cached(device: torch.device) -> None:
    """Gives back what dead tensors of earlier trainings in this process hold of a GPU."""
    if device.type == "cuda":
        gc.collect()  # traced layers are reference cycles
        torch.cuda.empty_cache()
