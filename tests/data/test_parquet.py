import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cifar10 import require_cifar10
from image_sets import images, write_parquet

from nf_pipeline.config import DataConfig
from nf_pipeline.data.classes import read_labels
from nf_pipeline.data.decode import decode_image
from nf_pipeline.data.sources import open_source
from nf_pipeline.errors import DataError, StorageError
from nf_pipeline.storage.store import open_store


def source_of(path, **settings):
    return open_source(DataConfig(source=str(path), **settings))


def everything(source, split, seed=None):
    return list(source.read(split, np.ones(source.num_rows(split), bool), seed))


def names_metadata(*names):
    document = {"info": {"features": {"label": {"names": list(names), "_type": "ClassLabel"}}}}
    return {b"huggingface": json.dumps(document).encode()}


def test_splits_come_from_file_and_folder_names(tmp_path):
    for name in ("train-00000-of-00002", "data/train-00001-of-00002", "validation", "test/0001"):
        write_parquet(tmp_path / f"{name}.parquet", images(4), [0, 1, 0, 1])

    source = source_of(tmp_path)

    assert source.splits == ("train", "val", "test")
    assert [source.num_rows(split) for split in source.splits] == [8, 4, 4]
    assert source.where("train", 5, "image") == "train-00000-of-00002.parquet, row 1, column 'image'"


def test_files_without_split_names_are_train(tmp_path):
    write_parquet(tmp_path / "a.parquet", images(3), [0, 1, 0])
    write_parquet(tmp_path / "b.parquet", images(3), [1, 1, 0])

    source = source_of(tmp_path)

    assert source.splits == ("train",)
    assert source.labels("train").tolist() == [0, 1, 0, 1, 1, 0]


def test_one_file_is_train_whatever_its_name(tmp_path):
    write_parquet(tmp_path / "test.parquet", images(3), [0, 1, 0])

    assert source_of(tmp_path / "test.parquet").splits == ("train",)
    assert source_of(f"file://{tmp_path}/test.parquet").num_rows("train") == 3


def test_a_file_without_split_name_beside_named_ones_is_refused(tmp_path):
    write_parquet(tmp_path / "train.parquet", images(3), [0, 1, 0])
    write_parquet(tmp_path / "extra.parquet", images(3), [0, 1, 0])

    with pytest.raises(DataError, match=r"extra.parquet in .*tells no split"):
        source_of(tmp_path)


def test_hidden_files_are_no_data(tmp_path):
    write_parquet(tmp_path / "a.parquet", images(3), [0, 1, 0])
    write_parquet(tmp_path / "_tmp/b.parquet", images(3), [0, 1, 0])
    write_parquet(tmp_path / ".c.parquet", images(3), [0, 1, 0])

    assert source_of(tmp_path).num_rows("train") == 3


def test_wanted_rows_come_in_stored_order_with_their_images(tmp_path):
    write_parquet(tmp_path / "a.parquet", images(50), [0, 1] * 25)
    write_parquet(tmp_path / "b.parquet", images(30), [0, 1] * 15)
    source = source_of(tmp_path)
    wanted = np.zeros(80, bool)
    wanted[[3, 16, 49, 50, 79]] = True

    got = {row: decode_image(cell)[0, 0, 0] for row, cell in source.read("train", wanted, None)}

    assert got == {3: 3, 16: 16, 49: 49, 50: 0, 79: 29}


def test_shuffled_rows_are_the_same_rows_in_an_order_that_the_seed_decides(tmp_path):
    write_parquet(tmp_path / "a.parquet", images(200), [0, 1] * 100, row_group_size=20)
    source = source_of(tmp_path)

    first, again, other = ([row for row, _ in everything(source, "train", seed)] for seed in (1, 1, 2))

    assert first == again
    assert first != other
    assert sorted(first) == list(range(200))
    assert first != sorted(first)


def test_text_labels_become_sorted_class_names(tmp_path):
    write_parquet(tmp_path / "train-0.parquet", images(3), ["dog", "cat", "dog"])
    write_parquet(tmp_path / "train-1.parquet", images(2), ["ant", "dog"])
    write_parquet(tmp_path / "test.parquet", images(1), ["dog"])

    labels = read_labels(source_of(tmp_path))

    assert labels.class_names == ("ant", "cat", "dog")
    assert labels.by_split["train"].tolist() == [2, 1, 2, 0, 2]
    assert labels.by_split["test"].tolist() == [2]


