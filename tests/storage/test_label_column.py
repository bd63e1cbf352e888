"""Labels of both kinds come back as they were written, and classes leave the bytes of a shard as they always were."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nf_pipeline.errors import ConfigError, InternalError, ObjectCorrupt
from nf_pipeline.storage.local import LocalStore
from nf_pipeline.storage.manifest import StageManifest
from nf_pipeline.storage.parts import Part
from nf_pipeline.storage.reader import ShardReader
from nf_pipeline.storage.shard_writer import ShardWriter
from nf_pipeline.storage.shards import TensorSpec, read_shard, rows_per_shard, shard_schema


@pytest.fixture
def store(tmp_path):
    return LocalStore(tmp_path)


def written(store, spec, num_rows=100, rows=30):
    random = np.random.default_rng(0)
    tensors = random.integers(0, 256, (num_rows, spec.nbytes), dtype=np.uint8)
    values = random.normal(size=(num_rows, spec.label_values)).astype(np.float32)
    labels = values if spec.label_values else random.integers(0, 9, num_rows)
    with ShardWriter(store, lambda idx: f"x/{idx}.parquet", spec, rows * spec.nbytes) as writer:
        for start in range(0, num_rows, 17):
            part = slice(start, start + 17)
            writer.append(tensors[part], labels[part], np.arange(num_rows)[part])
    return tensors, labels, writer.close()


@pytest.mark.parametrize("values", [1, 3])
@pytest.mark.parametrize("codec", ["none", "zstd", "lz4"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "int32", "float32"])
def test_values_of_every_tensor_type_and_codec_read_back_bit_for_bit(store, dtype, codec, values):
    spec = TensorSpec(dtype, (3, 5), codec, label_values=values)
    tensors, labels, infos = written(store, spec)
    shards = [read_shard(store, info, spec) for info in infos]

    assert [len(shard.labels) for shard in shards] == [30, 30, 30, 10]
    assert np.array_equal(np.concatenate([shard.labels for shard in shards]), labels)
    assert np.array_equal(np.concatenate([shard.tensors for shard in shards]), tensors)
    assert np.array_equal(shards[0].cut(range(4, 9)).labels, labels[4:9])


@pytest.mark.parametrize("parts", [1, 3])
def test_batches_of_values_belong_to_their_samples(store, parts):
    spec = TensorSpec("float32", (3,), label_values=2)
    tensors, labels, infos = written(store, spec)
    seen = []
    for index in range(parts):
        reader = ShardReader(store, infos, spec, batch_size=16, part=Part(index=index, count=parts))
        for batch in reader.batches(seed=1, epoch=0, shuffle=True):
            assert batch.labels.dtype == np.float32 and batch.labels.shape == (len(batch.sample_ids), 2)
            assert np.array_equal(batch.labels, labels[batch.sample_ids])
            assert np.array_equal(batch.tensors, tensors[batch.sample_ids])
            seen += batch.sample_ids.tolist()
    assert sorted(seen) == list(range(100))


def test_unknown_values_stay_unknown(store):
    spec = TensorSpec("uint8", (4,), label_values=2)
    with ShardWriter(store, lambda idx: "x", spec, 100) as writer:
        writer.append(np.zeros((2, 4), np.uint8), np.full((2, 2), np.nan, np.float32), np.arange(2))
    (info,) = writer.close()

    assert np.isnan(read_shard(store, info, spec).labels).all()


def test_other_programs_read_type_and_shape_of_values(store):
    written(store, TensorSpec("uint8", (4,), label_values=3))
    field = pq.read_schema(io.BytesIO(bytes(store.get("x/0.parquet")))).field("label")

    assert (field.type, field.nullable) == (pa.binary(12), False)
    assert (field.metadata[b"dtype"], field.metadata[b"shape"]) == (b"float32", b"[3]")


def test_shard_with_classes_has_the_bytes_of_a_plain_table_of_numbers(store):
    spec = TensorSpec("uint8", (4,))
    tensors, labels, _ = written(store, spec, num_rows=20)
    schema = pa.schema(
        [
            pa.field("tensor", pa.binary(4), False, {b"dtype": b"uint8", b"shape": b"[4]"}),
            pa.field("sample_id", pa.int64(), False),
            pa.field("label", pa.int64(), False),
        ]
    )
    table = pa.table([[bytes(row) for row in tensors], np.arange(20), labels], schema=schema)
    sink = io.BytesIO()
    pq.write_table(
        table,
        sink,
        compression="none",
        use_dictionary=False,
        data_page_size=2**31 - 1,
        max_rows_per_page=2**31 - 1,
        write_statistics=["sample_id", "label"],
        write_page_checksum=True,
    )
    assert shard_schema(spec).equals(schema, check_metadata=True)
    assert bytes(store.get("x/0.parquet")) == sink.getvalue()


def test_writer_refuses_labels_of_the_other_kind(store):
    for spec, labels in (
        (TensorSpec("uint8", (4,)), np.zeros((2, 1), np.float32)),
        (TensorSpec("uint8", (4,), label_values=1), np.zeros(2, np.int64)),
        (TensorSpec("uint8", (4,), label_values=2), np.zeros((2, 1), np.float32)),
        (TensorSpec("uint8", (4,), label_values=1), np.zeros((2, 1))),
    ):
        with pytest.raises(InternalError, match="labels: got"), ShardWriter(store, str, spec, 100) as writer:
            writer.append(np.zeros((2, 4), np.uint8), labels, np.arange(2))


@pytest.mark.parametrize("other", [0, 1, 3])
def test_reader_refuses_another_number_of_values(store, other):
    _, _, (info, *_) = written(store, TensorSpec("uint8", (4,), label_values=2))

    with pytest.raises(ObjectCorrupt, match=r"columns .*label fixed_size_binary"):
        read_shard(store, info, TensorSpec("uint8", (4,), label_values=other))


def test_manifest_says_what_labels_are():
    spec = TensorSpec("int16", (4,), label_values=2)
    manifest = StageManifest(stage="ingest", fingerprint="f", attempt="a", spec=spec)

    assert StageManifest.from_json(manifest.to_json()).spec == spec


@pytest.mark.parametrize("wrong", [-1, 2.5, True, None, 2**40])
def test_manifest_with_an_impossible_number_of_values_is_damaged(wrong):
    document = StageManifest(stage="ingest", fingerprint="f", attempt="a", spec=TensorSpec("int16", (4,))).to_json()
    document["spec"]["label_values"] = wrong

    with pytest.raises(ObjectCorrupt, match="values"):
        StageManifest.from_json(document)


def test_many_values_count_for_the_size_of_a_shard():
    assert rows_per_shard(TensorSpec("uint8", (4,), label_values=100), 4000) == 10
    assert rows_per_shard(TensorSpec("uint8", (400,), label_values=2), 4000) == 10
    with pytest.raises(ConfigError, match="values per label"):
        TensorSpec("uint8", (4,), label_values=2**30)
