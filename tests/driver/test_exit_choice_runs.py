"""Runs choose on the validation split, commit what they chose, and only then see the labels of the test split."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from damaged_runs import Run, config_of, edit, finish, flip_bit

from nf_pipeline import load_early_exit_model, load_model
from nf_pipeline.cli import main
from nf_pipeline.config import DataConfig
from nf_pipeline.core.early_exit_model import all_logits
from nf_pipeline.core.hits import Hits
from nf_pipeline.data.held_out import UNKNOWN
from nf_pipeline.data.predictor import classify
from nf_pipeline.driver.early_exit_wish import EarlyExitWish
from nf_pipeline.driver.evaluation import evaluate_adaptive
from nf_pipeline.driver.run import resume, train
from nf_pipeline.driver.run_record import load_plan
from nf_pipeline.driver.use import predict
from nf_pipeline.driver.verify import verify_run
from nf_pipeline.errors import ConfigError, ObjectCorrupt, ObjectMissing
from nf_pipeline.events import Event, Note, StageStarted
from nf_pipeline.storage.layout import RunLayout
from nf_pipeline.storage.manifest import read_manifest
from nf_pipeline.storage.sealed import unseal
from nf_pipeline.storage.store import open_store
from nf_pipeline.worker import assemble
from nf_pipeline.worker.choice import read_test_labels
from nf_pipeline.worker.decide import list_exits
from nf_pipeline.worker.feed import open_feed

LAYOUT = RunLayout("run")
LEARNING = {"data__max_train_images": 600, "train__epochs": 3, "exits__keep": "all"}


@pytest.fixture(scope="module")
def kept_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that has learnt something and kept all exits; nobody may change it."""
    return finish(tmp_path_factory.mktemp("kept") / "runs", **LEARNING)