def test_dictionary_labels_become_class_names(tmp_path):
    kind = pa.dictionary(pa.int8(), pa.string())
    write_parquet(tmp_path / "a.parquet", images(3), ["b", "a", "b"], label_type=kind)

    labels = read_labels(source_of(tmp_path))

    assert labels.class_names == ("a", "b")
    assert labels.by_split["train"].tolist() == [1, 0, 1]


def test_a_text_label_that_train_lacks_is_named(tmp_path):
    write_parquet(tmp_path / "train.parquet", images(2), ["cat", "dog"])
    write_parquet(tmp_path / "test.parquet", images(2), ["cat", "eel"])

    with pytest.raises(DataError, match=r"class 2 \('eel'\) has no image.*test.parquet, row 1, column 'label'"):
        read_labels(source_of(tmp_path))


def test_text_beside_numbers_is_refused(tmp_path):
    write_parquet(tmp_path / "a.parquet", images(2), ["cat", "dog"])
    write_parquet(tmp_path / "b.parquet", images(2), [0, 1])

    with pytest.raises(DataError, match="some files hold text labels and others whole numbers"):
        read_labels(source_of(tmp_path))


@pytest.mark.parametrize(
    ("labels", "kind", "text"),
    [
        ([0, None, 1], None, r"b.parquet, row 1, column 'label': label is null"),
        ([0, 1, -1], None, r"b.parquet, row 2, column 'label': label -1 is negative"),
        (
            [0, 1, 2**63],
            pa.uint64(),
            r"b.parquet, row 2, column 'label': label 9223372036854775808 is out of range",
        ),
        (["x", None, "y"], None, r"b.parquet, row 1, column 'label': label is null"),
    ],
)
def test_unusable_labels_are_refused_with_file_row_and_column(tmp_path, labels, kind, text):
    write_parquet(tmp_path / "b.parquet", images(3), labels, label_type=kind)

    with pytest.raises(DataError, match=text):
        read_labels(source_of(tmp_path))


def test_rows_in_errors_are_counted_per_file(tmp_path):
    write_parquet(tmp_path / "a.parquet", images(3), [0, 1, 0])
    write_parquet(tmp_path / "b.parquet", images(3), [0, -5, 1])

    with pytest.raises(DataError, match=r"b.parquet, row 1, column 'label': label -5 is negative"):
        read_labels(source_of(tmp_path))


def test_a_label_beyond_the_named_classes_is_out_of_range(tmp_path):
    write_parquet(tmp_path / "a.parquet", images(3), [0, 1, 2], metadata=names_metadata("cat", "dog"))

    with pytest.raises(DataError, match=r"a.parquet, row 2, column 'label': label 2 is out of range, want 0 to 1"):
        read_labels(source_of(tmp_path))


def test_files_that_name_classes_differently_are_refused(tmp_path):
    write_parquet(tmp_path / "a.parquet", images(2), [0, 1], metadata=names_metadata("cat", "dog"))
    write_parquet(tmp_path / "b.parquet", images(2), [0, 1], metadata=names_metadata("dog", "cat"))

    with pytest.raises(DataError, match=r"b.parquet in .* class names \(dog, cat\), the first file's \(cat, dog\)"):
        read_labels(source_of(tmp_path))


def test_a_column_missing_from_one_file_is_named_with_the_file(tmp_path):
    write_parquet(tmp_path / "a.parquet", images(2), [0, 1])
    write_parquet(tmp_path / "b.parquet", images(2), [0, 1], label="kind")

    with pytest.raises(DataError, match=r"b.parquet: no label column"):
        read_labels(source_of(tmp_path))


def test_columns_can_be_named(tmp_path):
    write_parquet(tmp_path / "a.parquet", images(2), [0, 1], image="photo", label="kind")

    source = source_of(tmp_path, image_column="photo", label_column="kind")

    assert source.labels("train").tolist() == [0, 1]
    with pytest.raises(DataError, match=r"a.parquet: missing column 'foto'"):
        source_of(tmp_path, image_column="foto")


