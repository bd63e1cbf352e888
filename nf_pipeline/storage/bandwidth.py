"""How fast a store takes and gives shards, measured by writing and reading some.

Writer and reader are those of training, so that encoding, checksums and decoding are in the rates. What is written is
deleted again, also after an error. Nothing is concluded here. Entries: `measure_rates`, `measure_for`.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nf_pipeline.config import RunConfig
from nf_pipeline.plans import StoreRates
from nf_pipeline.storage.reader import ShardReader
from nf_pipeline.storage.shard_writer import ShardWriter
from nf_pipeline.storage.shards import ShardInfo, TensorSpec
from nf_pipeline.storage.store import Store

NUM_SHARDS = 4
SMALL_BYTES, LARGE_BYTES = 2**19, 2**22
"""Bytes of a shard; large ones, whose rates are those of real shards, only where the small ones took `QUICK_S`."""
REPEATS = 3

QUICK_S = 1.0
LIMIT_S = 10.0
"""No repetition begins after so many seconds; a single one ends when the store's own time-outs end it."""

_SAMPLE_BYTES = 2**14
_BATCH_SIZE = 32


@dataclass(frozen=True, kw_only=True)
class _Sample:
    """One repetition: seconds of writing and reading, and CPU seconds of reading."""

    num_bytes: int
    write_s: float
    read_s: float
    read_cpu_s: float


def measure_rates(store: Store, prefix: str, *, codec: str = "none") -> StoreRates:
    """Measures a store's rates as this process sees them.

    Up to 16 MiB are written and read three times; less of it, and less often, where the store is slow. Every reading
    fetches all shards anew; a folder's come from the operating system's memory, as those of a block do that has just
    been written, as long as they fit there.

    Args:
        store: to measure.
        prefix: key below which nothing is but what is written here.
        codec: of the shards; random bytes do not get smaller, so the rates are those of the worst case.

    Raises:
        StorageError: the store cannot be written, read or deleted from.
    """
    began = time.monotonic()
    try:
        first = _sample(store, prefix, codec, SMALL_BYTES)
        size = LARGE_BYTES if first.write_s + first.read_s < QUICK_S else SMALL_BYTES
        samples = [] if size == LARGE_BYTES else [first]
        while len(samples) < REPEATS and (not samples or time.monotonic() - began < LIMIT_S):
            samples.append(_sample(store, prefix, codec, size))
    finally:
        store.delete([_key(prefix, shard_idx) for shard_idx in range(NUM_SHARDS)])
    return StoreRates(
        read_bytes_per_s=statistics.median(sample.num_bytes / sample.read_s for sample in samples),
        write_bytes_per_s=statistics.median(sample.num_bytes / sample.write_s for sample in samples),
        read_cpu_s_per_byte=statistics.median(sample.read_cpu_s / sample.num_bytes for sample in samples),
    )


def measure_for(config: RunConfig, store: Store, prefix: str) -> StoreRates | None:
    """Measures the store of a run; None where the user fixed the units: nothing is timed then, and no rate needed."""
    if config.train.unit_layers is not None:
        return None
    return measure_rates(store, prefix, codec=config.storage.codec)


def _sample(store: Store, prefix: str, codec: str, shard_bytes: int) -> _Sample:
    spec = TensorSpec("uint8", (_SAMPLE_BYTES,), codec)
    began = time.perf_counter()
    shards = _write(store, prefix, spec, shard_bytes)
    written, cpu_before = time.perf_counter(), time.process_time()
    _read(store, shards, spec)
    return _Sample(
        num_bytes=NUM_SHARDS * shard_bytes,
        write_s=written - began,
        read_s=time.perf_counter() - written,
        read_cpu_s=time.process_time() - cpu_before,
    )


def _write(store: Store, prefix: str, spec: TensorSpec, shard_bytes: int) -> Sequence[ShardInfo]:
    rows = shard_bytes // _SAMPLE_BYTES
    tensors = np.random.default_rng(0).integers(0, 256, (rows, _SAMPLE_BYTES), np.uint8)
    numbers = np.arange(rows)
    with ShardWriter(store, lambda shard_idx: _key(prefix, shard_idx), spec, shard_bytes) as writer:
        for _ in range(NUM_SHARDS):
            writer.append(tensors, numbers, numbers)
        return writer.close()


def _read(store: Store, shards: Sequence[ShardInfo], spec: TensorSpec) -> None:
    reader = ShardReader(store, shards, spec, batch_size=_BATCH_SIZE)
    for _ in reader.batches(seed=0, epoch=0, shuffle=True):
        pass


def _key(prefix: str, shard_idx: int) -> str:
    return f"{prefix}/rates-{shard_idx:05d}.parquet"
