import logging

import numpy as np
import pytest
from cifar10 import require_cifar10
from image_sets import encode, images, pixels_of, write_parquet

from nf_pipeline.config import DataConfig
from nf_pipeline.data.images import open_images, open_labelled
from nf_pipeline.data.skipped import SkippedImages
from nf_pipeline.errors import DataError
from nf_pipeline.samples import InputSpec, TargetSpec

SHAPE = (1, 6, 6)


def opened(source, shape=SHAPE, **settings):
    samples = open_images(DataConfig(source=str(source), **settings), InputSpec(shape=shape))
    return [(name, int(image[0, 0, 0])) for name, image in samples]


def labelled(source, class_names, shape=SHAPE, **settings):
    target = TargetSpec(size=len(class_names))
    data = DataConfig(source=str(source), **settings)
    batches = list(open_labelled(data, InputSpec(shape=shape), target, class_names))
    ids = [name for batch in batches for name in batch.ids]
    return ids, np.concatenate([batch.labels for batch in batches]).tolist(), batches


def test_parquet_without_labels_is_read_in_stored_order(tmp_path):
    write_parquet(tmp_path / "a.parquet", images(300), [None] * 300, label="comment")

    got = opened(tmp_path)

    assert got == [(f"a.parquet:{row}", row % 256) for row in range(300)]


def test_one_image_file_is_an_input(tmp_path):
    (tmp_path / "x.png").write_bytes(encode(pixels_of(9)))

    assert opened(tmp_path / "x.png") == [("x.png", 9)]


def test_a_folder_of_images_needs_no_classes(tmp_path):
    (tmp_path / "deep/er").mkdir(parents=True)
    (tmp_path / "b.png").write_bytes(encode(pixels_of(1)))
    (tmp_path / "deep/er/a.PNG").write_bytes(encode(pixels_of(2)))
    (tmp_path / "notes.txt").write_text("hello")

    assert opened(tmp_path) == [("b.png", 1), ("deep/er/a.PNG", 2)]


def test_links_out_of_the_folder_are_not_followed(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "secret.png").write_bytes(encode(pixels_of(1)))
    (tmp_path / "in/a.png").symlink_to(tmp_path / "secret.png")

    with pytest.raises(DataError, match=r"a.png: the sample cannot be read: it is a link that leads out"):
        opened(tmp_path / "in")


def test_all_splits_are_predicted(tmp_path):
    for split in ("test", "train"):
        write_parquet(tmp_path / f"{split}.parquet", images(2), [0, 1])

    assert [name for name, _ in opened(tmp_path)] == [
        f"{split}.parquet:{row}" for split in ("train", "test") for row in (0, 1)
    ]


def test_grey_images_suit_a_colour_model_and_other_sizes_need_image_size(tmp_path):
    write_parquet(tmp_path / "a.parquet", images(3, size=9), [0, 1, 0])

    with pytest.raises(DataError, match=r"a.parquet, row 0, column 'image': the image has 9 rows of 9 pixels"):
        opened(tmp_path)
    assert opened(tmp_path, shape=(3, 6, 6), image_size=6) == [(f"a.parquet:{row}", row) for row in range(3)]


def test_skipped_images_are_left_out_and_counted(tmp_path, caplog):
    write_parquet(tmp_path / "a.parquet", [images(1)[0], b"junk", images(1)[0]], [0, 1, 0])
    skipped = SkippedImages("skip")

    with caplog.at_level(logging.WARNING):
        got = list(open_images(DataConfig(source=str(tmp_path)), InputSpec(shape=SHAPE), skipped))

    assert [name for name, _ in got] == ["a.parquet:0", "a.parquet:2"]
    assert skipped.num_images == 1
    assert "a.parquet, row 1, column 'image'" in caplog.text


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(DataError, match="no images and no Parquet files"):
        opened(tmp_path)


def test_evaluation_takes_the_test_split_if_there_is_one(tmp_path):
    write_parquet(tmp_path / "train.parquet", images(4), [0, 1, 0, 1])
    write_parquet(tmp_path / "test.parquet", images(3), [1, 1, 0])

    ids, labels, batches = labelled(tmp_path, ("0", "1"))

    assert ids == [f"test.parquet:{row}" for row in range(3)]
    assert labels == [1, 1, 0]
    assert batches[0].images[:, 0, 0, 0].tolist() == [0, 1, 2]


def test_evaluation_takes_all_rows_without_a_test_split():
    ids, labels, _ = labelled("digits", tuple("0123456789"), (1, 8, 8))

    assert (len(ids), len(set(ids)), len(labels)) == (1797, 1797, 1797)


def test_classes_are_matched_by_name(tmp_path):
    write_parquet(tmp_path / "a.parquet", images(3), ["dog", "ant", "dog"])

    assert labelled(tmp_path, ("ant", "cat", "dog"))[1] == [2, 0, 2]


def test_a_class_that_the_model_does_not_know_is_named(tmp_path):
    write_parquet(tmp_path / "a.parquet", images(3), ["dog", "eel", "dog"])

    with pytest.raises(DataError, match=r"a.parquet, row 1, column 'label': class 'eel' is none of the model's 2"):
        labelled(tmp_path, ("cat", "dog"))


def test_a_number_that_the_model_does_not_know_is_out_of_range(tmp_path):
    write_parquet(tmp_path / "a.parquet", images(3), [0, 5, 1])

    with pytest.raises(DataError, match=r"a.parquet, row 1, column 'label': label 5 is out of range, want 0 to 1"):
        labelled(tmp_path, ("cat", "dog"))


def test_skipped_rows_keep_labels_with_their_images(tmp_path):
    cells = [b"junk" if row % 3 == 0 else image for row, image in enumerate(images(200))]
    write_parquet(tmp_path / "a.parquet", cells, [row % 5 for row in range(200)])

    _, labels, batches = labelled(tmp_path, tuple("01234"), on_bad_image="skip")

    values = np.concatenate([batch.images[:, 0, 0, 0] for batch in batches])
    assert labels == (values % 5).tolist()
    assert len(labels) == 133


def test_cifar10_evaluates_its_test_split():
    names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

    batches = open_labelled(
        DataConfig(source=str(require_cifar10())), InputSpec(shape=(3, 32, 32)), TargetSpec(size=10), names
    )

    first = next(batches)
    assert first.ids[0] == "test-00000-of-00001.parquet:0"
    assert first.images.shape[1:] == (3, 32, 32)
