"""The Ray executor alone: events, errors and lost workers of small stages."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nf_pipeline.config import ClusterConfig
from nf_pipeline.errors import ConfigError, InternalError, OutOfBudget, WorkerLost
from nf_pipeline.events import Event, Note, StageDone
from nf_pipeline.executors import open_executor
from nf_pipeline.executors.base import Executor, Resources

pytestmark = pytest.mark.ray

ONE_CPU = Resources(num_cpus=1, device="cpu")
HERE = f"{__name__}:"


def count(task: int) -> Iterator[Event]:
    """Yields its process and as many notes as asked for."""
    for number in range(task):
        yield Note(stage="count", text=f"{os.getpid()} {number}")
    yield StageDone(stage="count", result={"task": task}, seconds=0.0)


def over_budget(task: object) -> Iterator[Event]:
    """Fails as a block does."""
    yield Note(stage="block-003", text="about to fail")
    raise OutOfBudget("block-003", "peak 3 MiB, budget 2 MiB", "raise it")


def buggy(task: object) -> Iterator[Event]:
    """Fails as nobody planned."""
    yield Note(stage="buggy", text="about to fail")
    raise KeyError("no such thing")


def die(task: object) -> Iterator[Event]:
    """Ends its process."""
    yield Note(stage="die", text="about to die")
    os.kill(os.getpid(), signal.SIGKILL)


def sleep(task: object) -> Iterator[Event]:
    """Says its process and sleeps."""
    yield Note(stage="sleep", text=str(os.getpid()))
    time.sleep(600)


@pytest.fixture(scope="module")
def executor() -> Iterator[Executor]:
    """One local Ray for all tests of this file, whose workers find the stages above."""
    with pytest.MonkeyPatch.context() as patch, _local_ray(patch) as opened:
        yield opened


def _local_ray(patch: pytest.MonkeyPatch) -> Executor:
    patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
    return open_executor(ClusterConfig(executor="ray", placement_timeout_s=60))


def test_events_arrive_in_order_from_another_process(executor: Executor) -> None:
    events = list(executor.run("count", HERE + "count", 3, ONE_CPU))
    assert [event.text.split()[1] for event in events[:-1]] == ["0", "1", "2"]
    assert events[-1].result == {"task": 3}
    assert str(os.getpid()) not in {event.text.split()[0] for event in events[:-1]}


def test_documented_error_arrives_with_its_fields(executor: Executor) -> None:
    with pytest.raises(OutOfBudget) as caught:
        list(executor.run("over", HERE + "over_budget", None, ONE_CPU))
    assert (caught.value.stage, caught.value.fix) == ("block-003", "raise it")


def test_undocumented_error_arrives_as_a_bug_with_its_traceback(executor: Executor) -> None:
    with pytest.raises(InternalError, match=r"KeyError") as caught:
        list(executor.run("buggy", HERE + "buggy", None, ONE_CPU))
    assert "in buggy" in str(caught.value)


def test_stage_that_fails_takes_no_process_from_the_next_one(executor: Executor) -> None:
    for _ in range(40):  # one in ten was hit, when what had just failed was cancelled too late
        with pytest.raises(OutOfBudget):
            list(executor.run("over", HERE + "over_budget", None, ONE_CPU))
        assert len(list(executor.run("count", HERE + "count", 1, ONE_CPU))) == 2


def test_dead_process_is_a_lost_worker_that_names_the_stage(executor: Executor) -> None:
    with pytest.raises(WorkerLost, match="die: WorkerCrashedError"):
        list(executor.run("die", HERE + "die", None, ONE_CPU))


def test_abandoned_stage_is_stopped(executor: Executor) -> None:
    events = executor.run("sleep", HERE + "sleep", None, ONE_CPU)
    pid = next(events).text
    events.close()
    deadline = time.monotonic() + 60
    while os.path.exists(f"/proc/{pid}") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not os.path.exists(f"/proc/{pid}")


def test_request_that_no_node_holds_fails_at_once_with_what_there_is(executor: Executor) -> None:
    with pytest.raises(ConfigError, match=r"count asks for 1 CPU, 1 GPU on one node; .* \d+ CPU, 0 GPU"):
        executor.check("count", Resources(num_cpus=1, device="cuda"))


def test_address_without_a_cluster_is_a_configuration_error() -> None:
    script = (
        "from nf_pipeline.config import ClusterConfig\n"
        "from nf_pipeline.errors import ConfigError\n"
        "from nf_pipeline.executors import open_executor\n"
        "try:\n"
        "    open_executor(ClusterConfig(executor='ray', address='127.0.0.1:1'))\n"
        "except ConfigError as error:\n"
        "    print('ConfigError', '127.0.0.1:1' in str(error))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "ConfigError True", done.stderr[-2000:]
