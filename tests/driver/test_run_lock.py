"""Two drivers and one run: one works, the other learns who does."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nf_pipeline.driver import run_lock
from nf_pipeline.driver.run_lock import hold_run, read_lock
from nf_pipeline.errors import RunLocked, StorageError
from nf_pipeline.host import has_ended, process_identity
from nf_pipeline.storage.layout import RunLayout
from nf_pipeline.storage.store import Store, open_store

LAYOUT = RunLayout("run")
HOLDER = (
    "import sys, time\n"
    "from nf_pipeline.driver import run_lock\n"
    "from nf_pipeline.storage.layout import RunLayout\n"
    "from nf_pipeline.storage.store import open_store\n"
    "run_lock.RENEW_EVERY_S = 0.1\n"
    "with run_lock.hold_run(open_store(sys.argv[1]), RunLayout('run')) as lock:\n"
    "    print('held', flush=True)\n"
    "    while not lock.is_lost:\n"
    "        time.sleep(0.02)\n"
    "    print('lost', flush=True)\n"
)


@pytest.fixture(params=["local", pytest.param("moto_uri", marks=pytest.mark.s3)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """A store of each kind that can create exclusively."""
    return open_store(str(tmp_path) if request.param == "local" else request.getfixturevalue(request.param))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets beats and looks come often."""
    monkeypatch.setattr(run_lock, "RENEW_EVERY_S", 0.1)
    monkeypatch.setattr(run_lock, "LOOK_EVERY_S", 0.02)


