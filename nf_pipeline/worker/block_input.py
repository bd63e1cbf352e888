"""What a block trains from: the images, or the activations of a block before it.

Those of the block right before it may still be being written. Between any other source and the block lie trained
blocks, whose layers run on every batch; what starts from the images sees them changed anew every epoch, as the first
block does. What starts from activations reads the stored views, one an epoch, and may change their maps anew.

The first epoch on fresh activations reads their shards in stored order, so that it can begin with the first of them,
and shuffles rows within windows of shards. That holds whether or not the shards were already there: timing never
changes a result. Entry class: `BlockInput`.
"""

from collections.abc import Iterator, Sequence

import torch

from nf_pipeline.core.context import needs_samples
from nf_pipeline.core.frozen import FrozenUnits
from nf_pipeline.events import Progress
from nf_pipeline.samples import InputSpec
from nf_pipeline.storage.layout import RunLayout
from nf_pipeline.storage.manifest import StageManifest
from nf_pipeline.storage.parts import Part, part_rows
from nf_pipeline.storage.published import Announcements, PublishedShards, Source
from nf_pipeline.storage.reader import ShardReader
from nf_pipeline.storage.shards import ShardInfo, TensorSpec, rows_per_shard
from nf_pipeline.storage.store import Store
from nf_pipeline.storage.views import ViewReader, view_split
from nf_pipeline.worker.feed import Augmentation, Feed, open_feed
from nf_pipeline.worker.progress_clock import ProgressClock
from nf_pipeline.worker.stage_input import read_block, read_ingest
from nf_pipeline.worker.tasks import BlockTask, chain_checksum, num_rounds

COMMIT_TIMEOUT_S = 3600.0


def activation_spec(task: BlockTask, block_idx: int) -> TensorSpec:
    """Returns type and shape of what a block stores per sample, with the network's own where units look at it."""
    storage, block = task.config.storage, task.plan.blocks[block_idx]
    samples = _samples(task)
    return TensorSpec(
        dtype=storage.dtype,
        shape=tuple(task.plan.layers[block.layers[1] - 1].out_shape),
        codec=storage.codec,
        label_values=task.plan.target.label_values,
        sample=None if samples is None else TensorSpec(samples.dtype, samples.shape),
    )


