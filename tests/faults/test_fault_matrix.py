"""Whatever breaks, a run on a real Ray and a real S3 server ends with the weights of an undisturbed one, bit for bit.

Every test is a row of the table that `make test-faults` writes: the fault, where it strikes, what it cost. By default
only one of each kind runs: a worker and its commit, a driver, the server.
"""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
from fault_proxy import Answer, At, Call, Fault, Hang, Request, Reset, Rule, Throttle
from fault_scene import (
    CHECKPOINT,
    CHECKPOINT_RECORD,
    INGEST,
    MANIFEST,
    MODEL,
    PLAN,
    SECOND_BLOCK,
    WRITING,
    Outcome,
    Scene,
    driver_process,
    kill_sender,
    run_to_end,
    wait_for_exit,
    when,
    workers_of,
)
from s3_servers import S3Server

from nf_pipeline.events import EpochDone, Event, StageFailed, StageStarted
from nf_pipeline.storage.layout import RunLayout
from nf_pipeline.storage.manifest import read_manifest
from nf_pipeline.storage.store import open_store

pytestmark = [pytest.mark.ray, pytest.mark.s3]

MIB = 2**20
slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("where", "path", "at"),
    [
        pytest.param("ingest, storing images", INGEST, At.REQUEST, marks=slow),
        pytest.param("checkpoint, half of it sent", CHECKPOINT, At.HALF_REQUEST, marks=slow),
        pytest.param("checkpoint stored, its record not", CHECKPOINT_RECORD, At.REQUEST, marks=slow),
        pytest.param("checkpoint record stored, not told", CHECKPOINT_RECORD, At.ANSWER, marks=slow),
        pytest.param("writing shards, one half sent", WRITING, At.HALF_REQUEST, marks=slow),
        pytest.param("between shards and manifest", MANIFEST, At.REQUEST, marks=slow),
        pytest.param("manifest stored, not told", MANIFEST, At.ANSWER, marks=slow),
        pytest.param("second block, checkpoint record", SECOND_BLOCK, At.REQUEST, marks=slow),
        pytest.param("model, storing weights", MODEL, At.REQUEST, marks=slow),
    ],
)
def test_worker_killed_at_a_request_is_replaced(scene: Scene, where: str, path: str, at: At) -> None:
    rule = scene.proxy.add(kill_sender(at=at, path=path))
    outcome = run_to_end(scene.config())
    assert outcome.lost_workers == 1
    scene.check("SIGKILL of the worker", where, len(rule.hits), outcome)


@slow
def test_worker_killed_in_training_is_replaced_and_goes_on_from_its_last_epoch(scene: Scene) -> None:
    killed: list[int] = []
    events: list[Event] = []

    def kill_once(event: Event) -> None:
        events.append(event)
        if isinstance(event, EpochDone) and not killed:
            killed.extend(workers_of(events, event.stage)[-1:])
            os.kill(killed[0], signal.SIGKILL)

    outcome = run_to_end(scene.config(), kill_once)
    assert outcome.lost_workers == 1
    assert len(outcome.workers("block-000")) == 2
    scene.check("SIGKILL of the worker", "in training, epoch 2", len(killed), outcome)


@slow
def test_lost_raylet_is_replaced_by_another(scene: Scene) -> None:
    scene.raylets.add()
    lost: list[int] = []
    events: list[Event] = []

    def lose_once(event: Event) -> None:
        events.append(event)
        if isinstance(event, EpochDone) and not lost:
            lost.extend(workers_of(events, event.stage)[-1:])
            scene.raylets.lose_node_of(lost[0])

    outcome = run_to_end(scene.config(), lose_once)
    assert outcome.lost_workers == 1
    scene.check("raylet lost", "in training, epoch 2", len(lost), outcome)


@pytest.mark.parametrize(
    ("where", "path"),
    [
        pytest.param("ingest", INGEST, marks=slow),
        pytest.param("plan", PLAN, marks=slow),
        pytest.param("block-000, in training", CHECKPOINT_RECORD, marks=slow),
        pytest.param("block-000, writing shards", WRITING),
        pytest.param("block-001, in training", SECOND_BLOCK, marks=slow),
        pytest.param("model", MODEL, marks=slow),
    ],
)
def test_killed_driver_is_resumed_by_the_next_one(scene: Scene, tmp_path: Path, where: str, path: str) -> None:
    config, began = scene.config(), time.monotonic()
    with driver_process(config, tmp_path) as driver:
        rule = scene.proxy.add(when(path, lambda: os.kill(driver.process.pid, signal.SIGKILL)))
        assert wait_for_exit(driver) == -signal.SIGKILL, driver.text()
    killed = Outcome(seconds=time.monotonic() - began)
    scene.check("SIGKILL of the driver", where, len(rule.hits), killed, run_to_end(config))


