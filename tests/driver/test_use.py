import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from PIL import Image

from nf_pipeline import load_model
from nf_pipeline.config import DataConfig, resolve_config
from nf_pipeline.driver.evaluation import evaluate
from nf_pipeline.driver.preview import preview_plan
from nf_pipeline.driver.run import resume, train
from nf_pipeline.driver.run_record import load_plan
from nf_pipeline.driver.use import export, predict
from nf_pipeline.errors import ConfigError, DataError, ObjectMissing, StorageError
from nf_pipeline.storage.layout import RunLayout
from nf_pipeline.storage.store import open_store


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict]:
    """One finished run on all digits, and its summary."""
    store = tmp_path_factory.mktemp("runs")
    config = resolve_config(
        flags={
            "memory.budget_bytes": "4MiB",
            "train.epochs": 3,
            "train.unit_layers": 2,
            "storage.uri": str(store),
            "cluster.executor": "inline",
            "cluster.num_threads": 1,
            "train.device": "cpu",
        }
    )
    return f"{store}/run", train(config)


def test_evaluate_on_the_training_data_is_about_as_good_as_validation_says(finished: tuple[str, dict]) -> None:
    uri, summary = finished
    rows = evaluate(uri, DataConfig(source="digits"))
    assert [row["exit"] for row in rows] == list(range(len(summary["exits"])))
    assert [row["layer_idx"] for row in rows] == [exit["layer_idx"] for exit in summary["exits"]]
    assert [row["chosen"] for row in rows].index(True) == summary["chosen_exit"]
    assert {row["num_images"] for row in rows} == {1797}
    for row, exit in zip(rows, summary["exits"], strict=True):
        assert row["accuracy"] == pytest.approx(exit["val_accuracy"], abs=0.06)


def test_predictions_agree_with_the_loaded_model_for_any_batch_size(
    finished: tuple[str, dict], tmp_path: Path
) -> None:
    uri, _ = finished
    done = predict(uri, "digits", str(tmp_path / "a.parquet"), 256)
    predict(uri, "digits", str(tmp_path / "b.parquet"), 100)
    a, b = (pq.read_table(tmp_path / name) for name in ("a.parquet", "b.parquet"))
    assert done["rows"] == len(a) == 1797
    assert a["label"].equals(b["label"])
    assert len(set(a["id"].to_pylist())) == 1797
    labels = evaluate(uri, DataConfig(source="digits"))
    chosen = next(row for row in labels if row["chosen"])
    truth = pq.read_table("nf_pipeline/data/digits.parquet")["label"].to_numpy()
    assert (a["label"].to_numpy() == truth).mean() == pytest.approx(chosen["accuracy"])


def test_prediction_of_an_image_folder_resizes_to_the_model(finished: tuple[str, dict], tmp_path: Path) -> None:
    uri, _ = finished
    for name, size in (("small.png", 8), ("large.png", 40)):
        Image.fromarray(np.full((size, size), 128, np.uint8)).save(tmp_path / name)
    predict(uri, str(tmp_path), str(tmp_path / "out.parquet"))
    table = pq.read_table(tmp_path / "out.parquet")
    assert sorted(table["id"].to_pylist()) == ["large.png", "small.png"]
    assert all(0.1 <= p <= 1.0 for p in table["probability"].to_pylist())


