"""The event log keeps what is needed, in bounded memory, however long the training."""

import json
from pathlib import Path

import pytest

from nf_pipeline.driver import event_log
from nf_pipeline.driver.event_log import EventLog
from nf_pipeline.events import EpochDone, StageDone, StageStarted
from nf_pipeline.storage.store import Store, open_store

KEY = "run/events.jsonl"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path))


def epoch(stage: str, number: int) -> EpochDone:
    return EpochDone(
        stage=stage,
        epoch=number,
        num_epochs=1000,
        losses=[1.0],
        val_accuracies=[0.5],
        images_per_s=1.0,
        loader_wait_s=0.0,
        peak_bytes=1,
    )


def read(store: Store) -> list[dict]:
    return [json.loads(line) for line in bytes(store.get(KEY)).splitlines()]


def test_log_of_many_epochs_forgets_older_ones_but_no_change_of_a_stage(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_log, "MAX_LOG_BYTES", 20_000)
    log = EventLog(store, KEY)
    for stage in ("block-000", "block-001"):
        log.add(StageStarted(stage=stage, attempt="a", worker="host:1"))
        for number in range(1, 301):
            log.add(epoch(stage, number))
        log.add(StageDone(stage=stage, result={}, seconds=1.0))
    log.flush()
    events = read(store)
    assert len(bytes(store.get(KEY))) < 20_000
    changes = [(event["stage"], event["event"]) for event in events if event["event"] != "EpochDone"]
    begin_and_end = ("StageStarted", "StageDone")
    assert changes == [(stage, event) for stage in ("block-000", "block-001") for event in begin_and_end]
    epochs = {stage: [e["epoch"] for e in events if e["stage"] == stage and "epoch" in e] for stage, _ in changes}
    assert epochs["block-000"] == [300], "the newest of a stage is what its status shows"
    assert epochs["block-001"] == list(range(epochs["block-001"][0], 301))


def test_log_that_is_long_without_epochs_is_kept_whole(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_log, "MAX_LOG_BYTES", 1000)
    log = EventLog(store, KEY)
    for number in range(100):
        log.add(StageStarted(stage="ingest", attempt=f"a{number}", worker="host:1"))
    log.flush()
    assert [event["attempt"] for event in read(store)] == [f"a{number}" for number in range(100)]


def test_damaged_line_of_a_long_log_ends_no_training(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_log, "MAX_LOG_BYTES", 1000)
    store.put(KEY, json.dumps(epoch("block-000", 1).to_json()).encode()[:60] + b"\n")
    log = EventLog(store, KEY)
    for number in range(20):
        log.add(epoch("block-000", number))
    log.flush()
    assert json.loads(bytes(store.get(KEY)).splitlines()[-1])["epoch"] == 19


def test_log_goes_on_where_an_earlier_driver_ended(store: Store) -> None:
    for attempt in ("a", "b"):
        log = EventLog(store, KEY)
        log.add(StageStarted(stage="ingest", attempt=attempt, worker="host:1"))
        log.flush()
    assert [event["attempt"] for event in read(store)] == ["a", "b"]