def test_a_truncated_file_is_named(tmp_path):
    write_parquet(tmp_path / "a.parquet", images(20), [0, 1] * 10)
    data = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(data[: len(data) // 2])

    with pytest.raises(DataError, match=r"b.parquet in .*: cannot be read as Parquet"):
        source_of(tmp_path)


def test_a_file_damaged_in_the_middle_is_named_when_it_is_read(tmp_path):
    write_parquet(tmp_path / "a.parquet", images(200), [0, 1] * 100, row_group_size=200)
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    data[4:60] = bytes([255]) * 56
    (tmp_path / "a.parquet").write_bytes(data)
    source = source_of(tmp_path)

    with pytest.raises(DataError, match=r"a.parquet in"):
        everything(source, "train")


def test_description_changes_with_content_of_the_same_size(tmp_path):
    facts = []
    for pair in ([0, 1], [1, 0]):
        cells = [image for image in images(2)]
        write_parquet(tmp_path / "a.parquet", cells, [pair[0], pair[0]], label_type=pa.int64())
        facts.append(source_of(tmp_path).describe())

    assert facts[0]["files"][0][1] == facts[1]["files"][0][1]
    assert facts[0] != facts[1]


def test_class_sorted_files_are_mixed_by_the_shuffle(tmp_path):
    for label in range(8):
        write_parquet(tmp_path / f"part-{label}.parquet", images(250), [label] * 250, row_group_size=250)
    source = source_of(tmp_path)
    labels = source.labels("train")

    order = labels[[row for row, _ in everything(source, "train", 0)]]

    assert all(len(np.unique(order[start : start + 100])) >= 6 for start in range(0, 2000, 100))


def test_tensor_columns_are_read_as_images(tmp_path):
    pixels = np.arange(5 * 4 * 4 * 3, dtype=np.uint8).reshape(5, 4, 4, 3)
    table = pa.table({"x": pa.FixedShapeTensorArray.from_numpy_ndarray(pixels), "label": [0, 1, 0, 1, 0]})
    pq.write_table(table, tmp_path / "a.parquet")

    read = [decode_image(cell) for _, cell in everything(source_of(tmp_path), "train")]

    np.testing.assert_array_equal(np.stack(read), pixels.transpose(0, 3, 1, 2))


def test_empty_files_are_an_empty_split(tmp_path):
    write_parquet(tmp_path / "train.parquet", images(2), [0, 1])
    write_parquet(tmp_path / "test.parquet", [], [], label_type=pa.int64())

    with pytest.raises(DataError, match="split test is empty"):
        read_labels(source_of(tmp_path))


def test_cifar10_is_found_with_its_names_and_splits():
    source = source_of(require_cifar10())
    labels = read_labels(source)

    assert source.splits == ("train", "test")
    assert (source.num_rows("train"), source.num_rows("test")) == (50_000, 10_000)
    assert labels.class_names[:3] == ("airplane", "automobile", "bird")
    assert np.bincount(labels.by_split["train"]).tolist() == [5000] * 10


@pytest.mark.s3
def test_parquet_in_object_storage_reads_like_local_files(tmp_path, minio_uri):
    write_parquet(tmp_path / "train-0.parquet", images(60), [0, 1] * 30)
    write_parquet(tmp_path / "test-0.parquet", images(20), [0, 1] * 10)
    store = open_store(minio_uri)
    for file in tmp_path.iterdir():
        store.put(f"set/{file.name}", file.read_bytes())

    local, remote = source_of(tmp_path), source_of(f"{minio_uri}/set/")

    assert remote.describe() == local.describe()
    assert remote.splits == ("train", "test")
    assert remote.labels("train").tolist() == local.labels("train").tolist()
    assert everything(remote, "train", 1) == everything(local, "train", 1)
    assert source_of(f"{minio_uri}/set/test-0.parquet").num_rows("train") == 20


@pytest.mark.s3
def test_an_object_that_disappears_is_a_storage_error(tmp_path, minio_uri):
    write_parquet(tmp_path / "a.parquet", images(6), [0, 1] * 3)
    store = open_store(minio_uri)
    store.put("set/a.parquet", (tmp_path / "a.parquet").read_bytes())
    source = source_of(f"{minio_uri}/set")
    store.delete(["set/a.parquet"])

    with pytest.raises(StorageError, match=r"a.parquet cannot be read"):
        everything(source, "train")


@pytest.mark.s3
def test_nothing_under_an_s3_prefix_is_an_error(minio_uri):
    with pytest.raises(DataError, match=r"data source s3://.*: no Parquet files"):
        source_of(f"{minio_uri}/nothing")
