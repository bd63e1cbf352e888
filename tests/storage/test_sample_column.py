"""Samples that are stored beside activations stay with their rows, in shards, in batches and in manifests."""

import io
from dataclasses import dataclass, replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from nf_pipeline.errors import ConfigError, InternalError, ObjectCorrupt
from nf_pipeline.storage import shard_writer as writer_module
from nf_pipeline.storage.affine import Affine
from nf_pipeline.storage.local import LocalStore
from nf_pipeline.storage.manifest import StageManifest
from nf_pipeline.storage.parts import Part
from nf_pipeline.storage.reader import ShardReader
from nf_pipeline.storage.shard_writer import ShardWriter
from nf_pipeline.storage.shards import ShardInfo, TensorSpec, read_shard, rows_per_shard, shard_schema, spec_of_field

PIXELS = TensorSpec("uint8", (1, 4, 5))
SPEC = TensorSpec("float16", (3, 4), sample=PIXELS)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What was written: row i has sample id i."""

    infos: list[ShardInfo]
    tensors: np.ndarray
    samples: np.ndarray


@pytest.fixture
def store(tmp_path):
    return LocalStore(tmp_path)


def written(store, spec=SPEC, num_rows=100, rows=30):
    random = np.random.default_rng(0)
    tensors = random.integers(0, 256, (num_rows, spec.nbytes), dtype=np.uint8)
    samples = random.integers(0, 256, (num_rows, spec.sample.nbytes), dtype=np.uint8)
    ids = np.arange(num_rows)
    with ShardWriter(store, lambda idx: f"x/{idx}.parquet", spec, rows * spec.tensor_bytes) as writer:
        for start in range(0, num_rows, 17):
            part = slice(start, start + 17)
            writer.append(tensors[part], ids[part] % 3, ids[part], samples[part])
    return Rows(infos=writer.close(), tensors=tensors, samples=samples)


@pytest.mark.parametrize("several_groups", [False, True])
@pytest.mark.parametrize("codec", ["none", "zstd", "lz4"])
@pytest.mark.parametrize("sample", [PIXELS, TensorSpec("int32", (70,)), TensorSpec("float32", (2,))])
def test_both_tensors_of_a_row_read_back_bit_for_bit(store, monkeypatch, codec, sample, several_groups):
    spec = TensorSpec("bfloat16", (3, 5), codec, label_values=0, sample=sample)
    if several_groups:
        monkeypatch.setattr(writer_module, "ROW_GROUP_BYTES", 7 * spec.row_bytes)
    rows = written(store, spec)
    shards = [read_shard(store, info, spec) for info in rows.infos]

    assert [len(shard.labels) for shard in shards] == [30, 30, 30, 10]
    assert np.array_equal(np.concatenate([shard.tensors for shard in shards]), rows.tensors)
    assert np.array_equal(np.concatenate([shard.samples for shard in shards]), rows.samples)
    cut = shards[1].cut(range(3, 17))
    assert np.array_equal(cut.samples, rows.samples[33:47]) and np.array_equal(cut.tensors, rows.tensors[33:47])
    assert len(cut.sample_pieces) == len(cut.pieces)


def test_neither_column_is_decoded_or_copied_without_a_codec(store, monkeypatch):
    monkeypatch.setattr(writer_module, "ROW_GROUP_BYTES", 7 * SPEC.row_bytes)
    rows, seen = written(store), []
    real = pq.ParquetFile.read
    monkeypatch.setattr(
        pq.ParquetFile, "read", lambda *args, **named: seen.append(named["columns"]) or real(*args, **named)
    )
    shard = read_shard(store, rows.infos[0], SPEC)

    assert seen == [["sample_id", "label"]]
    assert len(shard.pieces) == len(shard.sample_pieces) == 5
    assert not any(piece.flags.owndata for piece in (*shard.pieces, *shard.sample_pieces))


@pytest.mark.parametrize("codec", ["none", "zstd"])
@pytest.mark.parametrize("parts", [1, 3])
def test_samples_of_a_shuffled_batch_belong_to_its_ids(store, monkeypatch, codec, parts):
    spec = replace(SPEC, codec=codec)
    monkeypatch.setattr(writer_module, "ROW_GROUP_BYTES", 7 * spec.row_bytes)
    rows = written(store, spec, num_rows=200, rows=23)
    for epoch in range(2):
        seen, held = [], []
        for index in range(parts):
            part = Part(index=index, count=parts)
            reader = ShardReader(store, rows.infos, spec, batch_size=9, part=part, window_shards=2)
            for batch in reader.batches(seed=1, epoch=epoch, shuffle=True):
                assert batch.samples.ctypes.data % 64 == 0 and batch.samples.flags.c_contiguous
                seen += batch.sample_ids.tolist()
                held.append((batch.samples[:3], batch.sample_ids[:3]))  # keeps that memory from being used again
                assert np.array_equal(batch.samples, rows.samples[batch.sample_ids])
                assert np.array_equal(batch.tensors, rows.tensors[batch.sample_ids])
        assert sorted(seen) == list(range(200)) != seen
        assert all(np.array_equal(samples, rows.samples[ids]) for samples, ids in held)


def test_batches_without_samples_have_none(store):
    with ShardWriter(store, str, PIXELS, 100) as writer:
        writer.append(np.zeros((5, PIXELS.nbytes), np.uint8), np.arange(5), np.arange(5))
    infos = writer.close()

    (batch,) = ShardReader(store, infos, PIXELS, batch_size=9).batches(seed=0, epoch=0, shuffle=False)
    assert batch.samples is None and read_shard(store, infos[0], PIXELS).samples is None


def test_shard_without_the_samples_that_its_manifest_names_is_damaged(store):
    rows = written(store)
    plain = replace(SPEC, sample=None)
    with ShardWriter(store, lambda idx: "plain", plain, 10**6) as writer:
        writer.append(rows.tensors, np.arange(100), np.arange(100))
    (info,) = writer.close()

    with pytest.raises(ObjectCorrupt, match=r"shard plain .*want .*, sample fixed_size_binary\[20\]"):
        read_shard(store, info, SPEC)
    with pytest.raises(ObjectCorrupt, match=r"columns .*, sample fixed_size_binary\[20\], want tensor"):
        read_shard(store, rows.infos[0], plain)


@pytest.mark.parametrize("other", [TensorSpec("int16", (1, 2, 5)), TensorSpec("uint8", (20,))])
def test_samples_of_another_form_are_damage_that_names_the_column(store, other):
    rows = written(store)
    with pytest.raises(ObjectCorrupt, match="sample type: got"):
        read_shard(store, rows.infos[0], replace(SPEC, sample=other))


def test_other_programs_read_type_and_shape_of_samples(store):
    written(store)
    field = pq.read_schema(io.BytesIO(bytes(store.get("x/0.parquet")))).field("sample")

    assert spec_of_field(field) == PIXELS and not field.nullable


def test_both_tensors_count_for_the_size_of_a_shard(store):
    assert (SPEC.nbytes, SPEC.tensor_bytes, SPEC.row_bytes) == (24, 44, 60)
    assert rows_per_shard(SPEC, 440) == 10
    assert rows_per_shard(replace(SPEC, sample=None), 440) == 18
    assert [info.num_rows for info in written(store, num_rows=25, rows=10).infos] == [10, 10, 5]


@pytest.mark.parametrize(
    ("spec", "samples"),
    [
        pytest.param(SPEC, None, id="missing"),
        pytest.param(PIXELS, np.zeros((2, 20), np.uint8), id="not asked for"),
        pytest.param(SPEC, np.zeros((2, 24), np.uint8), id="another width"),
        pytest.param(SPEC, np.zeros((3, 20), np.uint8), id="another number"),
        pytest.param(SPEC, np.zeros((2, 20), np.int8), id="another type"),
    ],
)
def test_writer_refuses_samples_that_are_not_what_the_spec_says(store, spec, samples):
    with pytest.raises(InternalError, match="samples: got"), ShardWriter(store, str, spec, 100) as writer:
        writer.append(np.zeros((2, spec.nbytes), np.uint8), np.arange(2), np.arange(2), samples)


@pytest.mark.parametrize(
    "sample",
    [
        TensorSpec("uint8", (4,), "zstd"),
        TensorSpec("uint8", (4,), affine=Affine((1.0,) * 4, (0,) * 4)),
        TensorSpec("uint8", (4,), label_values=1),
        SPEC,
    ],
)
def test_sample_has_a_type_and_a_shape_and_nothing_else(sample):
    with pytest.raises(ConfigError, match="tensor sample: got"):
        TensorSpec("float16", (4,), sample=sample)


def manifest_of(spec):
    return StageManifest(stage="ingest", fingerprint="f", attempt="a", spec=spec)


def test_manifest_says_what_is_stored_beside_activations_and_an_old_one_has_nothing():
    assert StageManifest.from_json(manifest_of(SPEC).to_json()).spec == SPEC
    old = manifest_of(PIXELS).to_json()
    del old["spec"]["sample"]

    assert StageManifest.from_json(old).spec == PIXELS
    assert "sample" not in shard_schema(PIXELS).names


@pytest.mark.parametrize(
    "wrong", [7, [], {}, {"dtype": "uint8"}, {"dtype": "x", "shape": [4]}, {"dtype": "uint8", "shape": [0]}]
)
def test_manifest_with_a_sample_that_cannot_be_is_damaged(wrong):
    document = manifest_of(SPEC).to_json()
    document["spec"]["sample"] = wrong

    with pytest.raises(ObjectCorrupt, match="spec"):
        StageManifest.from_json(document)
