"""However a run ends, no process that it started goes on: neither of a local Ray, nor a task on a cluster.

The command that is killed is among the tests of `test_ray_parity` as well, which run by default.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from process_sessions import Session, end, members, running, wait_until

from nf_pipeline.config import RunConfig

pytestmark = pytest.mark.ray

MakeConfig = Callable[..., RunConfig]
GONE_WITHIN_S = 60.0


def command_of(config: RunConfig, folder: Path) -> list[str]:
    file = folder / "run.json"
    file.write_text(config.model_dump_json(exclude_none=True))
    return [sys.executable, "-m", "nf_pipeline", "train", "--config", str(file)]


def wait_for_block(config: RunConfig, meanwhile: Callable[[], None] = lambda: None) -> int:
    """Waits until a block is being trained; returns the process of its worker.

    Args:
        meanwhile: called again and again.
    """
    events = Path(config.storage.uri, config.run, "events.jsonl")

    def has_begun() -> bool:
        meanwhile()
        return events.exists() and bool(block_workers(events))

    wait_until(has_begun, "a block is trained")
    return int(block_workers(events)[-1].rpartition(":")[2])


def block_workers(events: Path) -> list[str]:
    said = [json.loads(line) for line in events.read_text().splitlines() if '"StageStarted"' in line]
    return [event["worker"] for event in said if event["stage"].startswith("block-")]


def long_run(digits_config: MakeConfig) -> RunConfig:
    """A run that does not end by itself as long as a test takes."""
    return digits_config(cluster__executor="ray", train__epochs=5000)


@contextlib.contextmanager
def training(config: RunConfig, tmp_path: Path) -> Iterator[tuple[Session, int]]:
    """Runs the command in a session of its own until it trains a block; yields it and the worker's process."""
    with running(command_of(config, tmp_path), os.environ, tmp_path / "train.log") as session:
        worker = wait_for_block(config)
        assert {session.process.pid, worker} < set(members(session.process.pid))
        yield session, worker


def assert_gone(session: int) -> None:
    wait_until(lambda: not members(session), f"processes {members(session)} end", timeout_s=GONE_WITHIN_S)


@pytest.mark.parametrize(
    ("ending", "exit_code"),
    [
        pytest.param([signal.SIGKILL], -signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param([signal.SIGTERM], 130, marks=pytest.mark.slow),
        pytest.param([signal.SIGINT], 130, marks=pytest.mark.slow),
        pytest.param([signal.SIGINT, signal.SIGINT], 130, marks=pytest.mark.slow),
    ],
    ids=["killed", "terminated", "ctrl-c", "ctrl-c twice"],
)
def test_command_that_is_ended_leaves_no_process(
    digits_config: MakeConfig, tmp_path: Path, ending: list[signal.Signals], exit_code: int
) -> None:
    with training(long_run(digits_config), tmp_path) as (session, _):
        for number in ending:
            session.process.send_signal(number)
            time.sleep(0.5)
        assert session.process.wait(GONE_WITHIN_S) == exit_code
        assert_gone(session.process.pid)


@pytest.mark.slow
def test_command_that_fails_leaves_no_process(digits_config: MakeConfig, tmp_path: Path) -> None:
    config = long_run(digits_config)
    with training(config, tmp_path) as (session, _):
        killed: set[int] = set()

        def has_given_up() -> bool:  # a lost worker is replaced three times
            worker = wait_for_block(config)
            if worker not in killed:
                killed.add(worker)
                os.kill(worker, signal.SIGKILL)
            return session.process.poll() is not None

        wait_until(has_given_up, "the command gives up")
        assert session.process.returncode == 5
        assert_gone(session.process.pid)


TAKE_TERMINAL = """if True:
    import fcntl, os, signal, sys, termios
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests that run under nohup hand on that it is ignored
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    os.execv(sys.argv[1], sys.argv[1:])
"""


def test_terminal_that_is_closed_takes_everything_with_it(digits_config: MakeConfig, tmp_path: Path) -> None:
    config = long_run(digits_config)
    ours, theirs = os.openpty()
    os.set_blocking(ours, False)
    process = subprocess.Popen(
        [sys.executable, "-c", TAKE_TERMINAL, *command_of(config, tmp_path)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    try:
        os.close(theirs)
        wait_for_block(config, meanwhile=lambda: _read_all(ours))
        os.close(ours)
        process.wait(GONE_WITHIN_S)
        assert_gone(process.pid)
    finally:
        end(process)


def _read_all(terminal: int) -> None:
    """Reads what was printed: a terminal that nobody reads stops who prints, and so the run, after some 10 KiB."""
    with contextlib.suppress(OSError):  # there is nothing, or nobody at the other end yet
        while os.read(terminal, 65536):
            pass


@pytest.mark.slow
def test_task_on_a_cluster_ends_with_its_driver(digits_config: MakeConfig, tmp_path: Path) -> None:
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        config = long_run(digits_config)
        settings = config.cluster.model_copy(update={"address": cluster.address})
        config = config.model_copy(update={"cluster": settings})
        command = command_of(config, tmp_path)
        with running(command, os.environ, tmp_path / "train.log") as session:
            worker = wait_for_block(config)
            assert worker not in members(session.process.pid), "it is the cluster's"
            session.process.kill()
            wait_until(lambda: not Path(f"/proc/{worker}").exists(), "the task ends", timeout_s=GONE_WITHIN_S)
    finally:
        cluster.shutdown()
