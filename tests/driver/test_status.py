"""Status of runs in a local store, from what the driver's own writers left there."""

import json
import time
from pathlib import Path

import pytest
from small_plans import chain_plan

from nf_pipeline.config import FORMAT_VERSION, validate_config
from nf_pipeline.driver.event_log import EventLog
from nf_pipeline.driver.run_record import open_run
from nf_pipeline.driver.status import overall_state, read_plan, read_status
from nf_pipeline.errors import ConfigError, ObjectCorrupt, ObjectMissing
from nf_pipeline.events import EpochDone, Event, StageDone, StageFailed, StageSkipped, StageStarted
from nf_pipeline.storage.layout import RunLayout
from nf_pipeline.storage.manifest import StageManifest, commit_manifest
from nf_pipeline.storage.sealed import seal
from nf_pipeline.storage.store import Store, open_store

LAYOUT = RunLayout("run")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = open_store(str(tmp_path))
    config = validate_config({"run": "run", "memory": {"budget_bytes": "64MiB"}, "storage": {"uri": str(tmp_path)}})
    open_run(store, LAYOUT, config, default_threads=1)
    return store


def put_plan(store: Store, num_blocks: int) -> None:
    document = {"format_version": FORMAT_VERSION, "fingerprint": "f", **chain_plan(num_blocks).to_json()}
    store.put(LAYOUT.plan_json, seal(document))


def commit(store: Store, stage: str, key: str) -> None:
    commit_manifest(store, key, StageManifest(stage=stage, fingerprint="f", attempt="aa"))


def log(store: Store, *events: Event) -> None:
    writer = EventLog(store, LAYOUT.events_jsonl)
    for event in events:
        writer.add(event)
    writer.flush()


def started(stage: str, attempt: str, resumed_epochs: int = 0) -> StageStarted:
    return StageStarted(stage=stage, attempt=attempt, worker="host:1", resumed_epochs=resumed_epochs)


def epoch_done(stage: str, epoch: int, time_s: float | None = None) -> EpochDone:
    return EpochDone(
        stage=stage,
        time_s=time.time() if time_s is None else time_s,
        epoch=epoch,
        num_epochs=8,
        losses=[2.0, 1.0],
        val_accuracies=[0.5, 0.75],
        images_per_s=100.0,
        loader_wait_s=0.0,
        peak_bytes=1000,
    )


def stages_of(store: Store) -> dict[str, dict]:
    return {stage["stage"]: stage for stage in read_status(f"{store.uri}/run")["stages"]}


def states_of(store: Store) -> dict[str, str]:
    return {name: stage["state"] for name, stage in stages_of(store).items()}


def test_status_of_a_run_that_just_began_waits_for_everything(store: Store) -> None:
    assert states_of(store) == {"ingest": "waiting", "plan": "waiting", "model": "waiting"}


def test_status_follows_commits_and_the_newest_events(store: Store) -> None:
    commit(store, "ingest", LAYOUT.ingest_manifest)
    put_plan(store, 3)
    commit(store, "block-000", LAYOUT.block_manifest(0))
    log(store, started("block-000", "aa"), epoch_done("block-000", 8), started("block-001", "bb"))
    log(store, epoch_done("block-001", 3))
    assert states_of(store) == {
        "ingest": "done",
        "plan": "done",
        "block-000": "done",
        "block-001": "running",
        "block-002": "waiting",
        "model": "waiting",
    }
    block = stages_of(store)["block-001"]
    assert (block["attempt"], block["attempts"], block["epoch"], block["num_epochs"]) == ("bb", 1, 3, 8)
    assert (block["loss"], block["val_accuracy"], block["peak_bytes"]) == (1.0, 0.75, 1000)
    assert read_status(f"{store.uri}/run")["state"] == "running"


def test_stage_that_failed_keeps_its_error_until_a_new_attempt_runs(store: Store) -> None:
    put_plan(store, 1)
    failed = StageFailed(stage="block-000", attempt="aa", error="WorkerLost", text="gone")
    log(store, started("block-000", "aa"), failed)
    assert stages_of(store)["block-000"]["state"] == "failed"
    assert stages_of(store)["block-000"]["error"] == "WorkerLost: gone"
    log(store, started("block-000", "bb", resumed_epochs=5))
    block = stages_of(store)["block-000"]
    assert (block["state"], block["attempt"], block["attempts"], block["epoch"]) == ("running", "bb", 2, 5)


def test_events_without_a_commit_never_make_a_stage_done(store: Store) -> None:
    log(store, started("ingest", "aa"), StageDone(stage="ingest", result={}, seconds=3.0))
    assert stages_of(store)["ingest"]["state"] != "done"


def test_commit_without_events_is_done(store: Store) -> None:
    commit(store, "ingest", LAYOUT.ingest_manifest)
    assert stages_of(store)["ingest"]["state"] == "done"
    assert stages_of(store)["ingest"]["updated_s"] is None


def test_updated_counts_from_the_last_event_of_any_kind(store: Store) -> None:
    put_plan(store, 1)
    log(store, started("block-000", "aa"), epoch_done("block-000", 1, time_s=time.time() - 500))
    assert 500 <= stages_of(store)["block-000"]["updated_s"] < 600
    log(store, StageSkipped(stage="block-000"))
    assert stages_of(store)["block-000"]["updated_s"] < 100


def test_run_with_a_final_model_is_done_even_if_it_stopped_early(store: Store) -> None:
    put_plan(store, 2)
    commit(store, "model", LAYOUT.model_manifest)
    assert read_status(f"{store.uri}/run")["state"] == "done"


@pytest.mark.parametrize(
    ("states", "overall"),
    [
        (["done", "done"], "done"),
        (["waiting", "done"], "done"),
        (["done", "failed", "running", "waiting"], "failed"),
        (["done", "running", "waiting"], "running"),
        (["done", "waiting"], "waiting"),
    ],
)
def test_overall_state_is_that_of_the_stage_that_matters_most(states: list[str], overall: str) -> None:
    assert overall_state(states) == overall


def test_status_is_json(store: Store) -> None:
    put_plan(store, 1)
    status = read_status(f"{store.uri}/run")
    assert json.loads(json.dumps(status)) == status
    assert len(status["fingerprint"]) == 16


def test_status_of_an_absent_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ObjectMissing, match="there is no run 'absent'"):
        read_status(f"{tmp_path}/absent")
    with pytest.raises(ConfigError):
        read_status("")


@pytest.mark.parametrize("key", [LAYOUT.run_json, LAYOUT.plan_json, LAYOUT.events_jsonl])
def test_status_with_an_unreadable_object_names_it(store: Store, key: str) -> None:
    store.put(key, b'{"cut off": ')
    with pytest.raises(ObjectCorrupt, match=key):
        read_status(f"{store.uri}/run")


def test_read_plan_gives_back_the_stored_plan(store: Store) -> None:
    assert read_plan(f"{store.uri}/run") is None
    put_plan(store, 2)
    assert read_plan(f"{store.uri}/run") == chain_plan(2)


def test_read_plan_of_another_document_is_corrupt(store: Store) -> None:
    store.put(LAYOUT.plan_json, b'{"blocks": []}')
    with pytest.raises(ObjectCorrupt, match=r"plan\.json"):
        read_plan(f"{store.uri}/run")
