"""Code that a run names is imported only if the user names it too, by whatever command the run is read."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from nf_pipeline import load_model, resume, train
from nf_pipeline.config import DataConfig, resolve_config
from nf_pipeline.data.predictor import Predictor
from nf_pipeline.driver.evaluation import evaluate
from nf_pipeline.driver.gc import collect_garbage
from nf_pipeline.driver.status import read_status
from nf_pipeline.driver.use import export, predict
from nf_pipeline.errors import ConfigError, NFError

MODULE = "network_of_somebody"
FACTORY = f"{MODULE}:make"
SOURCE = """
from pathlib import Path
from torch import nn

Path(__file__).with_name("imported").touch()

def make(num_classes, image_shape):
    return nn.Sequential(nn.Conv2d(image_shape[0], 8, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(num_classes))
"""
SMALL = {
    **{"memory.budget_bytes": "4MiB", "data.max_train_images": 100, "train.epochs": 1, "train.unit_layers": 2},
    **{"cluster.executor": "inline", "cluster.num_threads": 1, "train.device": "cpu"},
}


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the module."""
    folder = tmp_path_factory.mktemp("code")
    (folder / f"{MODULE}.py").write_text(SOURCE, encoding="utf8")
    return folder


@pytest.fixture(scope="module")
def uri(code: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A finished run whose user named the factory, in a process of its own: this one has never imported it."""
    store = tmp_path_factory.mktemp("runs")
    words = [sys.executable, "-m", "nf_pipeline", "train", "--store", str(store), "--model", FACTORY]
    words += [word for name, value in SMALL.items() for word in ("--set", f"{name}={value}")]
    environment = os.environ | {"PYTHONPATH": str(code), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (code / "imported").exists(), "the user named it"
    return f"{store}/run"


@pytest.fixture
def importable(code: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes the module importable; returns the file that appears when it is imported."""
    monkeypatch.syspath_prepend(str(code))
    trace = code / "imported"
    trace.unlink(missing_ok=True)
    return trace


def use(name: str) -> Callable[[str, Path, str | None], object]:
    data = DataConfig(source="digits")
    return {
        "resume": lambda uri, folder, model: resume(uri, model=model),
        "load_model": lambda uri, folder, model: load_model(uri, model=model),
        "evaluate": lambda uri, folder, model: evaluate(uri, data, model),
        "predict": lambda uri, folder, model: predict(uri, "digits", str(folder / "out.parquet"), model=model),
        "export": lambda uri, folder, model: export(uri, "safetensors", str(folder / "out.safetensors"), model),
        "Predictor": lambda uri, folder, model: Predictor(uri, model=model),
    }[name]


@pytest.mark.parametrize("command", ["resume", "load_model", "evaluate", "predict", "export", "Predictor"])
@pytest.mark.parametrize("named", [None, "another_network:make", "convnet", f"{FACTORY}_"])
def test_command_refuses_a_factory_that_the_user_did_not_name(
    command: str, named: str | None, uri: str, importable: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=FACTORY):
        use(command)(uri, tmp_path, named)
    assert MODULE not in sys.modules and not importable.exists()


def test_reading_about_a_run_imports_nothing(uri: str, importable: Path) -> None:
    assert read_status(uri)["state"] == "done"
    collect_garbage(uri, dry_run=True)
    assert MODULE not in sys.modules and not importable.exists()


def test_same_name_with_other_settings_does_not_import_what_the_run_there_names(uri: str, importable: Path) -> None:
    store, _, run = uri.rpartition("/")
    with pytest.raises(NFError):
        train(resolve_config(flags={**SMALL, "storage.uri": store, "run": run}))
    assert MODULE not in sys.modules and not importable.exists()


@pytest.mark.parametrize("document", ["run.json", "plan.json", "model.json"])
def test_run_whose_record_was_edited_to_name_a_factory_imports_nothing(
    document: str, importable: Path, tmp_path: Path
) -> None:
    config = resolve_config(flags={**SMALL, "storage.uri": str(tmp_path), "model.name": "convnet"})
    train(config)
    (edited,) = (path for path in tmp_path.rglob(document) if not path.is_symlink())
    content = json.loads(edited.read_text(encoding="utf8"))
    target = content["config"]["model"] if document == "run.json" else content
    target["name" if document == "run.json" else "model"] = FACTORY
    edited.write_text(json.dumps(content), encoding="utf8")
    (tmp_path / "run" / "summary.json").unlink()
    for command in ("resume", "evaluate", "predict", "Predictor"):
        try:
            use(command)(str(tmp_path / "run"), tmp_path, None)
        except NFError as error:
            assert str(error)
    try:
        train(config)  # what a submitted job does
    except NFError as error:
        assert str(error)
    assert MODULE not in sys.modules and not importable.exists()


def test_named_factory_is_used(uri: str, importable: Path) -> None:
    images = np.zeros((2, 8, 8), np.uint8)
    try:
        assert len(Predictor(uri, model=FACTORY)({"image": images})["prediction"]) == 2
        assert importable.exists()
    finally:
        sys.modules.pop(MODULE, None)
