"""Tensors, tokens and values to predict: from real Parquet files to shards, and what can be wrong with them."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_sets import encode, make_config

from nf_pipeline.data.channel_statistics import new_statistics
from nf_pipeline.data.held_out import decode_labels
from nf_pipeline.data.images import open_images, open_labelled
from nf_pipeline.data.ingest import ingest
from nf_pipeline.data.survey import survey
from nf_pipeline.driver.preview import preview
from nf_pipeline.errors import ConfigError, DataError
from nf_pipeline.samples import InputSpec, TargetSpec, inputs_of, target_of
from nf_pipeline.storage.layout import RunLayout
from nf_pipeline.storage.manifest import read_manifest, read_object
from nf_pipeline.storage.shards import TensorSpec, read_shard, shard_schema
from nf_pipeline.storage.store import open_store

LAYOUT = RunLayout("run")
RANDOM = np.random.default_rng(5)


def fixed_tensors(array):
    return pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(array))


def lists(array):
    return pa.array(array.tolist(), nested(pa.from_numpy_dtype(array.dtype), array.ndim - 1))


def nested(kind, depth):
    return kind if depth == 0 else pa.list_(nested(kind, depth - 1))


def own_bytes(array):
    return pa.array([row.tobytes() for row in array], pa.binary(array[0].nbytes))


def ray_tensors(array):
    """What Ray Data writes: lists, whose shape stands in the metadata."""
    return pa.array(array.reshape(len(array), -1).tolist(), pa.list_(pa.from_numpy_dtype(array.dtype)))


def ray_metadata(shape):
    return {
        b"ARROW:extension:name": b"ray.data.arrow_tensor_v2",
        b"ARROW:extension:metadata": str(list(shape)).encode(),
    }


def write_set(path, array, labels, make=lists, **names):
    """Row i holds array[i] and labels[i]."""
    column, field = make(array), pa.field(names.get("input", "input"), make(array[:1]).type)
    if make is own_bytes:
        metadata = shard_schema(TensorSpec(array.dtype.name, array.shape[1:])).field("tensor").metadata
        field = field.with_metadata(metadata)
    if make is ray_tensors:
        field = field.with_metadata(ray_metadata(array.shape[1:]))
    label = labels if isinstance(labels, pa.Array) else pa.array(labels)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table([column, label], schema=pa.schema([field, pa.field("label", label.type)])), path, 16)


def run_ingest(tmp_path, **data):
    store = open_store(str(tmp_path / "store"))
    list(ingest(store, LAYOUT, make_config(tmp_path / "in", **data), "00000001"))
    manifest = read_manifest(store, LAYOUT.ingest_manifest)
    return store, manifest


def stored(store, manifest):
    """All samples, labels and codes of splits, by sample id."""
    found = []
    held_out = decode_labels(read_object(store, manifest.objects[0]))
    for split, infos in manifest.shards.items():
        for info in infos:
            shard = read_shard(store, info, manifest.spec)
            labels = held_out.of(shard.sample_ids) if split == "test" else shard.labels
            tensors = shard.tensors.view(manifest.spec.dtype).reshape(-1, *manifest.spec.shape)
            found += zip(shard.sample_ids.tolist(), tensors, labels, [split] * len(labels), strict=True)
    found.sort(key=lambda row: row[0])
    _, tensors, labels, splits = zip(*found, strict=True)
    return np.stack(tensors), np.stack(labels), np.array(splits)


def numbers(dtype, shape):
    if dtype.startswith("float"):
        return RANDOM.normal(5, 2, shape).astype(dtype)
    return RANDOM.integers(0, 90, shape).astype(dtype)


@pytest.mark.parametrize(
    ("make", "dtype", "shape", "kept"),
    [
        (fixed_tensors, "float32", (2, 3, 4), "float32"),
        (fixed_tensors, "uint16", (2, 3, 4, 5), "uint16"),
        (fixed_tensors, "int16", (6,), "int16"),
        (fixed_tensors, "uint8", (2, 3, 2, 5), "uint8"),
        (fixed_tensors, "uint8", (2, 6, 7), "uint8"),
        (lists, "uint8", (5, 6, 6), "uint8"),
        (ray_tensors, "uint8", (7, 2, 7), "uint8"),
        (own_bytes, "uint8", (5, 8, 6), "uint8"),
        (lists, "float64", (3, 7), "float32"),
        (lists, "float32", (4,), "float32"),
        (lists, "uint8", (9,), "uint8"),
        (lists, "int8", (2, 4), "int16"),
        (lists, "float16", (4,), "float32"),
        (ray_tensors, "float64", (2, 3, 4), "float32"),
        (ray_tensors, "int16", (5, 6), "int16"),
        (own_bytes, "float32", (2, 5), "float32"),
        (own_bytes, "uint16", (1, 4, 4), "uint16"),
    ],
)
def test_tensors_of_every_type_rank_and_column_are_stored_as_they_are(tmp_path, make, dtype, shape, kept):
    array = numbers(dtype, (60, *shape))
    write_set(tmp_path / "in/a.parquet", array, np.arange(60) % 3, make)

    store, manifest = run_ingest(tmp_path)
    got, labels, splits = stored(store, manifest)

    np.testing.assert_array_equal(got, array.astype(kept))
    assert labels.tolist() == (np.arange(60) % 3).tolist()
    inputs, train = inputs_of(manifest.facts), array[splits == "train"].astype(np.float64)
    axes = (0, *range(2, train.ndim))
    assert (inputs.shape, inputs.dtype, inputs.num_tokens) == (shape, kept, 0)
    np.testing.assert_allclose(inputs.mean, train.mean(axis=axes), rtol=1e-6)
    np.testing.assert_allclose(inputs.std, np.maximum(train.std(axis=axes), 0), rtol=1e-6)
    assert target_of(manifest.facts) == TargetSpec(size=3)


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint32"])
@pytest.mark.parametrize(("given", "found"), [(None, 91), (200, 200)])
def test_tokens_are_stored_as_int32_with_their_number(tmp_path, dtype, given, found):
    array = numbers(dtype, (60, 8))
    array[7, 3] = 90
    write_set(tmp_path / "in/a.parquet", array, ["b", "a"] * 30, input="tokens")

    store, manifest = run_ingest(tmp_path, **({} if given is None else {"num_tokens": given}))

    np.testing.assert_array_equal(stored(store, manifest)[0], array)
    assert inputs_of(manifest.facts) == InputSpec(shape=(8,), dtype="int32", num_tokens=found)
    assert manifest.facts["class_names"] == ["a", "b"]


LABELS = {
    "floats": (pa.array(RANDOM.normal(3, 2, 60), pa.float64()), 1),
    "half": (pa.array(RANDOM.normal(3, 2, 60).astype(np.float16)), 1),
    "lists": (lists(RANDOM.normal(3, 2, (60, 3)).astype(np.float32)), 3),
    "whole-lists": (lists(RANDOM.integers(-9, 9, (60, 2))), 2),
    "tensors": (fixed_tensors(RANDOM.normal(3, 2, (60, 4)).astype(np.float32)), 4),
}


def plain(labels):
    values = labels.storage if isinstance(labels, pa.ExtensionArray) else labels
    return np.array(values.to_pylist(), np.float32).reshape(len(labels), -1)


@pytest.mark.parametrize(("labels", "size"), LABELS.values(), ids=LABELS)
def test_values_to_predict_are_stored_beside_their_samples(tmp_path, labels, size):
    array = numbers("float32", (60, 2, 4))
    write_set(tmp_path / "in/a.parquet", array, labels)

    store, manifest = run_ingest(tmp_path, val_fraction=0.2, test_fraction=0.3)
    got, values, splits = stored(store, manifest)

    np.testing.assert_array_equal(got, array)
    np.testing.assert_array_equal(values, plain(labels))
    assert manifest.facts["split_rows"] == {"train": 34, "val": 8, "test": 18}
    assert manifest.facts["class_names"] == []
    assert manifest.spec.label_values == size
    target, train = target_of(manifest.facts), plain(labels)[splits == "train"].astype(np.float64)
    assert (target.kind, target.size) == ("values", size)
    np.testing.assert_allclose(target.mean, train.mean(axis=0), rtol=1e-9)
    np.testing.assert_allclose(target.std, train.std(axis=0), rtol=1e-9)
    for split, infos in manifest.shards.items():
        unknown = [np.isnan(read_shard(store, info, manifest.spec).labels).all() for info in infos]
        assert all(unknown) == (split == "test") == any(unknown)


def test_splits_of_values_follow_the_seed(tmp_path):
    labels = pa.array(RANDOM.normal(size=60))
    write_set(tmp_path / "in/a.parquet", numbers("float32", (60, 4)), labels)
    found = []
    for name in ("one", "other"):
        store = open_store(str(tmp_path / name))
        list(ingest(store, LAYOUT, make_config(tmp_path / "in", max_train_images=20), "00000001"))
        found.append(stored(store, read_manifest(store, LAYOUT.ingest_manifest))[2].tolist())

    assert found[0] == found[1]
    assert {split: found[0].count(split) for split in ("train", "val", "test")} == {"train": 18, "val": 2, "test": 6}


def test_value_that_never_changes_has_the_standard_deviation_one(tmp_path):
    labels = np.stack([np.full(60, 0.1), RANDOM.normal(size=60)], axis=1).astype(np.float32)
    write_set(tmp_path / "in/a.parquet", numbers("float32", (60, 4)), lists(labels))

    _, manifest = run_ingest(tmp_path)

    assert target_of(manifest.facts).std[0] == 1.0
    assert target_of(manifest.facts).std[1] != 1.0


@pytest.mark.parametrize(
    ("labels", "target", "kind"),
    [
        (pa.array(np.arange(60) % 3), "values", TargetSpec(kind="values", size=1)),
        (pa.array(np.arange(60) % 3.0), "class", TargetSpec(size=3)),
        (pa.array(np.arange(60) % 3.0), "auto", TargetSpec(kind="values", size=1)),
    ],
)
def test_target_says_what_numbers_are(tmp_path, labels, target, kind):
    write_set(tmp_path / "in/a.parquet", numbers("float32", (60, 4)), labels)

    store, manifest = run_ingest(tmp_path, target=target)

    found = target_of(manifest.facts)
    assert (found.kind, found.size) == (kind.kind, kind.size)
    assert stored(store, manifest)[1].ravel().tolist() == labels.to_pylist()


def with_row(labels, row, value):
    return pa.array([value if idx == row else label for idx, label in enumerate(labels.to_pylist())], labels.type)


FLOATS, TRIPLES = LABELS["floats"][0], LABELS["lists"][0]


@pytest.mark.parametrize(
    ("labels", "target", "text"),
    [
        (with_row(FLOATS, 7, None), "auto", "label is null"),
        (with_row(FLOATS, 7, np.nan), "auto", r"label \[nan\] is not finite"),
        (with_row(FLOATS, 7, -np.inf), "auto", r"label \[-inf\] is not finite"),
        (with_row(FLOATS, 7, 1e300), "auto", r"label \[1e\+300\] is not finite, or too large for float32"),
        (with_row(TRIPLES, 7, None), "auto", "label is null"),
        (with_row(TRIPLES, 7, [1.0, 2.0]), "auto", "2 values, want 3 as in the first row"),
        (with_row(TRIPLES, 7, [1.0, None, 2.0]), "auto", "label has a null inside"),
        (with_row(TRIPLES, 7, [1.0, np.nan, 2.0]), "auto", "is not finite"),
        (with_row(pa.array([1.0] * 60), 7, 0.5), "class", r"label \[0.5\], want the number of a class"),
        (with_row(pa.array([1.0] * 60), 7, 1e30), "class", "want the number of a class"),
    ],
)
def test_label_that_cannot_be_used_is_named(tmp_path, labels, target, text):
    write_set(tmp_path / "in/a.parquet", numbers("float32", (60, 4)), labels)

    with pytest.raises(DataError, match=rf"a.parquet, row 7, column 'label': .*{text}"):
        run_ingest(tmp_path, target=target)


def test_named_classes_are_no_values(tmp_path):
    write_set(tmp_path / "in/a.parquet", numbers("float32", (60, 4)), ["b", "a"] * 30)

    with pytest.raises(DataError, match="one of 2 named classes, want values"):
        run_ingest(tmp_path, target="values")


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        (np.arange(60), "whole numbers"),
        (lists(np.ones((60, 2))), r"2 value\(s\) in each row"),
        (["a", "b"] * 30, "text"),
    ],
    ids=["whole", "pairs", "text"],
)
def test_files_with_other_labels_are_an_error(tmp_path, labels, text):
    write_set(tmp_path / "in/a.parquet", numbers("float32", (60, 4)), FLOATS)
    write_set(tmp_path / "in/b.parquet", numbers("float32", (60, 4)), labels)

    with pytest.raises(DataError, match=r"some files hold .* and others ") as caught:
        run_ingest(tmp_path)
    assert caught.match(text) and caught.match(r"1 value\(s\) in each row")


def cells(rows, kind="float32"):
    lists_of_kind = pa.list_(pa.type_for_alias(kind))
    return lambda array: pa.array([rows.get(idx, row) for idx, row in enumerate(array.tolist())], lists_of_kind)


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ({9: [1.0, np.nan, 0.0, 0.0]}, "it holds NaN, or numbers that are infinite"),
        ({9: [1.0, np.inf, 0.0, 0.0]}, "it holds NaN, or numbers that are infinite"),
        ({9: [1.0, None, 0.0, 0.0]}, "it has a null inside"),
        ({9: None}, "it is null"),
        ({9: []}, "it is empty"),
    ],
)
def test_bad_tensor_ends_the_run_or_is_skipped(tmp_path, rows, reason):
    write_set(tmp_path / "in/a.parquet", numbers("float32", (60, 4)), FLOATS, cells(rows))

    with pytest.raises(DataError, match=rf"a.parquet, row 9, column 'input': the sample cannot be read: {reason}"):
        run_ingest(tmp_path)
    _, manifest = run_ingest(tmp_path, on_bad_image="skip")

    assert manifest.facts["num_skipped"] == 1
    assert sum(manifest.facts["split_rows"].values()) == 59


@pytest.mark.parametrize(
    ("array", "make", "data", "text"),
    [
        (
            numbers("int64", (60, 4)) + 1,
            cells({9: [0, -1, 2, 3]}, "int64"),
            {},
            "row 9.*token -1, want 0 to",
        ),
        (numbers("int64", (60, 4)), lists, {"num_tokens": 3}, r"row \d+, column 'input': token \d+, want 0 to 2"),
        (
            numbers("int64", (60, 4)),
            cells({9: [0, 1]}, "int64"),
            {},
            r"row 9.*its shape is \(2,\).*\(4,\)",
        ),
        (numbers("float32", (60, 4)), cells({9: [0.0]}), {}, r"row 9.*its shape is \(1,\), want \(4,\)"),
        (numbers("int64", (60, 2, 3)), lists, {}, r"row \d.*int64 of shape \(2, 3\) would be tokens"),
        (numbers("uint8", (60, 7, 7, 5)), lists, {}, r"row \d.*uint8 of shape \(7, 7, 5\): .*these could be last"),
        (
            numbers("uint8", (60, 5, 7, 7)),
            lists,
            {"image_size": 7},
            "data.image_size is 7, and it is a tensor: uint8",
        ),
        (numbers("float32", (60, 4)), lists, {"image_size": 8}, "data.image_size is 8, and it is a tensor"),
        (numbers("float32", (60, 4)), lists, {"num_tokens": 8}, "data.num_tokens is 8, and the numbers are float32"),
    ],
    ids=["negative", "too-large", "ragged-tokens", "ragged", "rank", "last", "scaled", "resized", "counted"],
)
def test_tensor_that_does_not_fit_is_named(tmp_path, array, make, data, text):
    write_set(tmp_path / "in/a.parquet", array, FLOATS, make)

    with pytest.raises(DataError, match=f"a.parquet, {text}" if text.startswith("row") else text) as caught:
        run_ingest(tmp_path, **data)
    assert "Fix:" in str(caught.value)


def test_run_of_shards_is_a_data_set_again(tmp_path):
    array, labels = numbers("float32", (60, 2, 3)), RANDOM.normal(size=(60, 2)).astype(np.float32)
    write_set(tmp_path / "in/a.parquet", array, lists(labels))
    store, manifest = run_ingest(tmp_path)
    (tmp_path / "again").mkdir()
    (info,) = manifest.shards["train"]
    (tmp_path / "again/a.parquet").write_bytes(bytes(store.get(info.key)))

    batches = open_labelled(
        make_config(tmp_path / "again").data, inputs_of(manifest.facts), target_of(manifest.facts), ()
    )
    shard = read_shard(store, info, manifest.spec)
    (batch,) = batches
    np.testing.assert_array_equal(batch.labels, shard.labels)
    np.testing.assert_array_equal(batch.images.reshape(len(shard.labels), -1).view(np.uint8), shard.tensors)


def test_model_of_values_takes_only_as_many_values(tmp_path):
    write_set(tmp_path / "in/a.parquet", numbers("float32", (60, 4)), TRIPLES)
    data, inputs = make_config(tmp_path / "in").data, InputSpec(shape=(4,), dtype="float32")

    with pytest.raises(DataError, match=r"3 value\(s\), the model predicts 2"):
        list(open_labelled(data, inputs, TargetSpec(kind="values", size=2), ()))
    with pytest.raises(DataError, match="it holds float32, want int16"):
        list(open_images(data, InputSpec(shape=(4,), dtype="int16")))


def test_image_for_a_model_of_tensors_is_an_error(tmp_path):
    (tmp_path / "x.png").write_bytes(encode(np.zeros((6, 6), np.uint8)))

    with pytest.raises(DataError, match=r"x.png: it is an image, want float32 of shape \(4,\)"):
        list(open_images(make_config(tmp_path / "x.png").data, InputSpec(shape=(4,), dtype="float32")))


def test_small_file_with_many_repeated_values_is_refused(tmp_path):
    flat = pa.array(np.zeros(2**22))
    labels = pa.ListArray.from_arrays(pa.array(np.arange(0, 2**22 + 1, 2**17), pa.int32()), flat)
    write_set(tmp_path / "in/a.parquet", numbers("float32", (32, 4)), pa.concat_arrays([labels]))
    table = pq.read_table(tmp_path / "in/a.parquet")
    pq.write_table(pa.concat_tables([table] * 8), tmp_path / "in/a.parquet", compression="zstd")

    with pytest.raises(DataError, match=r"would take .* in memory, want at most 1000 times its size"):
        run_ingest(tmp_path)


def test_labels_are_never_taken_for_the_samples(tmp_path):
    columns = {"first": pa.array([0.5] * 20), "target": pa.array([[1.0, 2.0]] * 20)}
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "in" / "set.parquet")
    with pytest.raises(DataError, match=r"set.parquet: column 'target' has the labels"):
        run_ingest(tmp_path)


def test_plan_of_tokens_asks_for_their_number_that_only_reading_all_would_tell(tmp_path):
    write_set(tmp_path / "in" / "set.parquet", RANDOM.integers(0, 50, (40, 6)).astype(np.int32), [0, 1] * 20)
    with pytest.raises(ConfigError, match=r"data\.num_tokens"):
        preview(make_config(tmp_path / "in"))


@pytest.mark.parametrize(("dtype", "item_bytes"), [("float32", 4), ("int16", 2)])
def test_plan_counts_the_bytes_of_samples_by_their_type(tmp_path, dtype, item_bytes):
    write_set(tmp_path / "in" / "set.parquet", RANDOM.normal(0, 9, (60, 2, 8)).astype(dtype), [0, 1] * 30)
    previewed = preview(make_config(tmp_path / "in"))
    rows = survey(previewed.config).split_rows
    assert previewed.image_bytes == (rows["train"] + rows["val"]) * 2 * 8 * item_bytes


def test_many_uint8_features_have_the_statistics_of_their_own(tmp_path):
    array = RANDOM.integers(0, 256, (60, 300)).astype(np.uint8)
    inputs = InputSpec(shape=(300,), dtype="uint8")
    found = new_statistics(inputs)
    found.add(array)
    np.testing.assert_allclose(found.mean(), array.mean(axis=0))
    np.testing.assert_allclose(found.std(), array.std(axis=0))
