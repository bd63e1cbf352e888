"""The caching pass: a trained block's output for every sample, as shards for the next block.

Where units look at the network's own samples, each is stored beside its activations, as this pass has changed it: the
ingested one, or what the block itself has read beside its input.

Batch norm runs in inference mode, so the next block sees what the final model will compute (METHOD: our choice;
the paper does not say). Bytes in place of numbers (storage.dtype uint8) get one scale per channel for the whole
block: its first outputs are measured before any is written, by all members of a gang together.
"""

import math
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from nf_pipeline.core.dtypes import TORCH_DTYPES
from nf_pipeline.core.local_unit import LocalUnit
from nf_pipeline.core.memory import PeakMeter
from nf_pipeline.core.train_step import forward_block
from nf_pipeline.errors import Diverged
from nf_pipeline.events import Note, Progress, Publishing
from nf_pipeline.storage.affine import Affine, fit_affine
from nf_pipeline.storage.layout import RunLayout
from nf_pipeline.storage.parts import part_rows
from nf_pipeline.storage.published import Publication, shard_sizes
from nf_pipeline.storage.shard_writer import ShardWriter
from nf_pipeline.storage.shards import ShardInfo, TensorSpec, rows_per_shard
from nf_pipeline.storage.store import Store
from nf_pipeline.worker.block_input import activation_spec
from nf_pipeline.worker.data_parallel import Replicas
from nf_pipeline.worker.evaluate import set_training
from nf_pipeline.worker.feed import DeviceBatch, Feed
from nf_pipeline.worker.progress_clock import ProgressClock
from nf_pipeline.worker.tasks import BlockTask

MEASURED_ROWS = (256, 1024)
"""A 16th of the rows is measured before bytes are written, between these numbers of samples."""
MANY_CLIPPED = 1e-3


class ActivationWriter:
    """One worker's part of a round's activations.

    The train split's views are announced shard by shard, so that the next block can begin with the first.
    """

    def __init__(
        self, store: Store, layout: RunLayout, task: BlockTask, units: Sequence[LocalUnit], meter: PeakMeter
    ) -> None:
        """Announces that nothing is there yet, in place of what an earlier attempt may have announced."""
        self._store = store
        self._layout = layout
        self._task = task
        self._units = units
        self._meter = meter
        self._spec = activation_spec(task, task.block_idx)
        self._num_values = self._num_clipped = 0
        key = layout.publication(task.block_idx, task.round_idx, task.gang.rank)
        self._publication = Publication(store, key, task.attempt)
        set_training(units, False)

    @property
    def spec(self) -> TensorSpec:
        """Of what is written; its scales are known once `calibrate` has run."""
        return self._spec

    def calibrate(self, views: Iterable[Feed], replicas: Replicas) -> Iterator[Progress]:
        """Measures which numbers the bytes have to stand for, on the first samples of each worker in every view.

        The same outputs give the same scales. Other types than uint8 have none: nothing is read then.

        Args:
            views: this worker's part of the train split, as `write` gets it, view by view.
            replicas: all of them agree on the scales.

        Raises:
            Diverged: an activation is not finite.
            WorkerLost: another worker of the gang is gone.
        """
        if self._spec.dtype != "uint8":
            return
        ranges = ChannelRanges(self._spec.shape[0])
        for feed in views:
            yield from self._measure(feed, ranges)
        self._spec = replace(self._spec, affine=ranges.fit(replicas))

    def _measure(self, feed: Feed, ranges: "ChannelRanges") -> Iterator[Progress]:
        clock, done = ProgressClock(), 0
        with closing(feed.batches()) as batches:
            for batch in batches:
                ranges.add(self._output(batch), self._task.stage)
                done += len(batch.sample_ids)
                if done >= _num_measured(feed.num_rows):
                    break
                if clock.is_due():
                    yield Progress(stage=self._task.stage, phase="write", done=0, total=feed.num_rows)

    def clipped(self) -> Iterator[Note]:
        """Tells how many numbers lay beyond what was measured, where 8 bits are stored."""
        if self._spec.affine is not None:
            share = self._num_clipped / max(1, self._num_values)
            text = (
                f"8-bit activations: {self._num_clipped:,} of {self._num_values:,} numbers ({share:.4%}) were clipped"
            )
            level = "warning" if share > MANY_CLIPPED else "info"
            yield Note(stage=self._task.stage, text=text, level=level)

    def announce(self) -> Publishing:
        """Tells that shards are coming."""
        return Publishing(stage=self._task.stage, round_idx=self._task.round_idx)

    def finish_publication(self) -> None:
        """Announces every shard that is written of the train split's views."""
        self._publication.flush()

    def write(self, split: str, feed: Feed) -> Generator[Progress, None, list[ShardInfo]]:
        """Runs this worker's part of a split through the block in stored order and writes the outputs.

        Yields:
            Progress about once a second.

        Returns:
            The written shards.

        Raises:
            Diverged: an activation is not finite in the storage type.
        """
        task, clock, done = self._task, ProgressClock(), 0
        with self._open(split, feed) as writer:
            for batch in feed.batches():
                stored = self._encoded(self._output(batch))
                writer.append(stored, batch.labels, batch.sample_ids, batch.stored_samples)
                done += len(batch.sample_ids)
                if clock.is_due():
                    rate = clock.rate(done)
                    yield Progress(stage=task.stage, phase="write", done=done, total=feed.num_rows, images_per_s=rate)
            return writer.close()

    def _output(self, batch: DeviceBatch) -> torch.Tensor:
        with self._meter:
            batch.track(self._meter)
            precision = self._task.config.train.precision
            sample_N = batch.sample_N
            return forward_block(self._units, batch.take_x(), precision, with_heads=False, sample_N=sample_N)[0]

    def _encoded(self, out_NCHW: torch.Tensor) -> np.ndarray:
        if self._spec.affine is None:
            return encode_activations(out_NCHW, self._spec.dtype, self._task.stage)
        stored, num_clipped = quantise_activations(out_NCHW, self._spec.affine, self._task.stage)
        self._num_values += stored.size
        self._num_clipped += num_clipped
        return stored

    def _open(self, split: str, feed: Feed) -> ShardWriter:
        task, size = self._task, self._task.config.storage.shard_bytes
        prefix = self._layout.block_attempt(task.block_idx, task.attempt)
        first = self._first_shard(feed.num_rows_total)
        return ShardWriter(
            self._store,
            lambda idx: self._layout.shard(prefix, split, first + idx),
            self._spec,
            size,
            on_stored=None if split == "val" else partial(self._publication.add, split),
        )

    def _first_shard(self, num_rows: int) -> int:
        """Counts the shards that members of lower rank write of a split."""
        gang = self._task.gang
        size = rows_per_shard(self._spec, self._task.config.storage.shard_bytes)
        return sum(len(shard_sizes(rows, size)) for rows in part_rows(num_rows, gang.size)[: gang.rank])


