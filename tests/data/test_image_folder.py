import os

import numpy as np
import pytest
from image_sets import encode, pixels_of

from nf_pipeline.config import DataConfig
from nf_pipeline.data.base import Unusable
from nf_pipeline.data.classes import read_labels
from nf_pipeline.data.decode import Undecodable, decode_image
from nf_pipeline.data.image_folder import ImageFolderSource
from nf_pipeline.data.sources import open_source
from nf_pipeline.errors import DataError


def write_images(folder, num, suffix="png"):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(num):
        (folder / f"{number}.{suffix}").write_bytes(encode(pixels_of(number)))


def everything(source, split, seed=None):
    return list(source.read(split, np.ones(source.num_rows(split), bool), seed))


def problem_of(source, row):
    with pytest.raises(Undecodable) as caught:
        decode_image(everything(source, "train")[row].image)
    return str(caught.value)


def test_class_folders_are_one_train_split(tmp_path):
    write_images(tmp_path / "dog", 3)
    write_images(tmp_path / "cat", 2)

    source = open_source(DataConfig(source=str(tmp_path)))

    assert isinstance(source, ImageFolderSource)
    assert source.splits == ("train",)
    assert read_labels(source).class_names == ("cat", "dog")
    assert source.labels("train").tolist() == [0, 0, 1, 1, 1]
    assert source.where("train", 4, "image") == "dog/2.png"
    assert [int(decode_image(cell)[0, 0, 0]) for _, cell in everything(source, "train")] == [0, 1, 0, 1, 2]


def test_train_validation_and_test_folders_are_splits(tmp_path):
    for split, num in (("train", 4), ("validation", 2), ("test", 1)):
        write_images(tmp_path / split / "a", num)
        write_images(tmp_path / split / "b", num)

    source = ImageFolderSource(tmp_path)

    assert source.splits == ("train", "val", "test")
    assert [source.num_rows(split) for split in source.splits] == [8, 4, 2]


def test_a_class_named_train_is_a_class(tmp_path):
    for name in ("car", "train"):
        write_images(tmp_path / name, 2)

    assert ImageFolderSource(tmp_path).class_names == ("car", "train")


def test_shuffled_files_follow_the_seed(tmp_path):
    for name in ("a", "b"):
        write_images(tmp_path / name, 30)
    source = ImageFolderSource(tmp_path)

    first, again, other = ([row for row, _ in everything(source, "train", seed)] for seed in (1, 1, 2))

    assert first == again != other
    assert sorted(first) == list(range(60))


def test_files_in_nested_folders_belong_to_the_class(tmp_path):
    write_images(tmp_path / "a/2024/may", 2)
    write_images(tmp_path / "b", 1)

    assert ImageFolderSource(tmp_path).labels("train").tolist() == [0, 0, 1]


def test_hidden_files_are_left_out(tmp_path):
    write_images(tmp_path / "a", 1)
    (tmp_path / "a/.DS_Store").write_bytes(b"x")
    write_images(tmp_path / ".git", 1)

    assert ImageFolderSource(tmp_path).num_rows("train") == 1


def test_a_file_that_is_no_image_is_kept_so_that_it_is_noticed(tmp_path):
    write_images(tmp_path / "a", 1)
    (tmp_path / "a/notes.txt").write_text("hello")
    source = ImageFolderSource(tmp_path)

    assert source.where("train", 1, "image") == "a/notes.txt"
    assert "no image of a known format" in problem_of(source, 1)


def test_a_link_out_of_the_folder_is_not_followed(tmp_path):
    write_images(tmp_path / "outside", 1)
    write_images(tmp_path / "set/a", 1)
    (tmp_path / "set/a/z.png").symlink_to(tmp_path / "outside/0.png")

    assert problem_of(ImageFolderSource(tmp_path / "set"), 1) == "it is a link that leads out of the data folder"


def test_a_sibling_folder_whose_name_starts_alike_is_outside(tmp_path):
    write_images(tmp_path / "set-private", 1)
    write_images(tmp_path / "set/a", 1)
    (tmp_path / "set/a/z.png").symlink_to(tmp_path / "set-private/0.png")

    assert problem_of(ImageFolderSource(tmp_path / "set"), 1) == "it is a link that leads out of the data folder"


