"""Trainings again and again under faults at random times; after each one nothing may be lost, corrupt or left over.

SOAK_MINUTES says how long, SOAK_SEED which faults, SOAK_FIRST with which iteration to begin: with the seed and the
number of an iteration that failed the same faults are tried again, though not at the very same step of the run. A
failed iteration's objects are kept and named.
"""

import json
import logging
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from chaos import Chaos, workers_of_run
from fault_scene import Scene, driver_process, run_to_end, wait_for_exit
from process_sessions import wait_until

from nf_pipeline.config import RunConfig
from nf_pipeline.driver.gc import collect_garbage
from nf_pipeline.driver.verify import verify_run
from nf_pipeline.errors import EXIT_BLOCK, EXIT_CONFIG, EXIT_DONE, EXIT_INTERRUPTED, EXIT_STORAGE
from nf_pipeline.run_uri import join_run_uri
from nf_pipeline.storage.layout import RunLayout
from nf_pipeline.storage.store import Store, open_store

pytestmark = [pytest.mark.soak, pytest.mark.ray, pytest.mark.s3, pytest.mark.timeout(0)]

logger = logging.getLogger("soak")

MODES: dict[str, dict[str, Any]] = {
    "sequential": {},
    "pipelined": {"train__mode": "pipelined"},
    "2 workers": {"train__workers_per_block": 2},
}
FAULTS_WITHIN_S = 25.0
MAX_FAULTS = 6
MAX_DRIVERS = 12
DRIVER_TIMEOUT_S = 400.0
EXPECTED_ENDS = {EXIT_DONE, EXIT_BLOCK, EXIT_STORAGE, EXIT_INTERRUPTED, -signal.SIGKILL, -signal.SIGINT}
"""An interrupt that comes before or after Python can take it ends the process by its number."""


def test_runs_under_random_faults_lose_and_corrupt_nothing(
    scene: Scene, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for library in ("aiobotocore", "botocore", "nf_pipeline"):
        caplog.set_level(logging.WARNING, library)
    seed = int(os.environ.get("SOAK_SEED") or time.time())
    deadline = time.monotonic() + 60 * float(os.environ.get("SOAK_MINUTES") or 10)
    scene.raylets.add()
    weights = {
        mode: run_to_end(scene.config(**changes)).summary["weights_checksum"] for mode, changes in MODES.items()
    }
    counts: Counter[str] = Counter()
    number = int(os.environ.get("SOAK_FIRST") or 0)
    while time.monotonic() < deadline:
        folder = tmp_path / f"soak-{number}"
        folder.mkdir()
        try:
            counts.update(_iterate(scene, weights, random.Random(f"{seed}/{number}"), folder))
        finally:
            scene.proxy.clear()
            logger.info("SOAK_SEED=%d SOAK_FIRST=%d; so far: %s", seed, number, dict(sorted(counts.items())))
        number += 1
    logger.info(
        "soak with SOAK_SEED=%d\n%s", seed, "\n".join(f"{count:6d}  {what}" for what, count in sorted(counts.items()))
    )


def _iterate(scene: Scene, weights: dict[str, str], choices: random.Random, folder: Path) -> Counter[str]:
    mode, uses_s3 = choices.choice(list(MODES)), choices.random() < 0.6
    run = folder.name
    store = {} if uses_s3 else {"storage__uri": str(folder / "runs")}
    config = scene.config(run=run, **store, **MODES[mode])
    num_faults, began = choices.randint(1, MAX_FAULTS), time.monotonic()
    chaos = Chaos(scene, run, uses_s3=uses_s3, choices=choices, num_faults=num_faults, within_s=FAULTS_WITHIN_S)
    with _kept_if_it_fails(config, folder), chaos:
        ends = _train_to_the_end(chaos, config, folder)
        checks = _check(config, weights[mode])
    logger.info(
        "%s: %s, %s, %d s, faults %s, drivers ended with %s, %d checks",
        *(run, mode, "S3" if uses_s3 else "folder", time.monotonic() - began, dict(chaos.happened), ends),
        sum(checks.values()),
    )
    faults = Counter({f"fault: {fault}": count for fault, count in chaos.happened.items() if count})
    return faults + checks + Counter({f"runs: {mode}": 1, "drivers": len(ends)})


def _train_to_the_end(chaos: Chaos, config: RunConfig, folder: Path) -> list[int]:
    """Starts one driver after the other until one finishes the run; returns their exit codes."""
    ends: list[int] = []
    while len(ends) < MAX_DRIVERS:
        with driver_process(config, folder) as driver:
            chaos.driver = driver.process.pid
            ends.append(wait_for_exit(driver, DRIVER_TIMEOUT_S, meanwhile=chaos.replace_nodes))
            chaos.driver = None
            text = driver.text()
        is_short_of_nodes = (
            ends[-1] == EXIT_CONFIG and "add a node" in text
        )  # it came before the lost one's successor
        assert ends[-1] in EXPECTED_ENDS or is_short_of_nodes, f"exit code {ends[-1]}: {text[-4000:]}"
        assert "Traceback" not in text or ends[-1] == -signal.SIGINT, text[-4000:]
        if ends[-1] == EXIT_DONE:
            return ends
    raise AssertionError(f"not finished by {len(ends)} drivers, which ended with {ends}: {text[-4000:]}")


def _check(config: RunConfig, weights: str) -> Counter[str]:
    """Holds a finished run to everything that must be true of it."""
    uri, store, layout = (
        join_run_uri(config.storage.uri, config.run),
        open_store(config.storage.uri),
        RunLayout(config.run),
    )
    assert json.loads(bytes(store.get(layout.summary_json)))["weights_checksum"] == weights
    assert verify_run(uri).problems == ()
    collect_garbage(uri, dry_run=False)
    report = verify_run(uri)
    assert report.problems == ()
    assert report.num_leftovers == 0
    keys = [key for key, _ in store.list(config.run)]
    assert [key for key in keys if key.endswith(".part") or ("/attempt-" in key and "checkpoint" in key)] == []
    assert list(store.leftovers(config.run, min_age_s=0.0)) == []
    _check_one_commit_each(store, layout, keys)
    wait_until(lambda: not workers_of_run(config.run), f"workers of {config.run} end", timeout_s=30)
    return Counter(
        {
            "checked: weights equal": 1,
            "checked: objects with their checksums": sum(stage.num_objects for stage in report.stages),
            "checked: stages with one commit": sum(key.endswith("/manifest.json") for key in keys),
            "checked: nothing left over, no process": 1,
        }
    )


def _check_one_commit_each(store: Store, layout: RunLayout, keys: list[str]) -> None:
    commits = [key.removesuffix("/manifest.json") for key in keys if key.endswith("/manifest.json")]
    attempts = {key.partition("/attempt-")[0]: set() for key in keys if "/attempt-" in key}
    for key in keys:
        stage, separator, rest = key.partition("/attempt-")
        if separator:
            attempts[stage].add(rest.partition("/")[0])
    assert len(commits) == len(set(commits))
    assert {stage: len(ids) for stage, ids in attempts.items()} == dict.fromkeys(attempts, 1)


@contextmanager
def _kept_if_it_fails(config: RunConfig, folder: Path) -> Iterator[None]:
    """Copies the objects of a run that went wrong to where they can be looked at; removes those of all others."""
    try:
        yield
    except BaseException:
        store, kept = open_store(config.storage.uri), open_store(str(folder / "kept"))
        for key, _ in store.list(""):
            kept.put(key, store.get(key))
        logger.error("kept what the run stored in %s", folder)
        raise
    store = open_store(config.storage.uri)
    store.delete([key for key, _ in store.list("")])
