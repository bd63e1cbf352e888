import subprocess
import sys
from importlib import resources

import numpy as np
import pytest

from nf_pipeline.config import DataConfig
from nf_pipeline.data.decode import decode_image
from nf_pipeline.data.sources import absolute_source, open_source
from nf_pipeline.errors import DataError


def test_digits_are_real_grey_images_of_ten_classes():
    source = open_source(DataConfig())
    labels = source.labels("train")
    images = [decode_image(cell) for _, cell in source.read("train", np.ones(1797, bool), None)]

    assert (source.name, source.splits) == ("digits", ("train",))
    assert source.class_names == tuple("0123456789")
    assert np.bincount(labels).min() >= 170
    assert {image.shape for image in images} == {(1, 8, 8)}
    assert np.stack(images).max() == 255
    # A mean image per class already tells most digits apart: the labels belong to the images.
    flat = np.stack(images).reshape(1797, 64).astype(float)
    means = np.stack([flat[labels == digit].mean(axis=0) for digit in range(10)])
    nearest = ((flat[:, None] - means) ** 2).sum(axis=2).argmin(axis=1)
    assert (nearest == labels).mean() > 0.85


def test_the_packaged_file_is_small():
    assert len(resources.files("nf_pipeline.data").joinpath("digits.parquet").read_bytes()) < 300_000


@pytest.mark.parametrize("source", ["no-such-folder", "/no/such/folder", "NoSuchSet"])
def test_a_source_that_is_not_there_is_named(source):
    with pytest.raises(DataError, match=f"data source {source}: no such folder, file or torchvision data set"):
        open_source(DataConfig(source=source))


def test_an_unknown_scheme_is_refused():
    with pytest.raises(DataError, match="unknown scheme 'ftp'"):
        open_source(DataConfig(source="ftp://host/x"))


def test_credentials_in_a_uri_are_not_repeated():
    with pytest.raises(ValueError, match="credentials do not belong here") as caught:
        DataConfig(source="s3://user:secret@bucket/x")
    assert "secret" not in str(caught.value)


def test_a_path_that_cannot_be_looked_up_is_named():
    with pytest.raises(DataError, match=r"data source x{300}: cannot be read: File name too long"):
        open_source(DataConfig(source="x" * 300))


@pytest.mark.parametrize(
    ("source", "absolute"),
    [
        ("digits", "digits"),
        ("s3://bucket/prefix", "s3://bucket/prefix"),
        ("ftp://host/x", "ftp://host/x"),
        ("./digits", "{here}/digits"),
        ("images", "{here}/images"),
        ("./images/", "{here}/images"),
        ("deep/../images", "{here}/images"),
        ("../other/a.parquet", "{above}/other/a.parquet"),
        ("/abs/images", "/abs/images"),
        ("file:///abs/images", "/abs/images"),
        ("~/images", "{home}/images"),
        ("absent-folder", "{here}/absent-folder"),
        ("NoSuchSet", "{here}/NoSuchSet"),
        ("MNIST", "{here}/MNIST"),
        ("CIFAR10", "torchvision:CIFAR10:{here}/data"),
        ("torchvision:CIFAR10", "torchvision:CIFAR10:{here}/data"),
        ("torchvision:CIFAR10:sets", "torchvision:CIFAR10:{here}/sets"),
        ("torchvision:CIFAR10:/sets", "torchvision:CIFAR10:/sets"),
    ],
)
def test_a_source_is_made_absolute_once(tmp_path, monkeypatch, source, absolute):
    here, home = tmp_path / "here", tmp_path / "home"
    for folder in ("images", "digits", "MNIST"):  # a folder wins over a data set of the same name
        (here / folder).mkdir(parents=True)
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(home))
    wanted = absolute.format(here=here, above=tmp_path, home=home)

    assert absolute_source(source) == wanted
    assert absolute_source(wanted) == wanted


def test_making_paths_absolute_does_not_load_torch(tmp_path):
    code = (
        "import sys; from nf_pipeline.data.sources import absolute_source; "
        "[absolute_source(source) for source in sys.argv[1:]]; print('torch' in sys.modules)"
    )
    sources = ("digits", "s3://bucket/x", "./images", "some/folder", str(tmp_path), "torchvision:CIFAR10:/sets")

    done = subprocess.run([sys.executable, "-c", code, *sources], capture_output=True, text=True, timeout=300)

    assert done.stdout == "False\n", done.stderr
