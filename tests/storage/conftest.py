"""A local store with a few shards whose rows are recognisable."""

from dataclasses import dataclass

import numpy as np
import pytest

from nf_pipeline.storage.local import LocalStore
from nf_pipeline.storage.shard_writer import ShardWriter
from nf_pipeline.storage.shards import ShardInfo, TensorSpec


@dataclass(frozen=True, kw_only=True)
class Written:
    """Rows as they were written, and the shards that hold them."""

    store: LocalStore
    spec: TensorSpec
    shards: list[ShardInfo]
    tensors: np.ndarray
    labels: np.ndarray
    sample_ids: np.ndarray


def make_rows(spec: TensorSpec, num_rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns random tensors, labels and ids that are not in order."""
    random = np.random.default_rng(7)
    tensors = random.integers(0, 256, (num_rows, spec.nbytes), dtype=np.uint8)
    return tensors, random.integers(0, 10, num_rows), random.permutation(num_rows) + 1000


@pytest.fixture
def store(tmp_path):
    return LocalStore(str(tmp_path / "store"))


@pytest.fixture
def write(store):
    """Function that writes rows into shards of `rows_per_shard`."""

    def write_rows(num_rows: int, *, rows_per_shard: int = 10, codec: str = "none") -> Written:
        spec = TensorSpec("float16", (3, 4), codec)
        tensors, labels, sample_ids = make_rows(spec, num_rows)
        with ShardWriter(
            store, lambda idx: f"run/blocks/000/x/train-{idx:05d}.parquet", spec, spec.nbytes * rows_per_shard
        ) as writer:
            writer.append(tensors, labels, sample_ids)
        shards = writer.close()
        return Written(store=store, spec=spec, shards=shards, tensors=tensors, labels=labels, sample_ids=sample_ids)

    return write_rows
