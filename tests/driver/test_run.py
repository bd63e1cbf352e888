import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from driver_config import DIGITS

from nf_pipeline import load_model
from nf_pipeline.config import RunConfig, resolve_config
from nf_pipeline.driver.run import resume, train
from nf_pipeline.driver.run_record import load_run
from nf_pipeline.errors import (
    Diverged,
    ObjectCorrupt,
    ObjectMissing,
    PlanError,
    RunConflict,
    StorageError,
    WorkerLost,
)
from nf_pipeline.events import EpochDone, Event, StageDone, StageFailed, StageSkipped, StageStarted
from nf_pipeline.storage.sealed import seal, unseal
from nf_pipeline.worker.prepare import ingest_images
from nf_pipeline.worker.tasks import PrepareTask

MakeConfig = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The summary of an undisturbed run of the fast configuration."""
    flags = {**DIGITS, "storage.uri": str(tmp_path_factory.mktemp("straight"))}
    return train(resolve_config(flags=flags))


SUMMARY_KEYS = {
    "format_version",
    "run",
    "model",
    "dataset",
    "num_classes",
    "memory_budget_bytes",
    "executor",
    "seed",
    "profile_s",
    "wall_s",
    "blocks",
    "exits",
    "chosen_exit",
    "metric",
    "val_accuracy",
    "val_error",
    "val_error_corrected",
    "val_error_interval_corrected",
    "test_error",
    "test_error_interval",
    "test_accuracy",
    "val_optimism",
    "val_accuracy_corrected",
    "val_interval_corrected",
    "test_interval",
    "test_reads",
    "calibration",
    "early_exits",
    "params_full",
    "params_final",
    "stopped_early",
}
BLOCK_KEYS = {
    "block_idx",
    "layers",
    "batch_size",
    "source_block",
    "budget_bytes",
    "predicted_peak_bytes",
    "measured_peak_bytes",
    "train_s",
    "loader_wait_s",
    "write_s",
    "shard_bytes",
    "num_shards",
    "attempts",
    "worker",
}


def test_digits_are_learnt_within_the_budget(digits_config: MakeConfig) -> None:
    config = digits_config(data__max_train_images=1400, train__epochs=6)
    summary = train(config)
    assert summary["test_accuracy"] > 0.9
    assert len(summary["blocks"]) > 1
    for block in summary["blocks"]:
        assert block["measured_peak_bytes"] <= config.memory.budget_bytes
        assert block["predicted_peak_bytes"] == pytest.approx(block["measured_peak_bytes"], rel=0.1)


def test_summary_has_the_fields_that_scripts_rely_on(digits_config: MakeConfig) -> None:
    config = digits_config()
    summary = train(config)
    assert set(summary) >= SUMMARY_KEYS
    assert all(set(block) == BLOCK_KEYS for block in summary["blocks"])
    for exit in summary["exits"]:
        measured = {"val_accuracy", "val_interval", "val_error", "val_error_interval"}
        assert set(exit) == {"layer_idx", "layer", "params", "flops", *measured}
        assert exit["val_error"] is exit["val_error_interval"] is None
        assert exit["val_interval"][0] <= exit["val_accuracy"] <= exit["val_interval"][1]
    stored = unseal(Path(config.storage.uri, config.run, "summary.json").read_bytes())
    assert stored == json.loads(json.dumps(summary))


def test_events_tell_the_whole_run_in_order(digits_config: MakeConfig) -> None:
    events: list[Event] = []
    config = digits_config()
    summary = train(config, on_event=events.append)
    done = [event.stage for event in events if isinstance(event, StageDone)]
    blocks = [f"block-{idx:03d}" for idx in range(len(summary["blocks"]))]
    assert done == ["ingest", "plan", *blocks, "model"]
    assert sum(isinstance(event, EpochDone) for event in events) == 2 * len(blocks)
    lines = Path(config.storage.uri, config.run, "events.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in lines].count("StageDone") == len(done)


def test_finished_run_is_skipped_stage_by_stage(digits_config: MakeConfig) -> None:
    first = train(digits_config())
    events: list[Event] = []
    second = train(digits_config(), on_event=events.append)
    assert {type(event) for event in events} == {StageSkipped}
    assert second["weights_checksum"] == first["weights_checksum"]
    assert second["wall_s"] > 0


def test_resume_needs_only_the_uri(digits_config: MakeConfig) -> None:
    config = digits_config()
    first = train(config)
    assert resume(f"{config.storage.uri}/run")["weights_checksum"] == first["weights_checksum"]
    with pytest.raises(ObjectMissing, match="no run 'absent'"):
        resume(f"{config.storage.uri}/absent")


def test_name_taken_by_blocks_of_another_configuration_is_refused(digits_config: MakeConfig) -> None:
    train(digits_config())
    with pytest.raises(RunConflict, match=r"train\.epochs: there 2, here 3"):
        train(digits_config(train__epochs=3))


def test_advice_of_a_plan_error_can_be_followed_under_the_same_name(digits_config: MakeConfig) -> None:
    with pytest.raises(PlanError) as caught:
        train(digits_config(memory__budget_bytes="20KiB"))
    events: list[Event] = []
    enough = digits_config(memory__budget_bytes=caught.value.smallest_budget_bytes, train__epochs=1)
    train(enough, on_event=events.append)
    assert [e.stage for e in events if isinstance(e, StageSkipped)] == ["ingest"], "the images are kept"


def test_other_data_settings_before_any_block_read_the_images_again(digits_config: MakeConfig) -> None:
    with pytest.raises(PlanError):
        train(digits_config(memory__budget_bytes="20KiB"))
    summary = train(digits_config(data__max_train_images=300, train__epochs=1))
    assert sum(summary["split_rows"][split] for split in ("train", "val")) == 300


def test_number_of_threads_is_that_of_the_first_start(digits_config: MakeConfig) -> None:
    config = digits_config(cluster__num_threads=2, train__epochs=1)
    train(config)
    recorded = json.loads(Path(config.storage.uri, "run", "run.json").read_text())
    assert recorded["config"]["cluster"]["num_threads"] == 2
    assert load_run(f"{config.storage.uri}/run", {"executor": "ray"}).cluster.num_threads == 2


def test_split_smaller_than_a_batch_trains_on_every_row(digits_config: MakeConfig) -> None:
    summary = train(digits_config(data__max_train_images=60))
    rows = summary["split_rows"]["train"]
    assert max(block["batch_size"] for block in summary["blocks"]) == rows
    for block in summary["blocks"]:
        assert block["predicted_peak_bytes"] == pytest.approx(block["measured_peak_bytes"], rel=0.1)


def test_worker_that_does_not_see_the_drivers_store_says_so(digits_config: MakeConfig, tmp_path: Path) -> None:
    config = digits_config()
    elsewhere = config.model_copy(
        update={"storage": config.storage.model_copy(update={"uri": str(tmp_path / "other machine")})}
    )
    task = PrepareTask(config=elsewhere, attempt="0", num_threads=1)
    with pytest.raises(StorageError, match=r"does not see run/run\.json"):
        list(ingest_images(task))


def test_attempt_lost_after_its_commit_is_not_repeated(digits_config: MakeConfig, straight: dict) -> None:
    lost: list[Event] = []
    events: list[Event] = []

    def lose_once(event: Event) -> None:
        events.append(event)
        if isinstance(event, StageDone) and event.stage == "block-000" and not lost:
            lost.append(event)
            raise WorkerLost("block-000", "died after its commit")

    summary = train(digits_config(run="lost"), on_event=lose_once)
    assert lost
    assert sum(isinstance(e, StageStarted) and e.stage == "block-000" for e in events) == 1
    assert summary["weights_checksum"] == straight["weights_checksum"]


def test_same_seed_gives_the_same_weights_and_another_seed_others(digits_config: MakeConfig) -> None:
    a, b, c = (
        train(digits_config(run=name, train__seed=seed))["weights_checksum"]
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert a == b != c


@pytest.mark.parametrize("after_epochs", [1, 2, 3, 5])
def test_run_stopped_after_any_epoch_ends_with_the_same_weights(digits_config: MakeConfig, after_epochs: int) -> None:
    straight = train(digits_config(run="straight", train__epochs=3))
    config = digits_config(run="stopped", train__epochs=3)

    def stop(event: Event) -> None:
        nonlocal after_epochs
        after_epochs -= isinstance(event, EpochDone)
        if after_epochs == 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, on_event=stop)
    events: list[Event] = []
    resumed = train(config, on_event=events.append)
    assert resumed["weights_checksum"] == straight["weights_checksum"]
    assert [e["val_accuracy"] for e in resumed["exits"]] == [e["val_accuracy"] for e in straight["exits"]]
    first = next(e for e in events if isinstance(e, StageStarted) and e.stage.startswith("block"))
    assert first.resumed_epochs > 0
    assert sum(block["attempts"] for block in resumed["blocks"]) == len(resumed["blocks"]) + 1


@pytest.mark.parametrize(
    ("event", "stage"),
    [
        ("Progress", "ingest"),
        ("StageDone", "ingest"),
        ("StageStarted", "plan"),
        ("StageDone", "plan"),
        ("EpochDone", "block-001"),
        ("StageDone", "block-001"),
        ("StageStarted", "model"),
        ("StageDone", "model"),
    ],
)
def test_killed_run_resumes_to_the_same_weights(
    digits_config: MakeConfig, straight: dict, event: str, stage: str
) -> None:
    config = digits_config(run="killed")
    script = (
        "import json, os, signal, sys\n"
        "from nf_pipeline.config import validate_config\n"
        "from nf_pipeline.driver.run import train\n"
        "def kill(event):\n"
        f"    if (type(event).__name__, event.stage) == ({event!r}, {stage!r}):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "train(validate_config(json.load(sys.stdin)), on_event=kill)\n"
    )
    killed = subprocess.run(
        [sys.executable, "-c", script],
        input=config.model_dump_json(),
        text=True,
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert resume(f"{config.storage.uri}/killed")["weights_checksum"] == straight["weights_checksum"]


def test_loaded_model_reproduces_the_test_accuracy_of_the_summary(digits_config: MakeConfig) -> None:
    config = digits_config()
    summary = train(config)
    uri = f"{config.storage.uri}/{config.run}"
    model = load_model(uri)
    assert model.card.test_accuracy == summary["test_accuracy"]
    assert sum(p.numel() for p in model.parameters()) == summary["params_final"]
    logits_NK = model(torch.zeros(3, *model.card.inputs.shape, dtype=torch.uint8))
    assert logits_NK.shape == (3, 10)


def test_model_with_other_weights_is_refused(digits_config: MakeConfig) -> None:
    config = digits_config()
    train(config)
    weights = Path(config.storage.uri, config.run, "model", "model.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ObjectCorrupt, match="checksum"):
        load_model(f"{config.storage.uri}/{config.run}")


def test_missing_shard_of_a_finished_block_is_named(digits_config: MakeConfig) -> None:
    config = digits_config()
    train(config)
    block = Path(config.storage.uri, config.run, "blocks", "000")
    shard = next(block.rglob("train-00000.parquet"))
    shard.unlink()
    with pytest.raises(ObjectCorrupt, match=r"train-00000\.parquet"):
        train(config)


def test_deleted_manifest_repeats_exactly_that_stage(digits_config: MakeConfig) -> None:
    config = digits_config()
    first = train(config)
    Path(config.storage.uri, config.run, "blocks", "001", "manifest.json").unlink()
    events: list[Event] = []
    second = train(config, on_event=events.append)
    assert [e.stage for e in events if isinstance(e, StageStarted)] == ["block-001"]
    assert second["weights_checksum"] == first["weights_checksum"]


def test_budget_that_fits_nothing_names_the_smallest_that_works(digits_config: MakeConfig) -> None:
    with pytest.raises(PlanError) as caught:
        train(digits_config(memory__budget_bytes="20KiB"))
    smallest = caught.value.smallest_budget_bytes
    summary = train(digits_config(run="smallest", memory__budget_bytes=smallest, train__epochs=1))
    assert all(block["measured_peak_bytes"] <= smallest for block in summary["blocks"])
    with pytest.raises(PlanError):
        train(digits_config(run="below", memory__budget_bytes=int(smallest * 0.98)))


def test_exploding_loss_ends_the_run_with_epoch_and_step(digits_config: MakeConfig) -> None:
    events: list[Event] = []
    with pytest.raises(Diverged, match=r"block-000: loss .* in epoch \d+, step \d+"):
        train(digits_config(train__lr=100.0, train__epochs=20), on_event=events.append)
    assert isinstance(events[-1], StageFailed)


def test_measured_peak_over_the_budget_shrinks_the_batch_and_says_so(digits_config: MakeConfig) -> None:
    config = digits_config()
    with pytest.raises(KeyboardInterrupt):
        train(config, on_event=_interrupt_at_block_0)
    plan_json = Path(config.storage.uri, config.run, "plan.json")
    plan = unseal(plan_json.read_bytes())
    planned = plan["blocks"][0]["batch_size"]
    plan["blocks"][0]["batch_size"] = planned * 5 // 4  # a plan that promises more than the budget holds
    plan_json.write_bytes(seal(plan))
    events: list[Event] = []
    summary = train(config, on_event=events.append)
    failure = next(event for event in events if isinstance(event, StageFailed))
    assert (failure.stage, failure.error) == ("block-000", "OutOfBudget")
    assert summary["blocks"][0]["batch_size"] < planned
    assert summary["blocks"][0]["attempts"] == 2
    assert summary["blocks"][0]["measured_peak_bytes"] <= config.memory.budget_bytes


def _interrupt_at_block_0(event: Event) -> None:
    if isinstance(event, StageStarted) and event.stage == "block-000":
        raise KeyboardInterrupt


def test_moved_store_resumes_where_it_is_found(digits_config: MakeConfig, tmp_path: Path) -> None:
    config = digits_config()
    first = train(config)
    shutil.move(config.storage.uri, tmp_path / "elsewhere")
    Path(tmp_path, "elsewhere", "run", "model", "manifest.json").unlink()
    assert resume(f"{tmp_path}/elsewhere/run")["weights_checksum"] == first["weights_checksum"]
    assert not os.path.exists(config.storage.uri)
