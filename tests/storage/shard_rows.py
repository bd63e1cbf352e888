"""Rows for shards, the same ones every time."""

import numpy as np

from nf_pipeline.storage.shards import TensorSpec


def shard_key(shard_idx: int) -> str:
    """Returns the key of a shard."""
    return f"x/train-{shard_idx:05d}.parquet"


def rows_of(spec: TensorSpec, num_rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns random tensors, labels and ids that are not in order."""
    random = np.random.default_rng(3)
    tensors = random.integers(0, 256, (num_rows, spec.nbytes), dtype=np.uint8)
    return tensors, random.integers(0, 10, num_rows), random.permutation(num_rows)
