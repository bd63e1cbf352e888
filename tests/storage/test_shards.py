"""Shards: what is written is read back, and anything else is noticed."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shard_rows import rows_of, shard_key

from nf_pipeline.errors import ConfigError, ObjectCorrupt, ObjectMissing
from nf_pipeline.storage import shards as shards_module
from nf_pipeline.storage.shard_writer import ShardWriter
from nf_pipeline.storage.shards import ShardInfo, TensorSpec, read_shard, spec_of_field
from nf_pipeline.storage.store import checksum_of, open_store


@pytest.mark.parametrize("dtype", ["uint8", "float16", "bfloat16", "float32"])
@pytest.mark.parametrize("codec", ["none", "zstd", "lz4"])
def test_every_dtype_and_codec_reads_back_bit_for_bit(store, dtype, codec):
    spec = TensorSpec(dtype, (2, 5, 3), codec)
    tensors, labels, sample_ids = rows_of(spec, 100)
    with ShardWriter(store, shard_key, spec, 40 * spec.nbytes) as writer:
        writer.append(tensors, labels, sample_ids)
    read = [read_shard(store, shard, spec) for shard in writer.close()]
    assert [len(shard.labels) for shard in read] == [40, 40, 20]
    assert np.array_equal(np.concatenate([shard.tensors for shard in read]), tensors)
    assert np.array_equal(np.concatenate([shard.labels for shard in read]), labels)
    assert np.array_equal(np.concatenate([shard.sample_ids for shard in read]), sample_ids)


def test_rows_keep_their_order_however_they_are_appended(store):
    spec = TensorSpec("uint8", (7,))
    tensors, labels, sample_ids = rows_of(spec, 103)
    with ShardWriter(store, shard_key, spec, 10 * 7, upload_threads=3) as writer:
        start = 0
        for size in (1, 0, 25, 9, 10, 58):
            stop = start + size
            writer.append(tensors[start:stop], labels[start:stop], sample_ids[start:stop])
            start = stop
            assert writer.num_rows == stop
    shards = writer.close()
    assert [shard.num_rows for shard in shards] == [10] * 10 + [3]
    assert [shard.key for shard in shards] == [shard_key(idx) for idx in range(11)]
    read = [read_shard(store, shard, spec) for shard in shards]
    assert np.array_equal(np.concatenate([shard.tensors for shard in read]), tensors)


def test_infos_tell_size_and_checksum_of_the_object(write):
    written = write(25)
    for shard in written.shards:
        data = written.store.get(shard.key)
        assert (shard.num_bytes, shard.checksum) == (len(data), checksum_of(data))
    assert written.store.list("") == [(shard.key, shard.num_bytes) for shard in written.shards]


def test_any_parquet_reader_understands_a_shard(store):
    spec = TensorSpec("float16", (64, 32, 32))
    with ShardWriter(store, shard_key, spec, 200 * spec.nbytes) as writer:
        writer.append(*rows_of(spec, 200))
    file = pq.ParquetFile(pa.BufferReader(store.get(shard_key(0))), page_checksum_verification=True)
    field = file.schema_arrow.field("tensor")
    assert (field.type, field.nullable) == (pa.binary(131072), False)
    assert field.metadata == {b"dtype": b"float16", b"shape": b"[64, 32, 32]"}
    assert spec_of_field(field) == spec
    groups = [file.metadata.row_group(idx) for idx in range(file.num_row_groups)]
    assert max(group.total_byte_size for group in groups) <= 8 * 2**20 + 2**16
    assert len(groups) == 4
    column = groups[0].column(0)
    assert not column.has_dictionary_page
    assert not column.is_stats_set
    assert file.read().num_rows == 200


def test_tensors_are_a_view_of_the_decoded_buffer(write):
    written = write(10)
    shard = read_shard(written.store, written.shards[0], written.spec)
    assert not shard.tensors.flags.owndata
    assert shard.tensors.flags.c_contiguous
    assert np.array_equal(shard.tensors, written.tensors)


@pytest.mark.parametrize(
    ("codec", "nbytes", "is_plain"), [("none", 65536, True), ("none", 24, True), ("zstd", 24, False)]
)
def test_rows_are_taken_out_of_the_file_where_no_codec_has_changed_them(store, codec, nbytes, is_plain):
    spec = TensorSpec("uint8", (nbytes,), codec)
    num_rows = max(300, 2**20 // nbytes)
    tensors, labels, sample_ids = rows_of(spec, num_rows)
    with ShardWriter(store, shard_key, spec, num_rows * nbytes) as writer:
        writer.append(tensors, labels, sample_ids)
    data = store.view(shard_key(0))
    store.view = lambda key: data
    shard = read_shard(store, writer.close()[0], spec, is_verified=True)
    flat = np.frombuffer(data, np.uint8)
    assert all(np.shares_memory(piece, flat) == is_plain for piece in shard.pieces)
    assert np.array_equal(np.concatenate(shard.pieces), tensors)


@pytest.mark.parametrize(
    "options",
    [
        {"data_page_size": 64},
        {"use_dictionary": True},
        {"data_page_version": "2.0"},
        {"use_dictionary": False, "column_encoding": {"tensor": "BYTE_STREAM_SPLIT"}},
        {"row_group_size": 7},
    ],
)
def test_shards_that_other_writers_laid_out_otherwise_read_the_same(store, options):
    spec = TensorSpec("uint8", (8,))
    tensors, labels, sample_ids = rows_of(spec, 5000)
    column = pa.FixedSizeBinaryArray.from_buffers(pa.binary(8), 5000, [None, pa.py_buffer(tensors)])
    table = pa.table([column, pa.array(sample_ids), pa.array(labels)], schema=shards_module.shard_schema(spec))
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **{"compression": "none", "write_batch_size": 16, **options})
    data = sink.getvalue().to_pybytes()
    store.put("x/other", data)
    info = ShardInfo(key="x/other", num_bytes=len(data), num_rows=5000, checksum=checksum_of(data))
    shard = read_shard(store, info, spec)
    assert np.array_equal(shard.tensors, tensors)
    assert np.array_equal(shard.labels, labels)


def test_missing_shard_is_named(write):
    written = write(10)
    written.store.delete([written.shards[0].key])
    with pytest.raises(ObjectMissing, match=written.shards[0].key):
        read_shard(written.store, written.shards[0], written.spec)


def test_truncated_shard_is_corrupt_with_got_and_want(write):
    written = write(10)
    (shard,) = written.shards
    written.store.put(shard.key, written.store.get(shard.key)[:-1])
    with pytest.raises(ObjectCorrupt, match=f"bytes: got {shard.num_bytes - 1}, want {shard.num_bytes}") as caught:
        read_shard(written.store, shard, written.spec)
    assert "--repair, which runs the stage again" in str(caught.value)


def test_every_flipped_bit_is_noticed(write):
    written = write(3)
    (shard,) = written.shards
    good = bytes(written.store.get(shard.key))
    for position in range(0, len(good), 37):
        bad = bytearray(good)
        bad[position] ^= 1 << position % 8
        written.store.put(shard.key, bad)
        with pytest.raises(ObjectCorrupt, match="checksum"):
            read_shard(written.store, shard, written.spec)


def test_manifest_with_another_row_count_is_noticed(write):
    written = write(10)
    with pytest.raises(ObjectCorrupt, match="rows: got 10, want 11"):
        read_shard(written.store, replace(written.shards[0], num_rows=11), written.spec)


@pytest.mark.parametrize(
    "spec", [TensorSpec("bfloat16", (3, 4)), TensorSpec("float16", (4, 3)), TensorSpec("uint8", (25,))]
)
def test_tensors_of_another_type_are_noticed(write, spec):
    written = write(10)
    with pytest.raises(ObjectCorrupt, match="tensor"):
        read_shard(written.store, written.shards[0], spec)


def test_object_that_is_no_parquet_is_corrupt_even_with_the_right_checksum(write):
    written = write(10)
    data = b"PAR1 but nothing else"
    written.store.put("x/fake", data)
    shard = replace(written.shards[0], key="x/fake", num_bytes=len(data), checksum=checksum_of(data))
    with pytest.raises(ObjectCorrupt, match="no Parquet file"):
        read_shard(written.store, shard, written.spec)


@pytest.mark.parametrize(
    ("dtype", "shape", "codec"),
    [("int8", (1,), "none"), ("uint8", (1,), "snappy"), ("uint8", (), "none"), ("uint8", (2, 0), "none")],
)
def test_impossible_spec_is_refused(dtype, shape, codec):
    with pytest.raises(ConfigError):
        TensorSpec(dtype, shape, codec)


def test_nbytes_counts_one_sample():
    assert TensorSpec("bfloat16", (64, 32, 32)).nbytes == 131072
    assert TensorSpec("uint8", (3, 32, 32)).nbytes == 3072


@pytest.mark.parametrize(
    "field",
    [
        pa.field("x", pa.binary(4)),
        pa.field("x", pa.binary(), metadata={"dtype": "uint8", "shape": "[4]"}),
        pa.field("x", pa.binary(4), metadata={"dtype": "uint8", "shape": "[5]"}),
        pa.field("x", pa.binary(4), metadata={"dtype": "uint8", "shape": "oops"}),
        pa.field("x", pa.binary(4), metadata={"dtype": "int3", "shape": "[4]"}),
        pa.field("x", pa.binary(4), metadata={"dtype": "uint8", "shape": "4"}),
    ],
)
def test_other_columns_are_no_tensor_columns(field):
    assert spec_of_field(field) is None


@pytest.mark.s3
@pytest.mark.parametrize("kind", ["minio_uri", "moto_uri"])
def test_shards_go_through_s3_with_one_put_each(kind, request):
    store = open_store(request.getfixturevalue(kind))
    spec = TensorSpec("float16", (64, 8, 8))
    tensors, labels, sample_ids = rows_of(spec, 300)
    with ShardWriter(store, shard_key, spec, 2**20) as writer:
        writer.append(tensors, labels, sample_ids)
    shards = writer.close()
    assert store.list("") == [(shard.key, shard.num_bytes) for shard in shards]
    read = np.concatenate([read_shard(store, shard, spec).tensors for shard in shards])
    assert np.array_equal(read, tensors)