def test_failed_prediction_leaves_the_older_output_alone(finished: tuple[str, dict], tmp_path: Path) -> None:
    uri, _ = finished
    images = tmp_path / "images"
    images.mkdir()
    (images / "broken.png").write_bytes(b"no image")
    output = tmp_path / "out.parquet"
    output.write_bytes(b"older")
    with pytest.raises(DataError, match=r"broken\.png"):
        predict(uri, str(images), str(output))
    assert output.read_bytes() == b"older"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_prediction_below_a_file_is_a_storage_error_that_says_so(finished: tuple[str, dict], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for output in (tmp_path / "file/out.parquet", tmp_path / "file/deeper/out.parquet"):
        with pytest.raises(StorageError, match="a part of its path is a file") as caught:
            predict(finished[0], "digits", str(output))
        assert caught.value.uri == str(output)
    for folder in (str(tmp_path), "."):
        with pytest.raises(StorageError, match="it is a folder"):
            predict(finished[0], "digits", folder)


def test_input_that_cannot_be_read_is_not_blamed_on_the_output(finished: tuple[str, dict], tmp_path: Path) -> None:
    too_long = "x" * 300
    with pytest.raises(DataError, match=f"data source {too_long}: cannot be read"):
        predict(finished[0], too_long, str(tmp_path / "out.parquet"))
    assert list(tmp_path.iterdir()) == []


def test_skipped_images_are_counted_and_left_out(finished: tuple[str, dict], tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    (images / "broken.png").write_bytes(b"no image")
    Image.fromarray(np.full((8, 8), 128, np.uint8)).save(images / "whole.png")
    done = predict(finished[0], str(images), str(tmp_path / "out.parquet"), on_bad_image="skip")
    assert (done["rows"], done["num_skipped"]) == (1, 1)
    assert pq.read_table(tmp_path / "out.parquet")["id"].to_pylist() == ["whole.png"]


def test_exported_program_computes_what_the_model_computes(finished: tuple[str, dict], tmp_path: Path) -> None:
    uri, _ = finished
    path = export(uri, "torch-export", str(tmp_path / "model.pt2"))
    program = torch.export.load(path).module()
    model = load_model(uri)
    for num_images in (1, 2, 7):
        pixels_NCHW = torch.randint(0, 256, (num_images, *model.card.inputs.shape), dtype=torch.uint8)
        torch.testing.assert_close(program(pixels_NCHW), model(pixels_NCHW))


def test_exported_safetensors_hold_every_weight(finished: tuple[str, dict], tmp_path: Path) -> None:
    uri, summary = finished
    export(uri, "safetensors", str(tmp_path / "model.safetensors"))
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    model = load_model(uri)
    assert sum(tensors[name].numel() for name, _ in model.named_parameters()) == summary["params_final"]
    assert (tmp_path / "model.json").exists()


@pytest.mark.parametrize("name", ["model.json", "model.JSON"])
def test_weights_are_not_exported_under_the_name_of_their_description(
    finished: tuple[str, dict], tmp_path: Path, name: str
) -> None:
    with pytest.raises(ConfigError, match=r"--output .*model\.safetensors"):
        export(finished[0], "safetensors", str(tmp_path / name))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format_name", ["safetensors", "torch-export"])
def test_export_below_a_file_is_a_storage_error(finished: tuple[str, dict], tmp_path: Path, format_name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="a part of its path is a file"):
        export(finished[0], format_name, str(tmp_path / "file/model"))


def test_unknown_export_format_is_refused(finished: tuple[str, dict], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="pickle"):
        export(finished[0], "pickle", str(tmp_path / "model"))


def test_model_of_an_unfinished_run_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ObjectMissing):
        load_model(f"{tmp_path}/absent")


def test_preview_decides_what_the_run_decides(finished: tuple[str, dict]) -> None:
    uri, _ = finished
    store = uri.rsplit("/", 1)[0]
    config = resolve_config(flags={"memory.budget_bytes": "4MiB", "train.unit_layers": 2, "train.device": "cpu"})
    previewed = preview_plan(config)
    ran = load_plan(open_store(store), RunLayout("run"))
    assert previewed.blocks == ran.blocks
    assert previewed.layers == ran.layers


@pytest.fixture
def own_factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A user's module with a model factory; leaves a trace when it is imported."""
    (tmp_path / "my_nets.py").write_text(
        "from pathlib import Path\n"
        "from torch import nn\n"
        f"Path({str(tmp_path / 'imported')!r}).touch()\n"
        "def small(num_classes, image_shape):\n"
        "    return nn.Sequential(\n"
        "        nn.Conv2d(image_shape[0], 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),\n"
        "        nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),\n"
        "        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return "my_nets:small"


def test_own_factory_trains_and_is_imported_again_only_if_named(own_factory: str, tmp_path: Path) -> None:
    config = resolve_config(
        flags={
            "memory.budget_bytes": "4MiB",
            "model.name": own_factory,
            "data.max_train_images": 200,
            "train.epochs": 1,
            "storage.uri": str(tmp_path / "runs"),
            "cluster.executor": "inline",
            "cluster.num_threads": 1,
        }
    )
    assert train(config)["model"] == own_factory
    uri, trace = f"{tmp_path}/runs/run", tmp_path / "imported"
    trace.unlink()
    sys.modules.pop("my_nets")
    for use in (
        lambda: load_model(uri),
        lambda: resume(uri),
        lambda: evaluate(uri, DataConfig(source="digits")),
        lambda: predict(uri, "digits", str(tmp_path / "out.parquet")),
    ):
        with pytest.raises(ConfigError, match="is code"):
            use()
    assert not trace.exists()
    assert load_model(uri, model=own_factory).card.model == own_factory
    assert trace.exists()


def test_export_replaces_an_older_file_only_as_a_whole(
    finished: tuple[str, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model.safetensors"
    target.write_bytes(b"older")

    def stop(path: Path, data: bytes) -> None:
        with path.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", stop)
    with pytest.raises(KeyboardInterrupt):
        export(finished[0], "safetensors", str(target))
    assert target.read_bytes() == b"older"
    assert [path.name for path in tmp_path.iterdir()] == [target.name]