def encode_activations(x_NCHW: torch.Tensor, dtype: str, stage: str) -> np.ndarray:
    """Narrows activations to the storage type.

    Args:
        x_NCHW: on any device.
        dtype: float32, float16 or bfloat16.
        stage: for the error.

    Returns:
        uint8 [N, bytes per sample].

    Raises:
        Diverged: a value is NaN, infinite, or too large for the type.
    """
    narrow = x_NCHW.to(TORCH_DTYPES[dtype]).cpu().contiguous()
    # The extremes of anything with a NaN are NaN; asking every number costs ten times as much.
    if not bool(torch.isfinite(torch.stack(torch.aminmax(narrow))).all()):
        raise Diverged(
            stage,
            f"an activation is not finite as {dtype} (largest magnitude {x_NCHW.abs().max().item():g})",
            "--set storage.dtype=float32, or lower train.lr",
        )
    return narrow.view(len(narrow), -1).view(torch.uint8).numpy()


def quantise_activations(x_NCHW: torch.Tensor, affine: Affine, stage: str) -> tuple[np.ndarray, int]:
    """Turns activations into bytes on their device.

    Args:
        x_NCHW: on any device.
        affine: of every channel.
        stage: for the error.

    Returns:
        uint8 [N, bytes per sample], and how many numbers were beyond the range and became its end.

    Raises:
        Diverged: a value is NaN or infinite.
    """
    sides = (-1, *[1] * (x_NCHW.ndim - 2))
    scales = torch.tensor(affine.scales, device=x_NCHW.device).view(sides)
    zero_points = torch.tensor(affine.zero_points, dtype=torch.float32, device=x_NCHW.device).view(sides)
    steps = torch.div(x_NCHW.float(), scales).add_(zero_points).round_()
    smallest, largest = (extreme.item() for extreme in torch.aminmax(steps))
    if not (math.isfinite(smallest) and math.isfinite(largest)):
        raise _not_finite(stage)
    num_clipped = 0
    if smallest < 0 or largest > 255:
        num_clipped = int(((steps < 0) | (steps > 255)).sum())
    stored = steps.clamp_(0, 255).to(torch.uint8).cpu().contiguous()
    return stored.view(len(stored), -1).numpy(), num_clipped


class ChannelRanges:
    """The smallest and largest activation of every channel, zero included.

    Args:
        num_channels: second size of what is added.
    """

    def __init__(self, num_channels: int) -> None:
        self._low_C = torch.zeros(num_channels)
        self._high_C = torch.zeros(num_channels)

    def add(self, x_NCHW: torch.Tensor, stage: str) -> None:
        """Widens the ranges by a batch.

        Raises:
            Diverged: a value is NaN or infinite.
        """
        sides = [side for side in range(x_NCHW.ndim) if side != 1]
        low_C, high_C = (extreme(x_NCHW, dim=sides).float().cpu() for extreme in (torch.amin, torch.amax))
        if not bool(torch.isfinite(torch.stack([low_C, high_C])).all()):
            raise _not_finite(stage)
        self._low_C = torch.minimum(self._low_C, low_C)
        self._high_C = torch.maximum(self._high_C, high_C)

    def fit(self, replicas: Replicas) -> Affine:
        """Returns scales for what all members of the gang have seen.

        Raises:
            PeerLost: a member is gone.
        """
        extremes = replicas.largest_each(torch.cat([-self._low_C, self._high_C]).tolist())
        num_channels = len(self._low_C)
        return fit_affine([-value for value in extremes[:num_channels]], extremes[num_channels:])


def _num_measured(num_rows: int) -> int:
    return min(MEASURED_ROWS[1], max(MEASURED_ROWS[0], num_rows // 16))


def _not_finite(stage: str) -> Diverged:
    return Diverged(stage, "an activation is NaN or infinite", "lower train.lr")