class BlockInput:
    """The input of one round of a block, as one of its workers reads it.

    Attributes:
        recomputed: commits of the blocks that are run again on every batch, in order.
        frozen: their layers on the training device; set it before a feed is opened.
    """

    def __init__(self, store: Store, layout: RunLayout, task: BlockTask) -> None:
        """Looks whether the input is finished.

        Raises:
            ObjectMissing: there are no ingested images, or a block that is to be run again is not trained.
        """
        self.recomputed = [read_block(store, layout, block_idx) for block_idx in task.block.recomputed]
        self.frozen: FrozenUnits | None = None
        self._task = task
        self._store = store
        self._ingest = read_ingest(store, layout)
        self._announcements = None if task.block.source_block < 0 else _announcements(store, layout, task)
        if self._announcements is not None:
            self._announcements.poll()

    @property
    def manifest(self) -> StageManifest | None:
        """The input's commit; None while it is being written."""
        return self._ingest if self._announcements is None else self._announcements.manifest

    @property
    def checksum(self) -> str | None:
        """Identifies what the block trains on; None while it is being written."""
        if self.manifest is None:
            return None
        return chain_checksum([part.content_checksum for part in (self.manifest, *self.recomputed)])

    @property
    def is_fresh(self) -> bool:
        """Whether the shards may still be being written: those of the block right before this one."""
        return 0 <= self._task.block.source_block == self._task.block_idx - 1

    def wait_committed(self) -> Iterator[Progress]:
        """Waits for the input's commit, which gives the work its fingerprint.

        Raises:
            InputReplaced: what was read was given up, or neither shards nor the commit came for long.
        """
        clock, known, silent_from_s = ProgressClock(), 0, 0.0
        while self.manifest is None:
            if known != self._announcements.num_known:  # further views are being written
                known, silent_from_s = self._announcements.num_known, clock.seconds
            if clock.seconds - silent_from_s > COMMIT_TIMEOUT_S:
                raise self._announcements.silent(COMMIT_TIMEOUT_S)
            clock.sleep()
            self._announcements.poll()
            if clock.is_due():
                yield Progress(stage=self._task.stage, phase="wait", done=0, total=0)

    def open_train(self, batch_size: int, device: torch.device) -> Feed:
        """Opens this worker's part of the train split; what a block stores, view by view, may still be coming."""
        if self._task.block.source_block < 0:
            return self._open("train", batch_size, device, self._augmentation(None))
        spec, (first, *others) = self._stored_views()
        reader = ShardReader(self._store, first, spec, batch_size=batch_size, part=self._part)
        # The first epoch of a round may begin before the round's other views are written.
        views = ViewReader(reader, others, first_epoch=self._task.epochs[0])
        augmentation, target = self._map_augmentation(spec), self._task.plan.target
        return Feed(views, spec, device, None, augmentation, self.frozen, target, _samples(self._task))

    def open_val(self, batch_size: int, device: torch.device) -> Feed:
        """Opens this worker's part of the committed validation split."""
        return self._open("val", batch_size, device, None)

    def open_view(self, batch_size: int, device: torch.device, view: int = 0) -> Feed:
        """Opens this worker's part of a view of the committed train split, as the caching pass reads it.

        A pipelined run caches new random changes of the images every round. A sequential one, which caches once, has
        the images as they are in its first view, and changes of them in the others.
        """
        if self._task.block.source_block >= 0:
            return self._open(view_split(view), batch_size, device, None)
        train = self._task.config.train
        changes = train.epochs + self._task.round_idx * train.views + view  # others than any epoch's
        is_plain = train.mode == "sequential" and view == 0
        return self._open("train", batch_size, device, None if is_plain else self._augmentation(changes))

    def _stored_views(self) -> tuple[TensorSpec, list[Sequence[ShardInfo] | PublishedShards]]:
        config, splits = self._task.config, [view_split(view) for view in range(self._task.config.train.views)]
        if self.manifest is not None:
            return self.manifest.spec, [self.manifest.shards[split] for split in splits]
        spec = activation_spec(self._task, self._task.block.source_block)
        rows = part_rows(self._ingest.num_rows("train"), config.train.workers_per_block)
        size = rows_per_shard(spec, config.storage.shard_bytes)
        return spec, [PublishedShards(self._announcements, split, rows, size) for split in splits]

    def _open(self, split: str, batch_size: int, device: torch.device, augmentation: Augmentation | None) -> Feed:
        return open_feed(
            self._store,
            self.manifest,
            split,
            batch_size=batch_size,
            device=device,
            part=self._part,
            augmentation=augmentation,
            frozen=self.frozen,
            target=self._task.plan.target,
            samples=_samples(self._task),
        )

    def _augmentation(self, view: int | None) -> Augmentation | None:
        train = self._task.config.train
        if train.augment == "none":
            return None
        return Augmentation(kind=train.augment, seed=train.seed, view=view)

    def _map_augmentation(self, spec: TensorSpec) -> Augmentation | None:
        """Returns the changes of stored maps; vectors have no sides to flip."""
        train = self._task.config.train
        if train.feature_augment == "none" or len(spec.shape) != 3:
            return None
        return Augmentation(kind=train.feature_augment, seed=train.seed, block_idx=self._task.block_idx)

    @property
    def _part(self) -> Part:
        return Part(index=self._task.gang.rank, count=self._task.gang.size)


def _samples(task: BlockTask) -> InputSpec | None:
    """Returns what the network's own samples are, where units look at them."""
    return task.plan.inputs if needs_samples(task.config.train) else None


def _announcements(store: Store, layout: RunLayout, task: BlockTask) -> Announcements:
    source, round_idx = task.block.source_block, task.round_idx
    workers = range(task.config.train.workers_per_block)
    place = Source(
        manifest_key=layout.round_manifest(source, round_idx, num_rounds(task.config)),
        publication_keys=tuple(layout.publication(source, round_idx, part) for part in workers),
    )
    return Announcements(store, place)