def pixels_and_labels(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Returns pixels and labels of a run's test split, as somebody who has the data sees them."""
    store = open_store(str(run.store))
    ingest = read_manifest(store, LAYOUT.ingest_manifest)
    labels = read_test_labels(store, ingest, store, "run/model/choice-00000.json")
    batches = list(open_feed(store, ingest, "test", batch_size=1000, device=torch.device("cpu")).batches())
    ids = np.concatenate([batch.sample_ids for batch in batches])
    paths = sorted(run.folder.glob("ingest/*/test-*.parquet"))
    tensors = [row for path in paths for row in pq.read_table(path)["tensor"].to_pylist()]
    pixels = np.frombuffer(b"".join(tensors), np.uint8).reshape(-1, *ingest.spec.shape).copy()
    return pixels, labels.of(ids)


def test_every_reader_of_the_test_split_finds_no_label(kept_run: Run) -> None:
    store = open_store(str(kept_run.store))
    ingest = read_manifest(store, LAYOUT.ingest_manifest)
    for path in kept_run.folder.glob("ingest/*/test-*.parquet"):
        assert set(pq.read_table(path)["label"].to_pylist()) == {UNKNOWN}
    for batch in open_feed(store, ingest, "test", batch_size=64, device=torch.device("cpu")).batches():
        assert set(batch.y_N.tolist()) == {UNKNOWN}
    for split in ("train", "val"):
        for batch in open_feed(store, ingest, split, batch_size=64, device=torch.device("cpu")).batches():
            assert batch.y_N.min() >= 0


def test_labels_of_a_run_that_has_not_chosen_are_refused(kept_run: Run, tmp_path: Path) -> None:
    run = kept_run.copy(tmp_path / "runs")
    run.path("model/choice-*.json").unlink()
    store = open_store(str(run.store))
    with pytest.raises(ObjectMissing, match="not read before an exit is chosen"):
        read_test_labels(store, read_manifest(store, LAYOUT.ingest_manifest), store, "run/model/choice-00000.json")


def test_summary_and_card_say_what_the_choice_is_worth(kept_run: Run) -> None:
    summary = kept_run.summary
    low, high = summary["val_interval_corrected"]
    plain = summary["exits"][summary["chosen_exit"]]["val_interval"]
    assert low < plain[0] < plain[1] < high
    assert summary["val_accuracy_corrected"] == pytest.approx(summary["val_accuracy"] - summary["val_optimism"])
    assert summary["test_interval"][0] < summary["test_accuracy"] < summary["test_interval"][1]
    assert summary["test_reads"] == 1
    assert "val_hits" not in json.dumps(summary)
    card = run_text(kept_run, "model/README.md")
    for part in ("corrected for the choice", "read once", "calibration error", "load_early_exit_model"):
        assert part in card


def run_text(run: Run, name: str) -> str:
    return (run.folder / name).read_text()


def test_temperature_lowers_the_cross_entropy_and_makes_the_probabilities_of_predictions(kept_run: Run) -> None:
    found, model = kept_run.summary["calibration"], load_model(kept_run.uri)
    assert found["cross_entropy_after"] <= found["cross_entropy_before"]
    assert model.card.temperature == found["temperature"] != 1.0
    pixels, labels = pixels_and_labels(kept_run)
    predicted, probability = classify(model, pixels)
    logits_NK = model(torch.from_numpy(pixels)).detach()
    assert (predicted == logits_NK.argmax(dim=1).numpy()).all()
    expected = (logits_NK / found["temperature"]).softmax(dim=1).amax(dim=1).numpy()
    np.testing.assert_allclose(probability, expected, rtol=1e-5)
    assert (predicted == labels).mean() == pytest.approx(kept_run.summary["test_accuracy"])


def test_stored_hits_are_the_samples_that_the_exits_get_right_in_the_order_of_the_split(kept_run: Run) -> None:
    paths = sorted(kept_run.folder.glob("blocks/*/manifest.json"))
    facts = [unseal(path.read_bytes())["facts"] for path in paths]
    stored = [Hits.from_text(text, one["num_val"]).unpacked() for one in facts for text in one["val_hits"]]
    store = open_store(str(kept_run.store))
    ingest = read_manifest(store, LAYOUT.ingest_manifest)
    model = load_early_exit_model(kept_run.uri)
    (batch,) = open_feed(store, ingest, "val", batch_size=1000, device=torch.device("cpu")).batches()
    pixels_NCHW = batch.take_x() * model.final.normalise.std_C + model.final.normalise.mean_C
    heads, stops = list(model.heads), [one["layer_idx"] + 1 for one in kept_run.summary["exits"]][: len(model.heads)]
    for right_N, logits_NK in zip(stored, all_logits(model.final, heads, stops, pixels_NCHW), strict=False):
        found_N = (logits_NK.argmax(dim=1) == batch.y_N).numpy()
        # Later blocks were validated on activations of 16 bits.
        assert (found_N != right_N).mean() <= 0.02 < (found_N != np.roll(right_N, 1)).mean()
    assert "val_hits" not in run_text(kept_run, "events.jsonl")


HITS: dict[str, Callable[[dict[str, Any]], object]] = {
    "missing": lambda facts: facts.pop("val_hits"),
    "of another exit": lambda facts: facts.update(val_hits=[facts["val_hits"][0][::-1]]),
    "too short": lambda facts: facts.update(val_hits=[text[:-4] for text in facts["val_hits"]]),
    "no text": lambda facts: facts.update(val_hits=[1]),
}


@pytest.mark.parametrize("change", HITS)
def test_hits_that_do_not_fit_the_counts_are_damage(finished_run: Run, tmp_path: Path, change: str) -> None:
    run = finished_run.copy(tmp_path / "runs")
    edit(run.path("blocks/001/manifest.json"), lambda document: HITS[change](document["facts"]))
    assert [problem.stage for problem in verify_run(run.uri).problems] == ["block-001"]
    with pytest.raises(ObjectCorrupt, match="val_hits"):
        resume(run.uri)
    assert resume(run.uri, repair=True)["weights_checksum"] == finished_run.summary["weights_checksum"]


def stop_at(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the last stage die where a function is called."""

    def die(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(assemble, name, die)


def test_stage_that_died_between_choice_and_commit_goes_on_with_the_same_choice(
    tmp_path: Path, finished_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished_run.copy(tmp_path / "runs")
    (run.folder / "model/manifest.json").unlink()
    before = run_text(run, "model/choice-00000.json")
    with monkeypatch.context() as patch:
        stop_at("choose_exit", patch)  # it must not be asked again
        summary = resume(run.uri)
    assert run_text(run, "model/choice-00000.json") == before
    assert (summary["test_reads"], summary["weights_checksum"]) == (1, finished_run.summary["weights_checksum"])


def test_choice_is_there_before_the_labels_are_read(
    tmp_path: Path, finished_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished_run.copy(tmp_path / "runs")
    for name in ("manifest.json", "choice-00000.json"):
        (run.folder / "model" / name).unlink()
    with monkeypatch.context() as patch:
        stop_at("read_test_labels", patch)
        with pytest.raises(KeyboardInterrupt):
            resume(run.uri)
    assert (run.folder / "model/choice-00000.json").exists()
    assert verify_run(run.uri).is_whole
    assert resume(run.uri)["test_reads"] == 1


def test_damaged_choice_without_a_model_is_named_and_made_again(tmp_path: Path, finished_run: Run) -> None:
    run = finished_run.copy(tmp_path / "runs")
    (run.folder / "model/manifest.json").unlink()
    flip_bit(run.path("model/choice-00000.json"))
    assert [problem.key for problem in verify_run(run.uri).problems] == ["run/model/choice-00000.json"]
    with pytest.raises(ObjectCorrupt, match=r"choice-00000\.json"):
        resume(run.uri)
    assert resume(run.uri, repair=True)["weights_checksum"] == finished_run.summary["weights_checksum"]


@pytest.mark.parametrize("damage", ["flipped", "missing"])
@pytest.mark.parametrize(
    "pattern", ["model/choice-*.json", "ingest/*/held-out-labels.parquet", "model/early_exits.*"]
)
def test_damage_to_what_the_choice_needs_is_named_and_repaired(
    tmp_path: Path, kept_run: Run, pattern: str, damage: str
) -> None:
    run = kept_run.copy(tmp_path / "runs")
    key = run.key(pattern)
    flip_bit(run.path(pattern)) if damage == "flipped" else run.path(pattern).unlink()
    assert [problem.key for problem in verify_run(run.uri).problems] == [key]
    events: list[Event] = []
    summary = resume(run.uri, repair=True, on_event=events.append)
    stage = "ingest" if "ingest" in pattern else "model"
    assert [event.stage for event in events if isinstance(event, StageStarted)] == [stage]
    assert summary["weights_checksum"] == kept_run.summary["weights_checksum"]
    assert verify_run(run.uri).is_whole


def test_choice_made_anew_over_more_blocks_is_counted_and_said(tmp_path: Path) -> None:
    hopeless = {"train__lr": 1e-7, "train__epochs": 1, "memory__join_threshold": 0.0, "exits__patience": 1}
    run = finish(tmp_path / "runs", **hopeless)
    assert run.summary["stopped_early"] and run.summary["test_reads"] == 1
    events: list[Event] = []
    summary = resume(run.uri, patience="never", on_event=events.append)
    assert summary["test_reads"] == 2
    assert any(isinstance(event, Note) and "test split is read again, for choice 2" in event.text for event in events)
    assert "read 2 times" in run_text(run, "model/README.md")
    assert verify_run(run.uri).is_whole
    assert train(config_of(run.store, **hopeless))["test_reads"] == 2


def test_early_exits_leave_as_was_measured_and_stop_computing(kept_run: Run) -> None:
    early = kept_run.summary["early_exits"]
    assert [one["layer_idx"] for one in early["exits"]] == [
        one["layer_idx"] for one in kept_run.summary["exits"][: kept_run.summary["chosen_exit"] + 1]
    ]
    pixels, labels = pixels_and_labels(kept_run)
    model = load_early_exit_model(kept_run.uri)
    for point in early["points"]:
        logits_NK, _ = model.with_flops(point["val_flops"])(torch.from_numpy(pixels))
        accuracy = float((logits_NK.argmax(dim=1).numpy() == labels).mean())
        assert accuracy == pytest.approx(point["test_accuracy"], abs=1.5 / len(labels))
    assert model.exit_layers == tuple(one["layer"] for one in early["exits"])
    assert model.point.val_accuracy >= early["val_accuracy"]


def test_curve_begins_below_the_cost_of_the_chosen_exit_and_ends_as_accurate(kept_run: Run) -> None:
    early = kept_run.summary["early_exits"]
    points = early["points"]
    assert points[-1]["val_accuracy"] >= early["val_accuracy"]
    if kept_run.summary["chosen_exit"] > 0:
        assert points[0]["val_flops"] < early["flops"]
    for point in points:
        assert 0 <= point["test_accuracy"] <= 1 and point["test_flops"] > 0


@pytest.mark.parametrize("wish", [{}, {"accuracy": 0.5}, {"flops": 1e9}])
def test_predictions_with_early_exits_name_the_exit_of_each_image(
    kept_run: Run, tmp_path: Path, wish: dict[str, float]
) -> None:
    output = str(tmp_path / "out.parquet")
    written = predict(kept_run.uri, "digits", output, early_exits=EarlyExitWish(**wish))
    table = pq.read_table(output)
    layers = [one["layer"] for one in kept_run.summary["early_exits"]["exits"]]
    assert list(written["rows_by_exit"]) == layers
    assert {layer: table["exit"].to_pylist().count(layer) for layer in layers} == written["rows_by_exit"]
    assert written["rows"] == len(table) == 1797
    plain = predict(kept_run.uri, "digits", output)
    assert "rows_by_exit" not in plain


def test_command_lets_images_leave_early_and_refuses_what_no_point_has(
    kept_run: Run, finished_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["digits", "--output", str(tmp_path / "out.parquet"), "--json"]
    assert main(["predict", kept_run.uri, *arguments, "--adaptive"]) == 0
    assert sum(json.loads(capsys.readouterr().out)["rows_by_exit"].values()) == 1797
    assert main(["predict", kept_run.uri, *arguments, "--flops", "1"]) == 2
    assert "the cheapest operating point takes" in capsys.readouterr().err
    assert main(["predict", finished_run.uri, *arguments, "--accuracy", "0.5"]) == 4
    assert "--exits all" in capsys.readouterr().err


def test_evaluation_with_early_exits_counts_what_leaves_where(kept_run: Run) -> None:
    pixels, labels = pixels_and_labels(kept_run)
    found = evaluate_adaptive(kept_run.uri, DataConfig(source="digits"), EarlyExitWish(accuracy=0.5))
    model = load_early_exit_model(kept_run.uri).with_accuracy(0.5)
    assert found["num_images"] == 1797 and sum(exit["share"] for exit in found["exits"]) == pytest.approx(1.0)
    assert [exit["layer"] for exit in found["exits"]] == list(model.exit_layers)
    assert found["interval"][0] < found["accuracy"] < found["interval"][1]
    assert (found["val_accuracy"], found["threshold"]) == (model.point.val_accuracy, model.point.threshold)
    # The test split is part of the digits; the others are as easy.
    on_test = float((model(torch.from_numpy(pixels)).logits_NK.argmax(dim=1).numpy() == labels).mean())
    assert found["accuracy"] == pytest.approx(on_test, abs=0.12)
    flops = [exit["flops"] for exit in kept_run.summary["exits"]]
    shares = [exit["share"] for exit in found["exits"]]
    assert min(flops) <= found["flops"] <= sum(share * cost for share, cost in zip(shares, flops, strict=False)) * 1.2
    assert found["flops_final"] == flops[kept_run.summary["chosen_exit"]]


def test_command_measures_early_exits_and_says_what_is_missing(
    kept_run: Run, finished_run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", kept_run.uri, "--data", "digits", "--adaptive", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_images"] == 1797
    assert main(["evaluate", kept_run.uri, "--data", "digits", "--flops", "1e12"]) == 0
    assert "GFLOPs per sample" in capsys.readouterr().out
    assert main(["evaluate", finished_run.uri, "--data", "digits", "--adaptive"]) == 4
    assert "--exits all" in capsys.readouterr().err


INCONSISTENT: dict[str, Callable[[dict[str, Any]], object]] = {
    "too few temperatures": lambda choice: choice["early_exits"].update(temperatures=[1.0]),
    "no early exits": lambda choice: choice.update(early_exits=None),
    "no calibration": lambda choice: choice.update(calibration=None),
}


@pytest.mark.parametrize("change", INCONSISTENT)
def test_choice_that_does_not_fit_the_run_is_damage(kept_run: Run, tmp_path: Path, change: str) -> None:
    run = kept_run.copy(tmp_path / "runs")
    (run.folder / "model/manifest.json").unlink()
    edit(run.path("model/choice-00000.json"), INCONSISTENT[change])
    if change == "too few temperatures" and kept_run.summary["chosen_exit"] == 0:
        pytest.skip("one temperature is right for the first exit")
    with pytest.raises(ObjectCorrupt, match=r"choice-00000\.json"):
        resume(run.uri)


def test_error_about_results_of_an_exit_names_its_block(kept_run: Run) -> None:
    store = open_store(str(kept_run.store))
    plan = load_plan(store, LAYOUT)
    facts = [dict(read_manifest(store, LAYOUT.block_manifest(idx)).facts) for idx in range(len(plan.blocks))]
    for broken in ([facts[1]["val_hits"][0][:-4]], [], ["ä"]):
        with pytest.raises(ObjectCorrupt, match=r"block-001 is damaged: facts\.val_hits"):
            list_exits(plan, [facts[0], {**facts[1], "val_hits": broken}, *facts[2:]])


def test_two_wishes_at_once_are_refused() -> None:
    with pytest.raises(ConfigError, match="give one"):
        EarlyExitWish(accuracy=0.5, flops=1.0)


def test_run_that_keeps_the_chosen_exit_alone_has_no_other_to_load(finished_run: Run) -> None:
    assert finished_run.summary["early_exits"] is None
    with pytest.raises(ObjectMissing, match="--exits all"):
        load_early_exit_model(finished_run.uri)
