import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
from image_sets import encode
from local_ray import running_ray

from nf_pipeline import train
from nf_pipeline.config import resolve_config
from nf_pipeline.data import Predictor
from nf_pipeline.driver.use import predict
from nf_pipeline.errors import ConfigError, DataError, ObjectMissing
from nf_pipeline.samples import InputSpec, TargetSpec

DIGITS = "nf_pipeline/data/digits.parquet"


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    """A finished run on some of the digits."""
    return trained(tmp_path_factory.mktemp("runs"))


def trained(store, **data):
    flags = {
        "storage.uri": str(store),
        "memory.budget_bytes": "4MiB",
        "data.max_train_images": 600,
        "train.epochs": 2,
        "cluster.executor": "inline",
        "cluster.num_threads": 1,
        "train.device": "cpu",
        **data,
    }
    train(resolve_config(flags=flags))
    return f"{store}/run"


@pytest.fixture(scope="module")
def predictor(uri):
    return Predictor(uri)


@pytest.fixture(scope="module")
def digits():
    """All digits as uint8 [N, 8, 8], and their labels."""
    from nf_pipeline.config import DataConfig
    from nf_pipeline.data.images import open_labelled

    batches = list(open_labelled(DataConfig(), InputSpec(shape=(1, 8, 8)), TargetSpec(size=10), tuple("0123456789")))
    return np.concatenate([b.images[:, 0] for b in batches]), np.concatenate([b.labels for b in batches])


def objects(values):
    column = np.empty(len(values), object)
    column[:] = values
    return column


def test_predictions_are_those_of_the_predict_command(uri, predictor, digits, tmp_path):
    predict(uri, "digits", str(tmp_path / "out.parquet"))
    want = pq.read_table(tmp_path / "out.parquet")

    got = predictor({"image": digits[0], "id": np.arange(1797)})

    assert list(got) == ["id", "prediction", "label_idx", "probability"]
    assert got["label_idx"].tolist() == want["label"].to_pylist()
    assert got["prediction"].tolist() == want["class_name"].to_pylist()
    np.testing.assert_allclose(got["probability"], want["probability"].to_numpy(), atol=1e-5)
    assert (got["label_idx"].dtype, got["probability"].dtype) == (np.int64, np.float32)
    assert (got["label_idx"] == digits[1]).mean() > 0.8


def test_predicted_values_are_those_of_the_predict_command_in_their_own_units(digits, tmp_path):
    uri = trained(tmp_path, **{"data.target": "values", "train.epochs": 1})
    predict(uri, "digits", str(tmp_path / "out.parquet"))
    want = np.array(pq.read_table(tmp_path / "out.parquet")["prediction"].to_pylist())

    got = Predictor(uri)({"image": digits[0], "id": np.arange(1797)})

    assert list(got) == ["id", "prediction"]
    assert (got["prediction"].dtype, got["prediction"].shape) == (np.float32, (1797, 1))
    np.testing.assert_allclose(got["prediction"], want, atol=1e-4)
    assert abs(got["prediction"].mean() - digits[1].mean()) < 1.5
    assert np.corrcoef(got["prediction"][:, 0], digits[1])[0, 1] > 0.5


def test_every_form_of_the_same_images_gives_the_same_predictions(predictor, digits):
    pixels = digits[0][:20]
    encoded = [encode(image) for image in pixels]
    forms = {
        "one channel": pixels[:, :, :, None],
        "channels first": pixels[:, None],
        "objects": objects([image for image in pixels]),
        "files": objects(encoded),
        "structs": objects([{"bytes": data, "path": None} for data in encoded]),
    }
    want = predictor({"image": pixels})

    for name, column in forms.items():
        got = predictor({"image": column})
        np.testing.assert_array_equal(got["label_idx"], want["label_idx"], err_msg=name)
        np.testing.assert_allclose(got["probability"], want["probability"], atol=1e-5, err_msg=name)


def test_images_of_other_sizes_are_resized(predictor):
    pixels = [np.full((size, size + 1), 200, np.uint8) for size in (4, 8, 31)]

    assert len(predictor({"image": objects(pixels)})["prediction"]) == 3


