"""The caching pass: a trained block's output for every sample, as shards for the next block.

Batch norm runs in inference mode, so the next block sees what the final model will compute (METHOD: our choice;
the paper does not say).
"""

from collections.abc import Generator, Sequence

import numpy as np
import torch

from nf_pipeline.core.dtypes import TORCH_DTYPES
from nf_pipeline.core.local_unit import LocalUnit
from nf_pipeline.core.memory import PeakMeter
from nf_pipeline.core.train_step import forward_block
from nf_pipeline.errors import Diverged
from nf_pipeline.events import Progress, Publishing
from nf_pipeline.storage.layout import RunLayout
from nf_pipeline.storage.parts import part_rows
from nf_pipeline.storage.published import Publication, shard_sizes
from nf_pipeline.storage.shards import ShardInfo, ShardWriter, rows_per_shard
from nf_pipeline.storage.store import Store
from nf_pipeline.worker.block_input import activation_spec
from nf_pipeline.worker.evaluate import set_training
from nf_pipeline.worker.feed import Feed
from nf_pipeline.worker.progress_clock import ProgressClock
from nf_pipeline.worker.tasks import BlockTask


class ActivationWriter:
    """One worker's part of a round's activations.

    The train split is announced shard by shard, so that the next block can begin with the first.
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
        key = layout.publication(task.block_idx, task.round_idx, task.gang.rank)
        self._publication = Publication(store, key, task.attempt)
        set_training(units, False)

    def announce(self) -> Publishing:
        """Tells that shards are coming."""
        return Publishing(stage=self._task.stage, round_idx=self._task.round_idx)

    def finish_publication(self) -> None:
        """Announces every shard of the train split."""
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
                with self._meter:
                    batch.track(self._meter)
                    out_NCHW, _ = forward_block(
                        self._units, batch.take_x(), task.config.train.precision, with_heads=False
                    )
                stored = encode_activations(out_NCHW, self._spec.dtype, task.stage)
                writer.append(stored, batch.y_N.cpu().numpy(), batch.sample_ids)
                del out_NCHW  # else it would live on through the next batch's forward pass
                done += len(batch.sample_ids)
                if clock.is_due():
                    rate = clock.rate(done)
                    yield Progress(stage=task.stage, phase="write", done=done, total=feed.num_rows, images_per_s=rate)
            return writer.close()

    def _open(self, split: str, feed: Feed) -> ShardWriter:
        task, size = self._task, self._task.config.storage.shard_bytes
        prefix = self._layout.block_attempt(task.block_idx, task.attempt)
        first = self._first_shard(feed.num_rows_total)
        return ShardWriter(
            self._store,
            lambda idx: self._layout.shard(prefix, split, first + idx),
            self._spec,
            size,
            on_stored=self._publication.add if split == "train" else None,
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
    if not bool(torch.isfinite(narrow).all()):
        raise Diverged(
            stage,
            f"an activation is not finite as {dtype} (largest magnitude {x_NCHW.abs().max().item():g})",
            "--set storage.dtype=float32, or lower train.lr",
        )
    return narrow.view(len(narrow), -1).view(torch.uint8).numpy()
