"""A proposal under the budget: its units' predicted bytes, and the blocks that follow from them.

To compare drafts estimates of single units are enough; the one that is taken is drafted anew from units' profiles and
verified block by block. Knows nothing of seconds: which draft is the fastest is for the search. Entries:
`draft_plan`, `verify_draft`.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from nf_pipeline.config import MemoryConfig, RunConfig
from nf_pipeline.core.context import Context, needs_samples
from nf_pipeline.core.estimate import Head, UnitEstimator
from nf_pipeline.core.heads import AUTO_HEAD, STAND_IN
from nf_pipeline.core.layers import CutModel
from nf_pipeline.core.local_unit import LocalUnit, build_units
from nf_pipeline.core.partition import (
    Group,
    assign_budgets,
    budget_for,
    effective_budget,
    limit_batch,
    partition,
    smallest_budget,
)
from nf_pipeline.core.profiler import StepProbe, probe_batch_sizes, profile_unit
from nf_pipeline.core.proposals import Proposal
from nf_pipeline.core.stand_ins import numbers
from nf_pipeline.dtypes import ITEM_BYTES
from nf_pipeline.errors import PlanError
from nf_pipeline.plans import BlockPlan, UnitProfile, UnitSpan
from nf_pipeline.samples import InputSpec, TargetSpec
from nf_pipeline.units import format_bytes


@dataclass(frozen=True, kw_only=True)
class PlanJob:
    """What every plan for one model, data set and budget is decided from.

    `memory` is what the run really has: its batches end at the train split. `budgets` are bytes per class of workers,
    ascending, none above the device's memory; a budget that the user gave is the only class. `change_s` is what
    random changes of a sample take one thread. `profiles` fills as units are asked for.
    """

    cfg: RunConfig
    memory: MemoryConfig
    budgets: tuple[int, ...]
    cap_name: str
    cut_model: CutModel
    inputs: InputSpec
    target: TargetSpec
    split_rows: dict[str, int]
    device: torch.device
    is_exhaustive: bool = False
    change_s: float = 0.0
    profiles: dict[UnitSpan, UnitProfile] = field(default_factory=dict)

    @property
    def ends(self) -> tuple[InputSpec, ...]:
        """A sample at the input of every layer, and at the output of the last."""
        return (self.inputs, *map(numbers, self.cut_model.out_shapes))

    @property
    def num_layers(self) -> int:
        """Layers of the cut model."""
        return len(self.cut_model.layers)

    def units(self, spans: Sequence[UnitSpan], which: range | None = None) -> list[LocalUnit]:
        """Builds units; their layers are the model's own."""
        train = self.cfg.train
        head = STAND_IN if train.head == AUTO_HEAD else train.head
        return build_units(self.cut_model, head, spans, self.target, train.seed, units=which, train=train)

    @property
    def stored_rows(self) -> int:
        """Samples that a block stores: every view of the train split, and the validation split."""
        return self.cfg.train.views * self.split_rows["train"] + self.split_rows.get("val", 0)

    def row_bytes(self, stop: int) -> int:
        """Returns the tensor bytes of a stored row: activations after layer `stop` - 1, and the sample beside."""
        sample = 0 if self.sample is None else math.prod(self.sample.shape) * ITEM_BYTES[self.sample.dtype]
        return math.prod(self.ends[stop].shape) * ITEM_BYTES[self.cfg.storage.dtype] + sample

    def stored_bytes(self, stop: int) -> int:
        """Returns the tensor bytes of all rows that are stored after layer `stop` - 1."""
        return self.stored_rows * self.row_bytes(stop)

    def unit_names(self, units: Sequence[UnitProfile]) -> list[str]:
        """Names units by their layers: "features.0" or "features.0..features.7"."""
        names = self.cut_model.names
        return [
            names[unit.start] if unit.stop - unit.start == 1 else f"{names[unit.start]}..{names[unit.stop - 1]}"
            for unit in units
        ]

    def profile(
        self, spans: Sequence[UnitSpan], on_progress: Callable[[int, int], None] | None = None
    ) -> tuple[UnitProfile, ...]:
        """Predicts the bytes of every unit's training step on the run's device, from whole steps.

        What other proposals had too is known already.
        """
        for done, span in enumerate(spans):
            if span not in self.profiles:
                self.profiles[span] = self._profile_one(span)
            if on_progress is not None:
                on_progress(done + 1, len(spans))
        return tuple(replace(self.profiles[span], unit_idx=idx) for idx, span in enumerate(spans))

    def estimate(self, spans: Sequence[UnitSpan]) -> tuple[UnitProfile, ...]:
        """Adds up about the same bytes from those of layers and heads, in a fraction of the time."""
        return tuple(replace(self._estimator.profile(span), unit_idx=idx) for idx, span in enumerate(spans))

    @functools.cached_property
    def _estimator(self) -> UnitEstimator:
        return UnitEstimator(
            self.cut_model.layers,
            self._head,
            self.ends,
            train=self.cfg.train,
            batch_sizes=self._ends_of_batches,
            sample=self.sample,
            make_context=self.context,
        )

    def context(self, layer_idx: int) -> Context | None:
        """Builds the context of a unit that begins with a layer; None where it has none."""
        (unit,) = self.units([UnitSpan(layer_idx, self.num_layers)])
        return unit.context

    @property
    def sample(self) -> InputSpec | None:
        """The network's own sample where units look at it."""
        return self.inputs if needs_samples(self.cfg.train) else None

    def _head(self, layer_idx: int, name: str) -> Head:
        (unit,) = self.units([UnitSpan(layer_idx, layer_idx + 1, head=name)])
        return Head(module=unit.head, is_contiguous=unit.is_last, loss=unit.objective.on_output)

    def _profile_one(self, span: UnitSpan) -> UnitProfile:
        batch_sizes = probe_batch_sizes(self.memory.min_batch_size, self.memory.max_batch_size)
        return profile_unit(
            self.units([span])[0],
            span,
            (self.ends[span.start], self.ends[span.stop]),
            train=self.cfg.train,
            device=self.device,
            target=self.target,
            sample=self.sample,
            # Tensor bytes are convex in the batch: the line through both ends lies above. Measurements need not be.
            batch_sizes=batch_sizes if self.device.type == "cuda" else self._ends_of_batches,
        )

    @property
    def _ends_of_batches(self) -> list[int]:
        first, *_, last = probe_batch_sizes(self.memory.min_batch_size, self.memory.max_batch_size)
        return [first, last]


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A proposal under the budget: units with their profiles, and blocks.

    `at_once` tells that all blocks train at the same time, as many workers granted.
    """

    proposal: Proposal
    units: tuple[UnitProfile, ...]
    blocks: tuple[BlockPlan, ...]
    at_once: bool = False

    @property
    def smallest_batch(self) -> int:
        """Of all blocks."""
        return min(block.batch_size for block in self.blocks)

    @property
    def predicted_s(self) -> float:
        """Of the run, once its blocks are priced."""
        seconds = [block.predicted_s for block in self.blocks]
        return max(seconds) if self.at_once else sum(seconds)


def draft_plan(job: PlanJob, proposal: Proposal, units: tuple[UnitProfile, ...]) -> Draft:
    """Puts a proposal under the budget.

    Args:
        units: the profiles of the proposal's units, or estimates of them.

    Raises:
        PlanError: a unit trains on no class of workers.
    """
    return _Drafting(job, units).draft(proposal)


def added_up(units: Sequence[UnitProfile], batch_size: int) -> int:
    """Returns the bytes of a block's step: what all of its units hold always, and the most that one needs beside."""
    resident = sum(unit.resident_bytes for unit in units)
    return resident + max(unit.peak_bytes(batch_size) - unit.resident_bytes for unit in units)