@slow
@pytest.mark.parametrize("seconds", [6, 25])
def test_restarted_server_costs_time_and_no_work(scene: Scene, seconds: float) -> None:
    rule = scene.proxy.add(when(WRITING, lambda: scene.server.restart_after(seconds)))
    outcome = run_to_end(scene.config())
    assert len(outcome.workers("block-000")) == 1
    scene.check(f"S3 server killed, back after {seconds:g} s", "writing shards", len(rule.hits), outcome)


OUTAGES = [
    pytest.param("answers 503 for 10 s", Answer(status=503), At.REQUEST, 10.0),
    pytest.param("answers 500 for 30 s", Answer(status=500), At.REQUEST, 30.0, marks=slow),
    pytest.param("resets connections for 5 s, before the request", Reset(), At.REQUEST, 5.0, marks=slow),
    pytest.param("resets connections for 5 s, in the request", Reset(), At.HALF_REQUEST, 5.0, marks=slow),
    pytest.param("resets connections for 5 s, before the answer", Reset(), At.ANSWER, 5.0, marks=slow),
    pytest.param("resets connections for 5 s, in the answer", Reset(), At.HALF_ANSWER, 5.0, marks=slow),
    pytest.param("hangs for 5 s", Hang(), At.REQUEST, 5.0, marks=slow),
]


@pytest.mark.parametrize(("fault", "what", "at", "seconds"), OUTAGES)
def test_server_that_is_away_for_a_while_costs_time_and_no_work(
    scene: Scene, fault: str, what: Fault, at: At, seconds: float
) -> None:
    broken = Rule(fault=what, at=at, times=None, for_s=seconds)
    scene.proxy.add(when(WRITING, lambda: scene.proxy.add(broken)))
    outcome = run_to_end(scene.config())
    assert len(outcome.workers("block-000")) == 1
    scene.check(f"S3 server {fault}", "writing shards and after", len(broken.hits), outcome)


@slow
def test_slow_server_costs_time_only(scene: Scene) -> None:
    rule = scene.proxy.add(Rule(fault=Throttle(bytes_per_s=MIB), times=None))
    outcome = run_to_end(scene.config())
    assert not any(isinstance(event, StageFailed) for event in outcome.events)
    scene.check("S3 server passes 1 MB/s", "everywhere", len(rule.hits), outcome)


@pytest.mark.parametrize("is_exclusive", [pytest.param(False, marks=slow), True])
def test_commit_that_arrives_after_its_worker_died_undoes_nothing(
    scene: Scene, is_exclusive: bool, moto_server: S3Server
) -> None:
    server = moto_server if is_exclusive else scene.server.server  # MinIO's older code has no exclusive creation
    second = threading.Event()

    def hold_first(passing: Request) -> None:
        os.kill(passing.pid, signal.SIGKILL)
        assert second.wait(60), "no second attempt has committed"

    held = Rule(fault=Call(function=hold_first), method="PUT", path=MANIFEST)
    told = Rule(fault=Call(function=lambda _: second.set()), at=At.ANSWER, method="PUT", path=MANIFEST, skip=1)
    with scene.in_front_of(server), scene.proxy.breaking(held, told):
        config = scene.config(server)
        outcome = run_to_end(config)
        store, layout = open_store(config.storage.uri), RunLayout(config.run)
        manifest = read_manifest(store, layout.block_manifest(0))
    assert outcome.lost_workers == 1
    started = [event for event in outcome.events if isinstance(event, StageStarted) and event.stage == "block-000"]
    assert manifest is not None
    assert manifest.attempt == started[-1 if is_exclusive else 0].attempt
    where = "block-000, " + ("exclusive creation" if is_exclusive else "no exclusive creation")
    scene.check("commit of a killed worker arrives last", where, len(held.hits), outcome)