@pytest.fixture
def holder(store: Store) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the run."""
    command = [sys.executable, "-c", HOLDER, store.uri]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()


def test_second_driver_is_told_who_holds_the_run(store: Store, holder: subprocess.Popen[str]) -> None:
    with pytest.raises(RunLocked, match=rf"held by .*:{holder.pid} since ") as caught, hold_run(store, LAYOUT):
        pass
    assert caught.value.exit_code == 2
    assert "Fix: " in str(caught.value)


def test_run_of_a_killed_holder_on_this_machine_is_free_at_once(store: Store, holder: subprocess.Popen[str]) -> None:
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with hold_run(store, LAYOUT, patience_s=600) as lock:
        lock.check()
        assert read_lock(store, LAYOUT).generation == 1
    assert [key for key, _ in store.list(LAYOUT.locks)] == [LAYOUT.lock(1)]


def test_silent_holder_is_taken_over_and_does_not_take_the_run_back_when_it_wakes_up(
    store: Store, holder: subprocess.Popen[str], quick: None
) -> None:
    os.kill(holder.pid, signal.SIGSTOP)
    said: list[str] = []
    with hold_run(store, LAYOUT, patience_s=1.0, on_wait=said.append) as lock:
        os.kill(holder.pid, signal.SIGCONT)
        assert holder.stdout.readline() == "lost\n"
        lock.check()
    assert len(said) == 1 and f":{holder.pid} holds run" in said[0]


def test_driver_whose_run_was_taken_over_ends(store: Store, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with hold_run(store, LAYOUT) as lock:
        record = json.loads(bytes(store.get(LAYOUT.lock(0))))
        store.create(LAYOUT.lock(1), json.dumps(record | {"holder": "other:1", "token": "another"}).encode())
        _wait_until(lambda: lock.is_lost)
        with pytest.raises(RunLocked, match="taken over by other:1"):
            lock.check()
    assert json.loads(bytes(store.get(LAYOUT.lock(1))))["token"] == "another"


def test_frozen_driver_asks_before_it_goes_on(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "RENEW_EVERY_S", 600.0)  # no beat tells it
    with hold_run(store, LAYOUT) as lock:
        record = json.loads(bytes(store.get(LAYOUT.lock(0))))
        store.create(LAYOUT.lock(1), json.dumps(record | {"token": "another"}).encode())
        lock.check()
        monkeypatch.setattr(run_lock, "SURE_FOR_S", 0.0)
        with pytest.raises(RunLocked, match="taken over"):
            lock.check()


@pytest.mark.parametrize("error", [StorageError("away"), TimeoutError("no answer"), RuntimeError("loop is closed")])
def test_lock_that_could_not_be_renewed_is_renewed_by_the_next_beat(
    store: Store, quick: None, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    put, failures = store.put, [error, error]

    def fail_twice(key: str, data: bytes) -> None:
        if failures:
            raise failures.pop()
        put(key, data)

    with hold_run(store, LAYOUT) as lock:
        monkeypatch.setattr(store, "put", fail_twice)
        _wait_until(lambda: not failures)
        beat = read_lock(store, LAYOUT).beat
        _wait_until(lambda: read_lock(store, LAYOUT).beat > beat)
        lock.check()


def test_driver_whose_lock_fails_in_another_way_ends_at_its_next_event(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hold_run(store, LAYOUT) as lock:
        with monkeypatch.context() as patched:
            patched.setattr(run_lock, "SURE_FOR_S", 0.0)
            patched.setattr(store, "put", None)
            with pytest.raises(TypeError):
                lock.check()
        lock.check()


def test_store_that_was_away_for_the_watcher_says_nothing_of_the_holder(store: Store, quick: None) -> None:
    with hold_run(store, LAYOUT) as lock:
        slow = SlowToLook(store, seconds=1.0)
        with pytest.raises(RunLocked), hold_run(slow, LAYOUT, patience_s=0.5):
            pass
        lock.check()


class SlowToLook:
    """A store whose lists wait, as in an outage that is over before anything fails."""

    def __init__(self, store: Store, seconds: float) -> None:
        self._store = store
        self._seconds = seconds

    def list(self, prefix: str) -> list[tuple[str, int]]:
        found = self._store.list(prefix)
        time.sleep(self._seconds)
        return found

    def __getattr__(self, name: str):
        return getattr(self._store, name)


def test_who_may_not_delete_may_still_hold_a_run(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(keys) -> None:
        raise StorageError("not allowed")

    with hold_run(store, LAYOUT):
        pass
    monkeypatch.setattr(store, "delete", refuse)
    with hold_run(store, LAYOUT) as lock:
        lock.check()
        assert read_lock(store, LAYOUT).generation == 1


def test_released_run_is_free_at_once_and_leaves_one_small_object(store: Store) -> None:
    for generation in range(3):
        with hold_run(store, LAYOUT, patience_s=600):
            assert not read_lock(store, LAYOUT).is_free
        assert read_lock(store, LAYOUT).is_free
        assert [key for key, _ in store.list(LAYOUT.locks)] == [LAYOUT.lock(generation)]


def test_of_many_drivers_that_start_at_once_exactly_one_gets_the_run(store: Store, quick: None) -> None:
    outcomes: list[str] = []
    start = threading.Barrier(8)
    done = threading.Event()

    def drive() -> None:
        start.wait()
        try:
            with hold_run(store, LAYOUT):
                outcomes.append("held")
                done.wait(30)
        except RunLocked:
            outcomes.append("refused")

    drivers = [threading.Thread(target=drive) for _ in range(8)]
    for driver in drivers:
        driver.start()
    _wait_until(lambda: len(outcomes) == 8)
    done.set()
    for driver in drivers:
        driver.join()
    assert sorted(outcomes) == ["held"] + ["refused"] * 7


@pytest.mark.s3
def test_store_without_exclusive_creation_ends_all_drivers_but_one(minio_uri: str, quick: None) -> None:
    store = open_store(minio_uri)
    with hold_run(store, LAYOUT) as first:
        record = json.loads(bytes(store.get(LAYOUT.lock(0))))
        store.put(LAYOUT.lock(0), json.dumps(record | {"holder": "other:1", "token": "another"}).encode())
        _wait_until(lambda: first.is_lost)
        assert read_lock(store, LAYOUT).token == "another"


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff", b'{"holder": 1, "since_s": 1e300}'])
def test_unreadable_lock_is_replaced(store: Store, content: bytes) -> None:
    store.put(LAYOUT.lock(3), content)
    with hold_run(store, LAYOUT):
        assert read_lock(store, LAYOUT).generation == 4


def test_process_that_has_ended_is_known_and_others_get_the_benefit_of_the_doubt() -> None:
    place = process_identity().partition("/")[0]
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    assert not has_ended(process_identity())
    assert has_ended(f"{place}/{int(ended.stdout)}/1")
    assert has_ended(f"{place}/{os.getpid()}/1")  # the number was given to another process since
    assert not has_ended(f"{place}/{10**30}/1")
    assert not has_ended(f"elsewhere/{int(ended.stdout)}/1")
    assert not any(map(has_ended, ["", "/", "//", f"{place}/x/1", place]))


def _wait_until(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
