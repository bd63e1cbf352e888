"""A block's stored activations as paths, and the function that turns their bytes into numbers.

    shards = ActivationShards("./nf-runs/first", block_idx=0, split="train")
    shards.to_ray().map_batches(...)

The shards are Parquet that everything reads; only the column of fixed-size bytes needs `decode`. Which shards
count is what the block's manifest says. Imports Ray Data only in `to_ray`. Entry: `ActivationShards`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from nf_pipeline.data.base import SPLITS
from nf_pipeline.errors import ConfigError, DataError, ObjectCorrupt, ObjectMissing
from nf_pipeline.run_uri import join_run_uri, split_run_uri
from nf_pipeline.storage.layout import RunLayout
from nf_pipeline.storage.manifest import read_manifest, verify_manifest
from nf_pipeline.storage.sealed import repair_fix
from nf_pipeline.storage.shards import RELEASED_FIX, TensorSpec, read_shard
from nf_pipeline.storage.store import open_store

COLUMN = "tensor"
SAMPLE_COLUMN = "sample"
LABEL_COLUMN = "label"


class ActivationShards:
    """The activations that a finished block stored for one split.

    Pickles as paths and types: nothing is read again where it arrives.

    Args:
        uri: STORE/NAME of a run.
        block_idx: 0-based; the last block stores nothing, nor does one whose output later blocks compute again.
        split: "train" or "val", or "train-view1" and so on of a run with several `train.views`; the final model alone
            sees the test split.

    Attributes:
        paths: of the shards, in stored order: absolute paths, or s3://...
        spec: dtype and shape of one sample's activations as stored; in `spec.sample` those of the network's own
            sample beside them, None where the run stores none.
        num_rows: samples.

    Raises:
        ObjectMissing: the block is not finished, or its activations were released.
        ObjectCorrupt: a shard is missing or has another size; `verify` compares every byte.
        ConfigError: no such split, or a block that stores no activations.
    """

    def __init__(self, uri: str, block_idx: int, split: str = "train") -> None:
        store_uri, run = split_run_uri(uri)
        store, layout = open_store(store_uri), RunLayout(run)
        key = layout.block_manifest(block_idx)
        manifest = read_manifest(store, key)
        if manifest is None:
            raise ObjectMissing(f"{key} is not there", store.uri, "check run and block, or resume the run")
        if split not in (*SPLITS, *manifest.shards):
            raise ConfigError(f"split: got {split!r}, want one of {', '.join(SPLITS)}", f"split={SPLITS[0]!r}")
        if manifest.spec is None or not manifest.shards.get(split):
            stored = ", ".join(name for name, shards in manifest.shards.items() if shards) or "none"
            raise ConfigError(
                f"block {block_idx} of run {run!r} stores no activations of split {split}, it has: {stored}",
                "choose a split that is stored, of a block that a later one reads (of all but the last where the run "
                "was started with --cache shards)",
            )
        if manifest.is_released:
            what = f"the activations of block {block_idx} of run {run!r} were released when they had been read"
            raise ObjectMissing(what, store.uri, RELEASED_FIX)
        named = replace(manifest, shards={split: manifest.shards[split]}, weights=None, objects=())
        problems = verify_manifest(store, named)
        if problems:
            raise ObjectCorrupt(f"block {block_idx}: {'; '.join(problems[:3])}", store.uri, repair_fix(store, run))
        self.spec: TensorSpec = manifest.spec
        self._store_uri, self._shards = store.uri, manifest.shards[split]
        self.paths = [join_run_uri(store.uri, shard.key) for shard in manifest.shards[split]]
        self.num_rows = manifest.num_rows(split)

    def __repr__(self) -> str:
        return f"ActivationShards({len(self.paths)} shards, {self.num_rows} rows of {self.spec})"

    def verify(self) -> None:
        """Reads every shard and compares it with what the block's manifest says.

        Who reads the Parquet files with other libraries has their page checksums only.

        Raises:
            ObjectMissing, ObjectCorrupt: a shard is damaged; names it.
        """
        store = open_store(self._store_uri)
        for shard in self._shards:
            read_shard(store, shard, self.spec)

    def decode(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Turns the bytes of a numpy batch into numbers; for `map_batches`.

        Args:
            batch: columns as Ray Data or pyarrow reads them; `tensor` holds one `bytes` per row.

        Returns:
            The same columns; `tensor` is now [N, *spec.shape] of the stored dtype, or float32 for bfloat16, which
            numpy lacks, and for uint8, whose bytes stand for other numbers. A `label` of values, which is bytes as
            well, is float32 [N, K]; a `sample`, as it was ingested and then changed for this split, is
            [N, *spec.sample.shape].

        Raises:
            DataError: there is no such column, or a row has another number of bytes.
        """
        if COLUMN not in batch:
            raise DataError(f"batch: missing column {COLUMN!r}; it has {sorted(batch)}", "read the whole shard")
        decoded = {**batch, COLUMN: _numbers(batch[COLUMN], self.spec)}
        if self.spec.sample is not None and SAMPLE_COLUMN in batch:
            decoded[SAMPLE_COLUMN] = _numbers(batch[SAMPLE_COLUMN], self.spec.sample)
        if self.spec.label_values and LABEL_COLUMN in batch:
            values = np.frombuffer(b"".join(batch[LABEL_COLUMN]), np.float32)
            decoded[LABEL_COLUMN] = values.reshape(-1, self.spec.label_values)
        return decoded

    def to_ray(self, **read_arguments: Any) -> Any:
        """Returns a `ray.data.Dataset` of the decoded shards: columns tensor, sample_id, label, and sample if
        the run stores samples.

        Endpoint and credentials of S3 come from the environment of each worker.

        Args:
            read_arguments: for `ray.data.read_parquet`.
        """
        import ray.data

        files = {} if _filesystem(self.paths[0]) is None else {"filesystem": _filesystem(self.paths[0])}
        dataset = ray.data.read_parquet(self.paths, **{**files, **read_arguments})
        return dataset.map_batches(self.decode, batch_format="numpy")


def _numbers(rows: Sequence[bytes], spec: TensorSpec) -> np.ndarray:
    flat = np.frombuffer(b"".join(rows), np.uint8)
    if len(flat) != len(rows) * spec.nbytes:
        raise DataError(
            f"batch: {len(rows)} rows have {len(flat)} bytes, want {spec.nbytes} each",
            "decode shards with the `ActivationShards` that named them",
        )
    if spec.dtype == "bfloat16":  # the upper half of a float32
        return (flat.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(-1, *spec.shape)
    stored = flat.view(spec.dtype).reshape(-1, *spec.shape)
    return stored if spec.affine is None else spec.affine.decode(stored)


def _filesystem(path: str) -> Any:
    # Arrow's own client ignores AWS_ENDPOINT_URL; the store's client goes by the same environment as the run.
    if not path.startswith("s3://"):
        return None
    from nf_pipeline.storage.s3 import connect

    return connect(path)
