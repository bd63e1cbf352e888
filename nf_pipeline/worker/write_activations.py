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
from nf_pipeline.events import Progress
from nf_pipeline.storage.layout import RunLayout
from nf_pipeline.storage.shards import ShardInfo, ShardWriter, TensorSpec
from nf_pipeline.storage.store import Store
from nf_pipeline.worker.evaluate import set_training
from nf_pipeline.worker.feed import Feed
from nf_pipeline.worker.progress_clock import ProgressClock
from nf_pipeline.worker.tasks import BlockTask


def activation_spec(task: BlockTask) -> TensorSpec:
    """Returns type and shape of what the block stores per sample."""
    storage = task.config.storage
    shape = task.plan.layers[task.block.layers[1] - 1].out_shape
    return TensorSpec(dtype=storage.dtype, shape=tuple(shape), codec=storage.codec)


def write_activations(
    store: Store, task: BlockTask, units: Sequence[LocalUnit], feed: Feed, split: str, meter: PeakMeter
) -> Generator[Progress, None, list[ShardInfo]]:
    """Runs a split through the block in stored order and writes the outputs.

    Yields:
        Progress about once a second.

    Returns:
        The written shards.

    Raises:
        Diverged: an activation is not finite in the storage type.
    """
    layout, spec = RunLayout(task.config.run), activation_spec(task)
    prefix = layout.block_attempt(task.block_idx, task.attempt)
    clock, done = ProgressClock(), 0
    set_training(units, False)
    with ShardWriter(
        store, lambda idx: layout.shard(prefix, split, idx), spec, task.config.storage.shard_bytes
    ) as writer:
        for batch in feed.batches():
            with meter:
                batch.track(meter)
                out_NCHW, _ = forward_block(units, batch.take_x(), task.config.train.precision, with_heads=False)
            writer.append(
                encode_activations(out_NCHW, spec.dtype, task.stage), batch.y_N.cpu().numpy(), batch.sample_ids
            )
            del out_NCHW  # else it would live on through the next batch's forward pass
            done += len(batch.sample_ids)
            if clock.is_due():
                rate = clock.rate(done)
                yield Progress(stage=task.stage, phase="write", done=done, total=feed.num_rows, images_per_s=rate)
        return writer.close()


def shards_bytes(shards: dict[str, list[ShardInfo]]) -> int:
    """Adds up the objects' sizes over all splits."""
    return sum(shard.num_bytes for infos in shards.values() for shard in infos)


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
