"""Runs that predict values: exits are compared by error, and nothing of it says accuracy."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from damaged_runs import Run, config_of, edit, finish
from value_data import write_values

from nf_pipeline import load_model
from nf_pipeline.cli import main
from nf_pipeline.config import DataConfig
from nf_pipeline.core.sample_errors import SampleErrors
from nf_pipeline.data.images import open_labelled
from nf_pipeline.driver.evaluation import evaluate
from nf_pipeline.driver.run import resume, train
from nf_pipeline.driver.status import read_status
from nf_pipeline.driver.use import export, predict
from nf_pipeline.driver.verify import verify_run
from nf_pipeline.errors import ConfigError, ObjectCorrupt
from nf_pipeline.events import EpochDone, Event, StageDone
from nf_pipeline.model_files import ModelCard
from nf_pipeline.storage.sealed import unseal

VALUES = {"data__max_train_images": None, "train__epochs": 4, "train__lr": 0.02}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, np.ndarray]:
    """A file with pictures and two values each, and these."""
    path = tmp_path_factory.mktemp("data") / "values.parquet"
    return str(path), write_values(path)


@pytest.fixture(scope="module")
def value_run(tmp_path_factory: pytest.TempPathFactory, data: tuple[str, np.ndarray]) -> Run:
    """A run that has learnt something; nobody may change it."""
    return finish(tmp_path_factory.mktemp("values") / "runs", data__source=data[0], **VALUES)


def test_values_are_learnt_and_the_summary_names_errors_alone(value_run: Run) -> None:
    summary = value_run.summary
    assert (summary["metric"], summary["num_classes"], summary["calibration"]) == ("error", None, None)
    assert summary["val_error"] < 0.4 and summary["test_error"] < 0.5
    assert summary["val_error"] == summary["exits"][summary["chosen_exit"]]["val_error"]
    assert summary["val_error_corrected"] == pytest.approx(summary["val_error"] + summary["val_optimism"])
    for mean, interval in (("val_error_corrected", "val_error_interval_corrected"), ("test_error",) * 2):
        low, high = summary[interval if interval != mean else "test_error_interval"]
        assert low < summary[mean] < high
    for name in ("val_accuracy", "val_interval_corrected", "test_accuracy", "test_interval", "early_exits"):
        assert summary[name] is None
    for exit in summary["exits"]:
        assert exit["val_error_interval"][0] <= exit["val_error"] <= exit["val_error_interval"][1]
        assert exit["val_accuracy"] is exit["val_interval"] is None
    json.dumps(summary, allow_nan=False)


def test_finished_run_is_whole_and_its_card_and_status_say_error(value_run: Run) -> None:
    assert verify_run(value_run.uri).is_whole
    card = value_run.path("model/README.md").read_text()
    assert "predicts 2 values" in card and "| test error | error 0." in card
    assert "accuracy" not in card and "temperature" not in card
    blocks = [stage for stage in read_status(value_run.uri)["stages"] if stage["stage"].startswith("block")]
    assert all(stage["val_accuracy"] is None and stage["val_error"] > 0 for stage in blocks)


def test_stored_errors_are_those_of_the_exits_and_stay_out_of_the_events(value_run: Run) -> None:
    facts = [unseal(path.read_bytes())["facts"] for path in sorted(value_run.folder.glob("blocks/*/manifest.json"))]
    stored = [SampleErrors.from_text(t, one["num_val"]) for one in facts for t in one["val_sample_errors"]]
    assert [one.mean for one in stored] == [exit["val_error"] for exit in value_run.summary["exits"]]
    assert [error for one in facts for error in one["val_errors"]] == [one.mean for one in stored]
    assert "val_sample_errors" not in value_run.path("events.jsonl").read_text()


def test_model_returns_values_in_their_own_units(value_run: Run, data: tuple[str, np.ndarray]) -> None:
    model = load_model(value_run.uri)
    batches = list(open_labelled(DataConfig(source=data[0]), model.card.inputs, model.card.target, ()))
    images, labels = (np.concatenate([getattr(batch, name) for batch in batches]) for name in ("images", "labels"))
    with torch.no_grad():
        predicted_NK = model(torch.from_numpy(images)).numpy()
    error = ((predicted_NK - labels) / np.array(model.card.target.std)) ** 2
    assert error.mean() == pytest.approx(value_run.summary["val_error"], abs=0.15)
    rows = evaluate(value_run.uri, DataConfig(source=data[0]))
    (chosen,) = [row for row in rows if row["chosen"]]
    assert chosen["error"] == pytest.approx(float(error.mean()), rel=1e-3)
    assert chosen["interval"][0] < chosen["error"] < chosen["interval"][1]
    assert (model.card.temperature, model.card.val_accuracy, model.card.class_names) == (None, None, ())


def test_predictions_are_lists_of_values_with_the_exit(
    value_run: Run, data: tuple[str, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, values = data
    done = predict(value_run.uri, source, str(tmp_path / "out.parquet"), 64)
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.schema.names == ["id", "prediction", "exit"]
    predicted = np.array(table["prediction"].to_pylist())
    assert predicted.shape == values.shape and done["rows"] == len(values)
    assert np.corrcoef(predicted[:, 0], values[:, 0])[0, 1] > 0.7
    assert abs(predicted.mean(axis=0) - values.mean(axis=0)).max() < 0.3 * values.std(axis=0).max()
    assert main(["evaluate", value_run.uri, "--data", source]) == 0
    printed = capsys.readouterr().out
    assert "error" in printed and "accuracy" not in printed and "%" not in printed
    assert main(["evaluate", value_run.uri, "--data", source, "--adaptive"]) == 4


def test_exported_program_returns_values_in_their_own_units_too(value_run: Run, tmp_path: Path) -> None:
    model = load_model(value_run.uri)
    program = torch.export.load(export(value_run.uri, "torch-export", str(tmp_path / "model.pt2"))).module()
    pixels_NCHW = torch.randint(0, 256, (5, *model.card.inputs.shape), dtype=torch.uint8)
    torch.testing.assert_close(program(pixels_NCHW), model(pixels_NCHW))


@pytest.mark.parametrize("target", ["values", "class"])
def test_card_has_a_temperature_for_classes_alone(value_run: Run, target: str) -> None:
    document = json.loads(value_run.path("model/model.json").read_text())
    if target == "values":
        document["temperature"] = 1.5
    else:
        document |= {"target": {"kind": "class", "size": 2}, "class_names": ["a", "b"]}
    with pytest.raises(ObjectCorrupt, match="temperature"):
        ModelCard.from_json(document, "model.json")


def test_killed_run_of_values_goes_on_and_ends_with_the_same_weights(
    value_run: Run, data: tuple[str, np.ndarray], tmp_path: Path
) -> None:
    config = config_of(tmp_path / "runs", data__source=data[0], **VALUES)
    seen: list[Event] = []

    def kill(event: Event) -> None:
        seen.append(event)
        if isinstance(event, EpochDone) and (event.stage, event.epoch) == ("block-001", 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, on_event=kill)
    assert all(not event.val_accuracies and event.val_errors for event in seen if isinstance(event, EpochDone))
    assert all(
        "val_errors" in event.result for event in seen if isinstance(event, StageDone) and "block" in event.stage
    )
    summary = train(config)
    assert summary["weights_checksum"] == value_run.summary["weights_checksum"]
    assert summary["exits"] == value_run.summary["exits"]


ERRORS: dict[str, Callable[[dict[str, Any]], object]] = {
    "missing": lambda facts: facts.pop("val_sample_errors"),
    "too short": lambda facts: facts.update(val_sample_errors=[t[:-4] for t in facts["val_sample_errors"]]),
    "of another exit": lambda facts: facts.update(val_errors=[error + 1 for error in facts["val_errors"]]),
    "below zero": lambda facts: facts.update(val_errors=[-1.0]),
    "one too many": lambda facts: facts.update(val_errors=[1.0, *facts["val_errors"]]),
    "no results": lambda facts: (facts.pop("val_errors"), facts.pop("val_sample_errors"), facts.pop("num_val")),
}


@pytest.mark.parametrize("change", ERRORS)
def test_errors_that_cannot_be_are_damage_not_a_decision(value_run: Run, tmp_path: Path, change: str) -> None:
    run = value_run.copy(tmp_path / "runs")
    edit(run.path("blocks/001/manifest.json"), lambda document: ERRORS[change](document["facts"]))
    assert [problem.stage for problem in verify_run(run.uri).problems] == ["block-001"]
    with pytest.raises(ObjectCorrupt, match=r"val_(sample_)?errors"):
        resume(run.uri)


def test_rounds_of_a_pipelined_run_carry_errors(data: tuple[str, np.ndarray], tmp_path: Path) -> None:
    rounds = {"train__mode": "pipelined", "train__round_epochs": 1, "train__epochs": 2}
    run = finish(tmp_path / "runs", data__source=data[0], train__loss="huber", train__mixup=0.2, **rounds)
    assert all(exit["val_error"] > 0 for exit in run.summary["exits"])
    assert verify_run(run.uri).is_whole


def test_run_of_values_ends_early_where_errors_stop_falling(data: tuple[str, np.ndarray], tmp_path: Path) -> None:
    hopeless = {"train__lr": 1e-7, "train__epochs": 1, "memory__join_threshold": 0.0, "exits__patience": 1}
    summary = finish(tmp_path / "runs", data__source=data[0], **hopeless).summary
    assert summary["stopped_early"] and "not below its noise, which ends at error" in summary["stop_reason"]


@pytest.mark.parametrize(
    ("setting", "part"),
    [
        ({"exits__keep": "all"}, "exits.keep: got all"),
        ({"train__loss": "predsim"}, "train.loss: got predsim, which is for classes"),
        ({"train__label_smoothing": 0.1}, "train.label_smoothing: got 0.1"),
    ],
)
def test_settings_that_only_classes_have_end_the_run_when_it_is_planned(
    data: tuple[str, np.ndarray], tmp_path: Path, setting: dict[str, Any], part: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        finish(tmp_path / "runs", data__source=data[0], **setting)
    assert part in caught.value.what and caught.value.fix
