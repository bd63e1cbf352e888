"""Whatever a shard or a file of weights holds, it is read as its manifest says or refused as damaged."""

import io
import json
import struct
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cases import documented, fuzz, tried
from hypothesis import strategies as st
from junk import as_json, damaged, odd_json

from nf_pipeline.errors import ObjectCorrupt
from nf_pipeline.storage.shards import Shard, ShardInfo, TensorSpec, read_shard, shard_schema
from nf_pipeline.storage.store import checksum_of

SPEC = TensorSpec("uint8", (2, 3))
WITH_SAMPLES = TensorSpec("uint8", (2, 3), sample=TensorSpec("int16", (2,)))


class OneObject:
    """A store that holds one object under every key."""

    uri = "memory"

    def __init__(self, data: bytes) -> None:
        self._data = data

    def get(self, key: str) -> bytes:
        """Returns the object."""
        return self._data


def shard_table(rows: int = 5, spec: TensorSpec = SPEC) -> pa.Table:
    tensors = pa.array([bytes([row % 256]) * spec.nbytes for row in range(rows)], pa.binary(spec.nbytes))
    numbers = pa.array(range(rows), pa.int64())
    samples = [pa.array([bytes(spec.sample.nbytes)] * rows, pa.binary(spec.sample.nbytes))] if spec.sample else []
    return pa.table([tensors, numbers, numbers, *samples], schema=shard_schema(spec))


def written(table: pa.Table, **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    return sink.getvalue()


def read(data: bytes, rows: int, spec: TensorSpec = SPEC) -> Any:
    """Reads bytes whose size and checksum agree with the manifest: an editor could have seen to that."""
    info = ShardInfo(key="run/x", num_bytes=len(data), num_rows=rows, checksum=checksum_of(data))
    outcome = documented(lambda: read_shard(OneObject(data), info, spec))
    assert isinstance(outcome, Shard | ObjectCorrupt), outcome
    if isinstance(outcome, Shard):
        assert outcome.tensors.shape == (rows, spec.nbytes)
        assert (outcome.samples is None) == (spec.sample is None)
        assert spec.sample is None or outcome.samples.shape == (rows, spec.sample.nbytes)
        assert outcome.labels.shape == outcome.sample_ids.shape == (rows,)
        assert outcome.labels.dtype == outcome.sample_ids.dtype == np.int64
    return outcome


def good(spec: TensorSpec) -> list[bytes]:
    plain = {"use_dictionary": False, "compression": "none"}
    return [written(shard_table(spec=spec), **options) for options in ({}, {"compression": "zstd"}, plain)]


GOOD = good(SPEC)


@fuzz(
    "shards: damaged",
    quick=400,
    thorough=40_000,
    shard=st.one_of(
        st.tuples(st.just(SPEC), st.sampled_from(GOOD).flatmap(damaged)),
        st.tuples(st.just(WITH_SAMPLES), st.sampled_from(good(WITH_SAMPLES)).flatmap(damaged)),
        st.tuples(st.just(SPEC), st.binary(max_size=100)),
    ),
)
def test_fuzz_shard_with_damage_is_read_or_refused(shard: tuple[TensorSpec, bytes]) -> None:
    spec, data = shard
    read(data, 5, spec)


@pytest.mark.parametrize("spec", [SPEC, WITH_SAMPLES])
def test_shard_with_a_changed_number_anywhere_in_its_footer_is_read_or_refused(spec: TensorSpec) -> None:
    data = good(spec)[-1]
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    for position in range(footer, len(data) - 8):
        changed = bytearray(data)
        changed[position] ^= 1  # among them the codec, to one that there is not
        read(bytes(changed), 5, spec)
        tried("shards: footers")


columns = st.sampled_from(
    [
        pa.array([b"123456"] * 5, pa.binary(6)),
        pa.array([b"123456", None] * 2 + [b"123456"], pa.binary(6)),
        pa.array([b"123456"] * 5),
        pa.array([b"12345"] * 5, pa.binary(5)),
        pa.array(range(5)),
        pa.array([1, None, 2, 3, 4]),
        pa.array([1.5] * 5),
        pa.array(range(5), pa.int32()),
        pa.array(["x"] * 5),
        pa.array([[1]] * 5),
        pa.array([{"a": 1}] * 5),
        pa.array([None] * 5),
        pa.array([1, 1, 2, 2, 1]).dictionary_encode(),
        pa.array([b"123456"] * 5, pa.binary(6)).dictionary_encode(),
    ]
)
types = st.one_of(
    st.just({b"dtype": b"uint8", b"shape": b"[2, 3]"}),
    st.fixed_dictionaries(
        {
            b"dtype": st.sampled_from([b"uint8", b"float16", b"x", b"\xff"]),
            b"shape": st.one_of(
                odd_json.map(as_json), st.binary(max_size=8), st.just(b"[2, 3, 0]"), st.just(b"[" * 9000)
            ),
        }
    ),
    st.none(),
)


@fuzz(
    "shards: other columns",
    quick=300,
    thorough=6_000,
    arrays=st.tuples(columns, columns, columns),
    metadata=types,
    nullable=st.booleans(),
    names=st.sampled_from(
        [
            ("tensor", "sample_id", "label"),
            ("tensor", "label", "sample_id"),
            ("tensor", "tensor", "label"),
            ("a", "b", "c"),
        ]
    ),
)
def test_fuzz_shard_with_other_columns_is_refused(
    arrays: tuple[Any, ...], metadata: Any, nullable: bool, names: tuple[str, ...]
) -> None:
    fields = [
        pa.field(name, array.type, nullable or array.null_count > 0)
        for name, array in zip(names, arrays, strict=True)
    ]
    fields[0] = fields[0].with_metadata(metadata)
    try:
        data = written(pa.table(list(arrays), schema=pa.schema(fields)))
    except (pa.ArrowException, ValueError):
        return
    read(data, 5)


specs = st.tuples(
    st.sampled_from(["uint8", "float32", "bfloat16"]),
    st.lists(st.sampled_from([1, 2, 3, 6, 2**20, 2**31, 2**40, 2**70]), min_size=1, max_size=4),
)


@fuzz(
    "shards: sizes claimed",
    quick=200,
    thorough=4_000,
    spec=specs,
    rows=st.sampled_from([0, 1, 5, 6, 2**31, 2**40, 2**62]),
)
def test_fuzz_shard_whose_manifest_claims_other_sizes_is_refused(spec: tuple[str, list[int]], rows: int) -> None:
    claimed = documented(lambda: TensorSpec(spec[0], tuple(spec[1])))
    if isinstance(claimed, TensorSpec):
        read(GOOD[0], rows, claimed)


def test_shard_that_claims_a_trillion_rows_is_refused_without_decoding() -> None:
    outcome = read(GOOD[0], 2**40)
    assert isinstance(outcome, ObjectCorrupt) and "rows: got 5, want 1099511627776" in str(outcome)


def test_shard_with_a_null_is_refused() -> None:
    schema = shard_schema(SPEC)
    table = shard_table().set_column(2, pa.field("label", pa.int64()), pa.array([1, None, 2, 3, 4]))
    data = written(table)
    tried("shards: nulls")
    outcome = read(data, 5)
    assert isinstance(outcome, ObjectCorrupt) and schema is not None


def test_tensor_of_more_bytes_than_a_column_can_count_is_no_spec() -> None:
    from nf_pipeline.errors import ConfigError

    with pytest.raises(ConfigError, match="at most 2147483647 bytes per sample"):
        TensorSpec("float32", (2**30,))


def safetensors_file(header: Any, body: bytes = b"\0" * 64) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body