def test_image_column_can_be_named_and_kept(uri, digits):
    batch = {"mask": digits[0][:4], "photo": digits[0][4:8]}

    got = Predictor(uri, image_column="photo", keep_image=True)(batch)

    assert list(got)[:2] == ["mask", "photo"]
    np.testing.assert_array_equal(got["photo"], batch["photo"])
    assert got["label_idx"].tolist() == Predictor(uri)({"image": batch["photo"]})["label_idx"].tolist()


def test_batch_without_rows_comes_back_without_rows(predictor, digits):
    got = predictor({"image": digits[0][:0], "id": np.arange(0)})

    assert {name: (len(column), column.dtype.kind) for name, column in got.items()} == {
        "id": (0, "i"),
        "prediction": (0, "U"),
        "label_idx": (0, "i"),
        "probability": (0, "f"),
    }


def test_bad_image_is_named_or_left_out(uri, predictor, digits):
    batch = {"image": objects([encode(digits[0][0]), b"no image", None]), "id": np.array([7, 8, 9])}

    with pytest.raises(DataError, match="batch, row 1, column 'image': the sample cannot be read: no image of a"):
        predictor(batch)
    skipping = Predictor(uri, on_bad_image="skip")
    assert skipping(batch)["id"].tolist() == [7]
    assert skipping.num_skipped == 2


@pytest.mark.parametrize(
    ("batch", "error", "text"),
    [
        (
            pq.read_table(DIGITS).slice(0, 2),
            ConfigError,
            r"got pyarrow\.lib\.Table, want a dict of numpy arrays\nFix: .*numpy",
        ),
        ({"image": [1, 2]}, ConfigError, "want a dict of numpy arrays"),
        ({"id": np.arange(2)}, DataError, r"no column holds images .*; it has 'id' \(int64 \[2\]\)"),
        ({"image": np.zeros((2, 8, 8), bool)}, DataError, r"no column holds images .*'image' \(bool \[2, 8, 8\]\)"),
        (
            {"a": np.zeros((2, 8, 8), np.uint8), "b": np.zeros((2, 8, 8), np.uint8)},
            DataError,
            "could all be the image",
        ),
        ({"image": np.zeros((2, 8, 8, 3), np.uint8)}, DataError, "the image is in colour, the first one is grey"),
        ({"image": np.zeros((2, 8, 8), np.uint8), "prediction": np.arange(2)}, ConfigError, "'prediction'"),
    ],
    ids=["table", "lists", "no-image", "floats", "two-images", "colour", "taken"],
)
def test_unusable_batch_is_an_error_that_says_so(predictor, batch, error, text):
    with pytest.raises(error, match=text):
        predictor(batch)


def test_named_column_that_is_missing_or_no_image_is_an_error(uri):
    with pytest.raises(DataError, match="missing column 'photo'; it has 'image'"):
        Predictor(uri, image_column="photo")({"image": np.zeros((2, 8, 8), np.uint8)})
    with pytest.raises(DataError, match="it holds float64, want uint8"):
        Predictor(uri, image_column="image")({"image": np.zeros((2, 8, 8))})
    with pytest.raises(DataError, match="it is a bool array, want uint8"):
        Predictor(uri, image_column="image")({"image": np.zeros((2, 8, 8), bool)})


def test_run_without_a_model_is_an_error(tmp_path):
    with pytest.raises(ObjectMissing):
        Predictor(str(tmp_path / "no-run"))


def test_naming_the_class_loads_torch_and_importing_its_package_does_not():
    program = (
        "import sys, nf_pipeline.data as data\n"
        "assert 'torch' not in sys.modules and 'pyarrow' not in sys.modules\n"
        "data.Predictor\n"
        "assert 'torch' in sys.modules and 'ray' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


@pytest.mark.ray
def test_ray_dataset_gets_the_predictions_of_a_plain_call(uri, predictor, digits):
    want = predictor({"image": digits[0]})["label_idx"]
    with running_ray():
        import ray.data

        predicted = ray.data.read_parquet(DIGITS).map_batches(
            Predictor,
            fn_constructor_kwargs={"uri": uri},
            batch_size=256,
            compute=ray.data.ActorPoolStrategy(size=1),
        )
        table = predicted.to_pandas()
    assert sorted(table.columns) == ["label", "label_idx", "prediction", "probability"]
    assert table["label_idx"].tolist() == want.tolist()
    assert table["prediction"].tolist() == [str(label) for label in want]
