"""Measures how long the parts of a network take: real steps of single layers and heads, on the training device.

A plan's time is the sum of its parts' (`nf_pipeline.core.prediction`), so that a few seconds of measuring price every
way to form units. A part is measured at the batch sizes of `GRID` around the one that is asked for, and read off the
line between them: small batches cost more per sample, and by how much is what decides between plans.

Knows nothing of units, blocks and budgets. Entry class: `StepTimer`.
"""

import copy
import functools
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import nn

from nf_pipeline.config import TrainConfig
from nf_pipeline.core import stand_ins
from nf_pipeline.core.layout import laid_out
from nf_pipeline.core.train_step import autocast, make_optimizer
from nf_pipeline.core.user_code import user_code
from nf_pipeline.samples import InputSpec

GRID = (2, 8, 32, 128)

TIMING_S = 1.0
"""Seconds that measuring a whole network takes, about: what all parts at all sizes share."""

ONCE_S = 0.5
"""Seconds that a single run may take; larger batches are read off smaller ones."""


class PartKey(NamedTuple):
    """Which part of a network.

    Attributes:
        kind: a layer, a head on it, what its loss computes of its output beside the head, or the context of a unit
            that begins with it.
        layer: 0-based position.
        head: its name; "" is the run's.
    """

    kind: Literal["layer", "head", "loss", "context"]
    layer: int
    head: str = ""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A module that is timed by itself.

    Attributes:
        module: on the CPU; left as it is.
        inputs: one sample.
        largest_batch: that memory allows.
        is_first: no gradient flows to its input.
    """

    module: nn.Module
    inputs: InputSpec
    largest_batch: int
    is_first: bool = False


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """What one batch takes.

    Attributes:
        step: forward, backward and optimiser step.
        forward: inference alone.
    """

    step: float
    forward: float

    def __add__(self, other: "Seconds") -> "Seconds":
        return Seconds(step=self.step + other.step, forward=self.forward + other.forward)

    def scaled(self, factor: float) -> "Seconds":
        """Returns so many times as much."""
        return Seconds(step=self.step * factor, forward=self.forward * factor)


class StepTimer:
    """Seconds of parts at any batch size; each is measured once, when it is first asked for.

    Args:
        make_part: makes a part when it is first timed.
        num_parts: that may be asked for, about.
        train: optimiser and precision.
        device: on which it is measured.
    """

    def __init__(
        self, make_part: Callable[[PartKey], Part], num_parts: int, *, train: TrainConfig, device: torch.device
    ) -> None:
        self._part = functools.cache(make_part)
        self._train = train
        self._device = device
        self._limit_s = TIMING_S / (2 * len(GRID) * num_parts)  # training and inference
        self._too_large: set[tuple[PartKey, int]] = set()
        self._measured: dict[PartKey, dict[int, Seconds]] = defaultdict(dict)

    def seconds(self, key: PartKey, batch_size: int) -> Seconds:
        """Returns what a batch takes a part, from the batch sizes around it that memory and time allow to measure."""
        below = max((size for size in GRID if size <= batch_size), default=GRID[0])
        above = min((size for size in GRID if size >= batch_size), default=GRID[-1])
        self._reach(key, GRID[0])
        for size in (below, above):
            self._reach(key, size)
        return _interpolate(self._measured[key], batch_size)

    def _reach(self, key: PartKey, size: int) -> None:
        """Measures a size if memory and time allow; where it might take long those below first, to know better."""
        measured = self._measured[key]
        if size in measured:
            return
        below = GRID[: GRID.index(size)]
        if below and below[-1] not in measured and not self._is_measurable(key, size):
            self._reach(key, below[-1])
        if not measured or self._is_measurable(key, size):
            self._measure(key, size)

    def _is_measurable(self, key: PartKey, size: int) -> bool:
        smaller = [known for known in self._measured[key] if known < size]
        if not smaller or (key, size) in self._too_large or size > self._part(key).largest_batch:
            return False
        return self._measured[key][max(smaller)].step * size / max(smaller) <= ONCE_S

    def _measure(self, key: PartKey, size: int) -> None:
        try:
            with user_code(f"model: a training step of batch {size} fails", "change the model"):
                self._measured[key][size] = self._time(self._part(key), size)
        except torch.OutOfMemoryError:
            # Kernels of a GPU take workspaces that no prediction shows.
            if not self._measured[key]:
                raise
            self._too_large.add((key, size))

    def _time(self, part: Part, size: int) -> Seconds:
        timed = _TimedPart(part, size, self._train, self._device)
        return Seconds(step=self._fastest(timed.step), forward=self._fastest(timed.forward))

    def _fastest(self, work: Callable[[], None]) -> float:
        """Returns the shortest of some runs: whatever else the machine does only adds."""
        fastest, spent = float("inf"), 0.0
        while spent < self._limit_s:
            self._wait()
            began = time.perf_counter()
            work()
            self._wait()
            took = time.perf_counter() - began
            fastest, spent = min(fastest, took), spent + took
        return fastest

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


class _TimedPart:
    """A copy of a part that takes steps on one batch of noise; its weights stay as they are."""

    def __init__(self, part: Part, size: int, train: TrainConfig, device: torch.device) -> None:
        self._module = copy.deepcopy(part.module).to(device)
        self._mode = partial(autocast, device, train.precision)
        self._x_N = laid_out(stand_ins.noise(part.inputs, size, device)).requires_grad_(not part.is_first)
        self._copies_input = False
        with torch.no_grad(), self._mode():
            self._g_N = torch.ones_like(self._module.eval()(self._x_N.clone()))
        trains = any(weight.requires_grad for weight in self._module.parameters())
        self._optimizer = make_optimizer(self._module, train, 0.0) if trains else None
        self._warm_up()

    def step(self) -> None:
        """Forward, backward, optimiser."""
        self._module.train()
        with self._mode():
            out_N = self._module(self._x_N.clone() if self._copies_input else self._x_N)
        if out_N.requires_grad:
            out_N.backward(self._g_N)
        if self._optimizer is not None:
            self._optimizer.step()
        self._module.zero_grad(set_to_none=True)
        self._x_N.grad = None

    def forward(self) -> None:
        """Inference."""
        self._module.eval()
        with torch.no_grad(), self._mode():
            self._module(self._x_N)

    def _warm_up(self) -> None:
        """Takes a first step, which does what no other has to: chooses kernels, makes momentum."""
        try:
            self.step()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            self._copies_input = True  # it begins with an operation in place, which autograd forbids on a leaf
            self.step()


def _interpolate(measured: dict[int, Seconds], batch_size: int) -> Seconds:
    """Reads off the line between two measured sizes; beyond them every sample takes as long as there."""
    low = max((size for size in measured if size <= batch_size), default=min(measured))
    high = min((size for size in measured if size >= batch_size), default=low)
    if low == high:
        return measured[low].scaled(batch_size / low)
    share = (batch_size - low) / (high - low)
    return measured[low].scaled(1 - share) + measured[high].scaled(share)
