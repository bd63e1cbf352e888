"""Gives every block of a draft its source: stored activations, or an earlier source and the layers between again.

Which is faster `nf_pipeline.core.cache_policy` says; here it learns what a draft takes, and whether the layers in
between fit a block's budget beside its training step. A batch may become a little smaller to make room for them.
Knows nothing of stores. Entry: `with_sources`.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from nf_pipeline.config import TrainConfig
from nf_pipeline.core.cache_policy import IMAGES, BlockCost, CacheJob, choose_sources, forced_sources
from nf_pipeline.core.drafts import Draft, PlanJob
from nf_pipeline.core.partition import effective_budget
from nf_pipeline.core.prediction import TimeModel
from nf_pipeline.core.profiler import StepProbe
from nf_pipeline.dtypes import ITEM_BYTES
from nf_pipeline.plans import BlockPlan, StoreRates
from nf_pipeline.units import format_bytes

KEPT_BATCH = 0.9
"""Part of its batch that a block keeps at least where room is made for layers that are computed again."""

WORTHWHILE = 0.05
"""Part of the predicted time that computing again has to save: measured seconds and rates are no more exact."""

_FREE = StoreRates(read_bytes_per_s=math.inf, write_bytes_per_s=math.inf)


def with_sources(
    job: PlanJob, draft: Draft, times: TimeModel | None, rates: StoreRates | None, *, is_final: bool = True
) -> Draft:
    """Returns a draft whose blocks know where their input comes from, with their seconds where these are known.

    Args:
        job: `storage.cache` is read.
        draft: every block of which reads the one before.
        times: measured seconds; None where nothing was timed.
        rates: of the run's store; without them, or without times, `auto` stores every block's output.
        is_final: whether what is computed again is made to fit; False asks only whether it might, to compare drafts.
    """
    costs = None if times is None else _costs(job, draft, times, rates or _FREE)
    known = costs if rates is not None else None
    rooms = _Rooms(job, draft)
    sources = _choose(job, rooms, known, len(draft.blocks), is_final=is_final)
    blocks = []
    for block, source in zip(draft.blocks, sources, strict=True):
        block = replace(
            block, source_block=source, shard_bytes=block.shard_bytes if block.block_idx in sources else 0
        )
        if costs is not None:
            stored_s = costs.store_s(block.block_idx, source) if block.block_idx in sources else 0.0
            block = replace(block, predicted_s=costs.train_s(block.block_idx, source) + stored_s)
        if is_final:
            why = [*_reason(job, block, known, sources), *_views(job, block)]
            block = rooms.settled(replace(block, reason="; ".join([block.reason, *why])))
        blocks.append(block)
    return replace(draft, blocks=tuple(blocks))


def _costs(job: PlanJob, draft: Draft, times: TimeModel, rates: StoreRates) -> CacheJob:
    rows, train = job.split_rows["train"] + job.split_rows.get("val", 0), job.cfg.train
    workers = train.workers_per_block
    blocks = []
    for block in draft.blocks:
        spans = [unit.span for unit in draft.units[slice(*block.units)]]
        blocks.append(
            BlockCost(
                train_s=times.train_s(spans, block.batch_size) / (train.epochs * rows),
                forward_s=times.forward_s_per_sample(spans, block.batch_size) / workers,
                stored_bytes=job.row_bytes(block.layers[1]),
            )
        )
    threads = workers * torch.get_num_threads()
    return CacheJob(
        blocks=tuple(blocks),
        image_bytes=math.prod(job.inputs.shape) * ITEM_BYTES[job.inputs.dtype],
        rows=rows,
        stored_rows=job.stored_rows * train.num_rounds,
        epochs=train.epochs,
        # Every worker reads its part of the rows, and decodes it on the threads that it computes with.
        rates=StoreRates(
            read_bytes_per_s=rates.read_bytes_per_s * workers,
            write_bytes_per_s=rates.write_bytes_per_s * workers,
            read_cpu_s_per_byte=rates.read_cpu_s_per_byte / threads,
        ),
        shares_cores=job.device.type == "cpu",
        change_s=job.change_s / threads,
        changed=(job.split_rows["train"] / rows, _changed_views(train) * job.split_rows["train"] / job.stored_rows),
    )


def _changed_views(train: TrainConfig) -> int:
    """Returns how many of the views that are stored at a time hold changed images: a run that stores them once keeps
    them as they are in the first."""
    return train.views if train.mode == "pipelined" else train.views - 1


def _choose(
    job: PlanJob, rooms: "_Rooms", costs: CacheJob | None, num_blocks: int, *, is_final: bool
) -> tuple[int, ...]:
    mode = "shards" if job.cfg.train.mode == "pipelined" else job.cfg.storage.cache
    if mode == "auto" and costs is not None:
        return _cheapest(costs, rooms, is_final=is_final)
    return forced_sources(num_blocks, mode, rooms.fits if is_final else rooms.may_fit)


def _cheapest(costs: CacheJob, rooms: "_Rooms", *, is_final: bool) -> tuple[int, ...]:
    """Chooses, looks whether what is computed again really fits, and chooses again without what does not.

    Every block is stored where that is about as fast.
    """
    while True:
        sources = choose_sources(costs, rooms.may_fit)
        again = [(block, source) for block, source in enumerate(sources) if source < block - 1]
        if not is_final or all([rooms.fits(block, source) for block, source in again]):
            break
    stored = forced_sources(len(sources), "shards", rooms.may_fit)
    return sources if costs.total_s(sources) < (1 - WORTHWHILE) * costs.total_s(stored) else stored


class _Rooms:
    """Whether the layers between a source and a block fit its budget, and with which batch; each is found once."""

    def __init__(self, job: PlanJob, draft: Draft) -> None:
        self._job = job
        self._draft = draft
        self._found: dict[tuple[int, int], tuple[int, int]] = {}
        self._refused: set[tuple[int, int]] = set()

    def may_fit(self, block_idx: int, source: int) -> bool:
        """Whether the weights of the layers between leave room for the block's step: what does not fit never did."""
        if (block_idx, source) in self._refused:
            return False
        block, layers = self._draft.blocks[block_idx], self._between(block_idx, source)
        held = [tensor for layer in layers for tensor in (*layer.parameters(), *layer.buffers())]
        weights = sum(tensor.numel() * tensor.element_size() for tensor in held)
        return weights + KEPT_BATCH * block.predicted_peak_bytes <= self._available(block)

    def fits(self, block_idx: int, source: int) -> bool:
        """Whether the whole step fits, what the layers between hold while they run included."""
        if (block_idx, source) in self._found:
            return True
        found = self._find(block_idx, source) if self.may_fit(block_idx, source) else None
        if found is None:
            # From an earlier source it would be more layers.
            self._refused |= {(block_idx, earlier) for earlier in range(-1, source + 1)}
            return False
        self._found[block_idx, source] = found
        return True

    def settled(self, block: BlockPlan) -> BlockPlan:
        """Returns a block with the batch and the peak that it has with what it computes again."""
        if not block.recomputed or not self.fits(block.block_idx, block.source_block):
            return block
        batch_size, peak_bytes = self._found[block.block_idx, block.source_block]
        if batch_size == block.batch_size:
            return replace(block, predicted_peak_bytes=peak_bytes)
        reason = f"{block.reason}, batch {batch_size} instead of {block.batch_size} to make room"
        return replace(block, batch_size=batch_size, predicted_peak_bytes=peak_bytes, reason=reason)

    def _find(self, block_idx: int, source: int) -> tuple[int, int] | None:
        job, block = self._job, self._draft.blocks[block_idx]
        first = self._draft.blocks[source + 1]
        units = job.units([unit.span for unit in self._draft.units], range(first.units[0], block.units[1]))
        num_between = block.units[0] - first.units[0]
        probe = StepProbe(
            units[num_between:],
            job.ends[first.layers[0]],
            train=job.cfg.train,
            device=job.device,
            target=job.target,
            frozen=units[:num_between],
            sample=job.sample,
        )
        available, batch_size = self._available(block), block.batch_size
        smallest = max(job.memory.min_batch_size, math.ceil(KEPT_BATCH * batch_size))
        while (peak_bytes := probe.peak_bytes(batch_size)) > available:
            if batch_size <= smallest:
                return None
            batch_size = max(smallest, min(batch_size - 1, batch_size * available // peak_bytes))
        return batch_size, peak_bytes

    def _between(self, block_idx: int, source: int) -> Sequence[torch.nn.Module]:
        blocks = self._draft.blocks
        return self._job.cut_model.layers[blocks[source + 1].layers[0] : blocks[block_idx].layers[0]]

    def _available(self, block: BlockPlan) -> int:
        return effective_budget(block.budget_bytes, self._job.memory)


def _reason(job: PlanJob, block: BlockPlan, costs: CacheJob | None, sources: Sequence[int]) -> list[str]:
    """Says where a block's input comes from, and what speaks for it; nothing where there is no choice."""
    if block.block_idx == 0 or job.cfg.train.mode == "pipelined":
        return []
    before, place = block.block_idx - 1, _place(block.source_block)
    if job.cfg.storage.cache == "auto" and costs is not None:
        read_s = costs.read_s(before)
        if block.recomputed:
            again_s = costs.recompute_s(block.block_idx, block.source_block)
            store_s = costs.store_s(before, sources[before])
            instead = f"reading it {read_s:.2g} s and storing it {store_s:.2g} s once"
            return [f"input computed again from {place}: {again_s:.2g} s an epoch; {instead}"]
        again_s = costs.recompute_s(block.block_idx, IMAGES)
        return [f"input from {place}: {read_s:.2g} s an epoch, computing it again {again_s:.2g} s"]
    if job.cfg.storage.cache != "recompute":
        return []
    if block.source_block == IMAGES:
        return [f"input computed again from {place}"]
    extent = "all of the network before it" if block.recomputed else "the block before it"
    return [f"input from {place}: with {extent} it takes more than {format_bytes(block.budget_bytes)}"]


def _views(job: PlanJob, block: BlockPlan) -> list[str]:
    """Says what storing several views takes."""
    num_views = job.cfg.train.views
    if num_views == 1 or not block.shard_bytes:
        return []
    view_bytes = job.split_rows["train"] * job.row_bytes(block.layers[1])
    return [f"stores {num_views} views of the train split, {format_bytes(view_bytes)} each"]


def _place(source: int) -> str:
    return "the images" if source == IMAGES else f"what block {source + 1} stores"