def verified_batch(
    batch_size: int,
    available_bytes: int,
    bytes_per_sample: int,
    cfg: MemoryConfig,
    peak_at: Callable[[int], int],
) -> tuple[int, int]:
    """Moves a batch from where the fitted lines put it to about the largest whose verified peak fits.

    Lines lie above a convex peak, so most often it grows a little, or stays.

    Args:
        batch_size: what the lines allow.
        available_bytes: the effective budget.
        bytes_per_sample: steepest line of the block.
        cfg: smallest and largest batch.
        peak_at: verified peak bytes by batch size.

    Returns:
        The batch and its peak. The peak is above `available_bytes` only if the smallest batch does not fit.
    """
    peak_bytes = peak_at(batch_size)
    while peak_bytes > available_bytes and batch_size > cfg.min_batch_size:
        proportional = batch_size * available_bytes // peak_bytes
        batch_size = max(cfg.min_batch_size, min(batch_size - 1, proportional))
        peak_bytes = peak_at(batch_size)
    slope = max(1, bytes_per_sample)
    while (growth := min((available_bytes - peak_bytes) // slope, cfg.max_batch_size - batch_size)) > 0:
        larger_peak = peak_at(batch_size + growth)
        if larger_peak > available_bytes:
            # Too steep here. Between two points of a convex peak the line that joins them lies above it.
            slope = max(slope + 1, -((peak_bytes - larger_peak) // growth))
        else:
            batch_size, peak_bytes = batch_size + growth, larger_peak
    return batch_size, peak_bytes


def verify_draft(job: PlanJob, draft: Draft) -> Draft:
    """Runs every block's whole step, on fake tensors or a GPU, and moves its batch to what really fits.

    A block that takes more than its units' profiles add up to, even with the smallest batch, is taken apart from its
    end. Every unit alone was found to fit, so the budget suffices.

    Raises:
        PlanError: a unit takes more than its profile said, which only measurements on a GPU can.
    """
    return _Drafting(job, draft.units).verify(draft)


class _Drafting:
    """One proposal on its way to blocks."""

    def __init__(self, job: PlanJob, profiles: tuple[UnitProfile, ...]) -> None:
        self._job = job
        self._profiles = profiles
        self._names = job.unit_names(profiles)

    def draft(self, proposal: Proposal) -> Draft:
        """Partitions by what the profiles add up to."""
        job = self._job
        groups = []
        for start, stop, budget in assign_budgets(self._profiles, self._names, job.budgets, job.memory):
            for group in self._partition(start, stop, budget):
                groups.append((group, added_up(self._profiles[group.start : group.stop], group.batch_size), budget))
        return self._with_blocks(Draft(proposal=proposal, units=self._profiles, blocks=()), groups)

    def verify(self, draft: Draft) -> Draft:
        """Measures every block as a whole."""
        units = self._job.units([unit.span for unit in self._profiles])
        groups = []
        for block in draft.blocks:
            start, stop = block.units
            group = Group(start=start, stop=stop, batch_size=block.batch_size, reason=block.reason)
            for verified, peak_bytes in self._verified(group, units, block.budget_bytes):
                groups.append((verified, peak_bytes, block.budget_bytes))
        return self._with_blocks(draft, groups)

    def _with_blocks(self, draft: Draft, groups: Sequence[tuple[Group, int, int]]) -> Draft:
        """Returns the draft with groups, their peaks and their budgets as its blocks."""
        blocks = []
        for block_idx, (group, peak_bytes, budget) in enumerate(groups):
            layers = (self._profiles[group.start].start, self._profiles[group.stop - 1].stop)
            blocks.append(
                BlockPlan(
                    block_idx=block_idx,
                    units=(group.start, group.stop),
                    layers=layers,
                    batch_size=group.batch_size,
                    budget_bytes=budget,
                    predicted_peak_bytes=peak_bytes,
                    shard_bytes=0 if block_idx == len(groups) - 1 else self._job.stored_bytes(layers[1]),
                    reason=group.reason,
                )
            )
        return replace(draft, blocks=tuple(blocks), at_once=self._job.cfg.train.mode == "pipelined")

    def _partition(self, start: int, stop: int, budget: int) -> list[Group]:
        """Partitions a range of units under one budget."""
        profiles, names, job = self._profiles[start:stop], self._names[start:stop], self._job
        groups = partition(profiles, budget, job.memory, unit_names=names, cap_name=job.cap_name)
        return [replace(group, start=start + group.start, stop=start + group.stop) for group in groups]

    def _verified(self, whole: Group, units: Sequence[LocalUnit], budget: int) -> Iterator[tuple[Group, int]]:
        """Yields the blocks that a block becomes, most often itself, with their verified peaks."""
        job, names = self._job, self._names
        available = effective_budget(budget, job.memory)
        pending = [whole]
        while pending:
            group = pending.pop()
            moved, peak_bytes = self._verify(group, units, available)
            if peak_bytes <= available:
                yield moved, peak_bytes
            elif group.stop - group.start > 1:
                taken = f"{format_bytes(peak_bytes)} even at batch {moved.batch_size}"
                reason = f"with {names[group.stop - 1]} it takes {taken}"
                pending.append(self._regroup(group.stop - 1, group.stop, group.reason, available))
                pending.append(self._regroup(group.start, group.stop - 1, reason, available))
            else:
                smallest = max(budget_for(peak_bytes, job.memory), smallest_budget(self._profiles, job.memory))
                raise PlanError(names[group.start], peak_bytes, budget, smallest)

    def _regroup(self, start: int, stop: int, reason: str, available: int) -> Group:
        """Makes a block of part of another one's units."""
        job, units, names = self._job, self._profiles[start:stop], self._names[start:stop]
        batch_size, limit = limit_batch(units, names, available, job.memory, job.cap_name)
        return Group(start=start, stop=stop, batch_size=batch_size, reason=f"{reason.partition('; ')[0]}; {limit}")

    def _verify(self, group: Group, units: Sequence[LocalUnit], available: int) -> tuple[Group, int]:
        """Returns a block with its batch moved, and the peak of the whole block's step at that batch."""
        job, profiles = self._job, self._profiles[group.start : group.stop]
        probe = StepProbe(
            units[group.start : group.stop],
            job.ends[profiles[0].start],
            train=job.cfg.train,
            device=job.device,
            target=job.target,
            sample=job.sample,
        )
        slope = max(unit.bytes_per_sample for unit in profiles)
        batch_size, peak_bytes = verified_batch(group.batch_size, available, slope, job.memory, probe.peak_bytes)
        if batch_size == group.batch_size:
            return group, peak_bytes
        moved = f"batch {batch_size} instead of {group.batch_size} after verifying {format_bytes(peak_bytes)}"
        return replace(group, batch_size=batch_size, reason=f"{group.reason}; {moved}"), peak_bytes