def test_a_link_inside_the_folder_is_followed(tmp_path):
    write_images(tmp_path / "a", 2)
    (tmp_path / "a/z.png").symlink_to("1.png")

    assert int(decode_image(everything(ImageFolderSource(tmp_path), "train")[2].image)[0, 0, 0]) == 1


@pytest.mark.parametrize("target", ["../../outside", "..", "."])
def test_a_link_to_a_folder_is_never_entered(tmp_path, target):
    write_images(tmp_path / "outside", 5)
    write_images(tmp_path / "set/a", 1)
    (tmp_path / "set/a/zlink").symlink_to(target)
    source = ImageFolderSource(tmp_path / "set")

    assert source.num_rows("train") == 2
    assert problem_of(source, 1) in (
        "it is a link that leads out of the data folder",
        "it is no regular file",
    )


def test_a_linked_class_folder_is_never_entered(tmp_path):
    write_images(tmp_path / "outside", 5)
    write_images(tmp_path / "set/a", 1)
    (tmp_path / "set/b").symlink_to(tmp_path / "outside")
    source = ImageFolderSource(tmp_path / "set")

    assert source.num_rows("train") == 2
    assert problem_of(source, 1) == "it is a link that leads out of the data folder"


def test_the_data_folder_itself_may_be_a_link(tmp_path):
    write_images(tmp_path / "set/a", 1)
    (tmp_path / "link").symlink_to("set")

    (image,) = everything(ImageFolderSource(tmp_path / "link"), "train")
    assert decode_image(image.image).shape == (1, 6, 6)


def test_a_dangling_link_and_a_pipe_are_unusable(tmp_path):
    write_images(tmp_path / "a", 1)
    (tmp_path / "a/x.png").symlink_to("gone.png")
    os.mkfifo(tmp_path / "a/y.png")
    source = ImageFolderSource(tmp_path)

    assert everything(source, "train")[1].image() == Unusable("No such file or directory")
    assert problem_of(source, 2) == "it is no regular file"


def test_names_that_would_break_a_log_are_escaped(tmp_path):
    hostile = "a\nb\x1b[31m"
    write_images(tmp_path / hostile, 1)
    (tmp_path / os.fsdecode(b"caf\xe9")).mkdir()
    (tmp_path / os.fsdecode(b"caf\xe9/\xff.png")).write_bytes(encode(pixels_of(0)))
    source = ImageFolderSource(tmp_path)

    shown = [*source.class_names, source.where("train", 0, "image"), source.image_id("train", 1)]

    assert source.class_names == ("a\\nb\\x1b[31m", "caf\\udce9")
    assert all(text.isprintable() and text.encode() for text in shown)
    assert [decode_image(cell).shape for _, cell in everything(source, "train")] == [(1, 6, 6)] * 2


def test_an_image_outside_a_class_folder_is_named(tmp_path):
    write_images(tmp_path / "a", 1)
    (tmp_path / "lost.png").write_bytes(encode(pixels_of(0)))

    with pytest.raises(DataError, match=r"lost.png: an image outside a class folder"):
        ImageFolderSource(tmp_path)


def test_a_folder_without_classes_is_refused(tmp_path):
    with pytest.raises(DataError, match="neither Parquet files nor class folders"):
        ImageFolderSource(tmp_path)


def test_an_empty_class_folder_is_a_class_that_train_lacks(tmp_path):
    write_images(tmp_path / "a", 1)
    write_images(tmp_path / "b", 1)
    (tmp_path / "c").mkdir()

    with pytest.raises(DataError, match=r"class 2 \('c'\) has no image in split train"):
        read_labels(ImageFolderSource(tmp_path))


def test_a_class_of_test_that_train_lacks_is_named(tmp_path):
    for folder in ("train/a", "train/b", "test/a", "test/c"):
        write_images(tmp_path / folder, 1)

    with pytest.raises(DataError, match=r"class 2 \('c'\) has no image in split train; first seen at test/c/0.png"):
        read_labels(ImageFolderSource(tmp_path))


def test_description_changes_with_a_name_or_a_size(tmp_path):
    write_images(tmp_path / "a", 2)
    before = ImageFolderSource(tmp_path).describe()
    (tmp_path / "a/1.png").rename(tmp_path / "a/2.png")
    renamed = ImageFolderSource(tmp_path).describe()
    (tmp_path / "a/2.png").write_bytes(b"x")

    assert before != renamed != ImageFolderSource(tmp_path).describe()
