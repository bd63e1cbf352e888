import struct

import numpy as np
import pytest
from image_sets import encode

from nf_pipeline.config import DataConfig
from nf_pipeline.data.classes import read_labels
from nf_pipeline.data.decode import Undecodable, decode_image
from nf_pipeline.data.sources import open_source
from nf_pipeline.data.torchvision_sets import TorchvisionSource
from nf_pipeline.errors import ConfigError, DataError

PIXELS = np.random.default_rng(0).integers(0, 256, (30, 28, 28), np.uint8)
LABELS = np.arange(30, dtype=np.uint8) % 10


def write_mnist(root, name="MNIST"):
    """Writes the IDX files that torchvision keeps; https://yann.lecun.org/exdb/mnist describes the format."""
    folder = root / name / "raw"
    folder.mkdir(parents=True)
    for part in ("train", "t10k"):
        head = struct.pack(">IIII", 0x803, *PIXELS.shape)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(head + PIXELS.tobytes())
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, 30) + LABELS.tobytes())


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST"])
def test_a_data_set_in_a_given_folder_is_read(tmp_path, name):
    write_mnist(tmp_path, name)

    source = open_source(DataConfig(source=f"torchvision:{name}:{tmp_path}"))

    assert source.splits == ("train", "test")
    assert len(read_labels(source).class_names) == 10
    assert source.labels("test").tolist() == LABELS.tolist()
    wanted = np.arange(30) == 7
    ((row, cell),) = source.read("train", wanted, 0)
    assert row == 7
    np.testing.assert_array_equal(decode_image(cell), PIXELS[7][None])


def test_a_bare_name_is_looked_for_in_the_default_folder(tmp_path, monkeypatch):
    write_mnist(tmp_path / "data")
    monkeypatch.chdir(tmp_path)

    assert isinstance(open_source(DataConfig(source="MNIST")), TorchvisionSource)


def test_a_data_set_that_is_not_there_is_not_downloaded(tmp_path):
    with pytest.raises(DataError, match=r"torchvision CIFAR10 is not in .*") as caught:
        TorchvisionSource("CIFAR10", str(tmp_path))
    assert "torchvision:CIFAR10:ROOT" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_an_unknown_name_lists_near_ones(tmp_path):
    with pytest.raises(ConfigError, match=r"no data set 'CIFAR11'; near: .*CIFAR10"):
        TorchvisionSource("CIFAR11", str(tmp_path))


def test_a_data_set_without_class_labels_is_refused(tmp_path):
    with pytest.raises(ConfigError):
        TorchvisionSource("FakeData", str(tmp_path))


def write_eurosat(root, files):
    """Writes class folders as torchvision's EuroSAT has them; `files` maps CLASS/NAME to bytes."""
    for name, data in files.items():
        path = root / "eurosat/2750" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def test_images_are_decoded_where_they_are_fetched_and_resized_alike(tmp_path):
    colour = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    write_eurosat(tmp_path, {"Forest/a.png": encode(colour), "River/b.png": b"junk"})
    source = open_source(DataConfig(source=f"torchvision:EuroSAT:{tmp_path}"))

    (_, whole), (row, broken) = source.read("train", np.ones(2, bool), None)

    assert source.class_names == ("Forest", "River")
    assert callable(whole)
    np.testing.assert_array_equal(decode_image(whole, 5), decode_image(encode(colour), 5))
    with pytest.raises(Undecodable, match="no image of a known format"):
        decode_image(broken)
    assert source.where("train", row, "image") == "torchvision EuroSAT train, row 1, image"


def test_a_data_set_with_a_choice_of_its_own_is_refused_and_the_choice_named(tmp_path):
    with pytest.raises(DataError, match=r"torchvision EMNIST: .* a choice of its own \(split\)"):
        TorchvisionSource("EMNIST", str(tmp_path))
