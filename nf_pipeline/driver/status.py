"""How far a run is, from its store alone: nothing is asked of a driver or a worker.

A stage is done when its commit exists; everything else comes from the run's event log, which says what
was last heard of a stage, not whether its worker still lives. Entry: `read_status`.
"""

import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from nf_pipeline.documents import parse_json, read_fields
from nf_pipeline.driver.run_record import load_plan, read_run
from nf_pipeline.driver.stages import commit_key, stage_names
from nf_pipeline.errors import ObjectCorrupt, ObjectMissing
from nf_pipeline.events import (
    EpochDone,
    Event,
    Note,
    Publishing,
    StageDone,
    StageFailed,
    StageNotNeeded,
    StageSkipped,
    StageStarted,
)
from nf_pipeline.plans import Plan
from nf_pipeline.run_uri import join_run_uri, split_run_uri
from nf_pipeline.storage.layout import RunLayout
from nf_pipeline.storage.store import Store, open_store

_LOOK_UP_THREADS = 8
_STATE_AFTER = {
    StageStarted: "running",
    EpochDone: "running",
    StageFailed: "failed",
    StageNotNeeded: "not needed",
}
_EVENTS = {kind.__name__: kind for kind in (*_STATE_AFTER, StageDone, StageSkipped, Publishing, Note)}


@dataclass(kw_only=True)
class StageStatus:
    """What is known of one stage.

    Attributes:
        stage: "ingest", "plan", "block-000", ..., "model".
        state: "done", "running", "failed", "waiting" or, of a block that the run ends without, "not needed"; a
            killed run stays "running" with an old `updated_s`.
        attempt: id of the newest attempt, None before the first.
        attempts: number of attempts so far; in a pipelined run those at the newest round.
        round_idx: 0-based newest round of a block; 0 where there is one.
        worker: host and process of the newest attempt.
        epoch, num_epochs: finished epochs and all epochs of a block; 0 where there are none or none yet.
        loss, val_accuracy, val_error: of the block's last unit in the last finished epoch; one of the latter two.
        peak_bytes: measured by the last finished epoch.
        updated_s: seconds since the last event, None before the first.
        seconds: wall time of the attempt that finished the stage.
        error: class and text of the last failure.
    """

    stage: str
    state: str = "waiting"
    attempt: str | None = None
    attempts: int = 0
    round_idx: int = 0
    worker: str | None = None
    epoch: int = 0
    num_epochs: int = 0
    loss: float | None = None
    val_accuracy: float | None = None
    val_error: float | None = None
    peak_bytes: int | None = None
    updated_s: float | None = None
    seconds: float | None = None
    error: str | None = None


def read_status(uri: str) -> dict[str, Any]:
    """Reads how far a run is.

    Args:
        uri: STORE/NAME.

    Returns:
        A JSON document: uri, run, fingerprint, state of the run as a whole, and `stages`, one document with
        the fields of `StageStatus` per stage in order.

    Raises:
        ObjectMissing: there is no such run.
        ObjectCorrupt: run.json, plan.json or the event log cannot be read.
    """
    store, layout = _open_run(uri)
    record = read_run(store, layout)
    if record is None:
        raise ObjectMissing(f"there is no run {layout.run!r}", store.uri, "check STORE/NAME")
    plan = _read_plan(store, layout)
    # Events before commits: a stage that ends in between then shows as done, never as running for ever.
    stages = _fold(stage_names(plan), _read_events(store, layout), time.time())
    for status, is_done in zip(stages, _committed(store, layout, stages), strict=True):
        if is_done:
            status.state = "done"
    return {
        "uri": join_run_uri(split_run_uri(uri)[0], layout.run),
        "run": layout.run,
        "fingerprint": record.get("fingerprint"),
        "state": overall_state([status.state for status in stages]),
        "stages": [asdict(status) for status in stages],
    }


def read_plan(uri: str) -> Plan | None:
    """Reads the plan of the run at STORE/NAME, None if there is none yet."""
    return _read_plan(*_open_run(uri))


def overall_state(states: list[str]) -> str:
    """Sums up the states of all stages in order; the last one, the final model, decides what "done" is."""
    if states[-1] == "done":
        return "done"
    for state in ("failed", "running"):
        if state in states:
            return state
    return "waiting"


def _committed(store: Store, layout: RunLayout, stages: Sequence[StageStatus]) -> list[bool]:
    """Looks for every stage's commit, several at a time: a deep network has a hundred blocks."""
    keys = [commit_key(layout, status.stage) for status in stages]
    with ThreadPoolExecutor(_LOOK_UP_THREADS, thread_name_prefix="status") as pool:
        return [size is not None for size in pool.map(store.size, keys)]


def _open_run(uri: str) -> tuple[Store, RunLayout]:
    store_uri, run = split_run_uri(uri)
    return open_store(store_uri), RunLayout(run)


def _read_plan(store: Store, layout: RunLayout) -> Plan | None:
    try:
        return load_plan(store, layout)
    except ObjectMissing:
        return None


def _read_events(store: Store, layout: RunLayout) -> list[Event]:
    try:
        lines = bytes(store.get(layout.events_jsonl)).splitlines()
    except ObjectMissing:
        return []
    events = []
    for number, line in enumerate(lines, start=1):
        try:
            events.append(_event(line) if line.strip() else None)
        except ValueError as error:
            raise ObjectCorrupt(
                f"{layout.events_jsonl}: line {number} is no event: {error}",
                store.uri,
                "delete it: only its history is lost",
            ) from None
    return [event for event in events if event is not None]


def _event(line: bytes) -> Event | None:
    """Reads one event; None for those that say nothing about a stage's state, or that a later version wrote."""
    document = parse_json(line)
    if not isinstance(document, dict):
        raise ValueError(f"got {type(document).__name__}, want an object")
    kind = _EVENTS.get(str(document.pop("event", "")))
    return None if kind is None else read_fields(kind, document)


def _fold(names: list[str], events: Iterable[Event], now_s: float) -> list[StageStatus]:
    statuses = {name: StageStatus(stage=name) for name in names}
    for event in events:
        status = statuses.get(event.stage)
        if status is None:
            continue
        status.state = _STATE_AFTER.get(type(event), status.state)
        status.updated_s = round(max(0.0, now_s - event.time_s), 1)
        _take(status, event)
    return list(statuses.values())


def _take(status: StageStatus, event: Event) -> None:
    if isinstance(event, StageStarted):
        status.attempt, status.worker = event.attempt, event.worker
        status.attempts = status.attempts + 1 if event.round_idx == status.round_idx else 1
        status.round_idx, status.epoch = event.round_idx, event.resumed_epochs
    elif isinstance(event, EpochDone):
        status.epoch, status.num_epochs = event.epoch, event.num_epochs
        status.loss = event.losses[-1] if event.losses else None
        status.val_accuracy = event.val_accuracies[-1] if event.val_accuracies else None
        status.val_error = event.val_errors[-1] if event.val_errors else None
        status.peak_bytes = event.peak_bytes
    elif isinstance(event, StageFailed):
        status.error = f"{event.error}: {event.text}"
    elif isinstance(event, StageDone):
        status.seconds = round(event.seconds, 3)
