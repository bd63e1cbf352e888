"""Faults that need no cluster: disks full or read-only, S3 servers that hang or are gone for good, two drivers.

Rows of the same table as `test_fault_matrix`.
"""

import errno
import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_proxy import FaultProxy, Hang, Rule, running_proxy
from fault_scene import Outcome, Undisturbed, digits, lead_to, run_to_end, when
from s3_servers import S3Server

from nf_pipeline.config import RunConfig
from nf_pipeline.driver import run_lock
from nf_pipeline.errors import EXIT_STORAGE, RunLocked, StorageError, StoreUnreachable
from nf_pipeline.events import EpochDone, Event
from nf_pipeline.storage import s3

WRITING = "/blocks/000/attempt-[^/]*/activations/train-00001"


def resumed(config: RunConfig) -> Outcome:
    """Runs again as the next process would: the one that failed could not release its lock, but is gone."""
    with pytest.MonkeyPatch.context() as gone:
        gone.setattr(run_lock, "has_ended", lambda process: True)
        return run_to_end(config)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one MiB, which is not enough for a run."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, text=True, timeout=30
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True, timeout=30)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True, timeout=30)


def test_full_disk_is_named_and_the_run_goes_on_when_there_is_room(disk: Path, alone: Undisturbed) -> None:
    config = digits(str(disk / "runs"))
    failed = run_to_end(config)
    assert isinstance(failed.error, StorageError)
    assert failed.error.exit_code == EXIT_STORAGE
    assert os.strerror(errno.ENOSPC) in str(failed.error)
    assert "Fix: free space there" in str(failed.error)
    remount(disk, "size=64m")
    alone.check("disk full", "local store, writing shards", 1, failed, resumed(config))
    assert not list(disk.rglob("*.part"))


def test_full_disk_without_a_disk_of_its_own(
    tmp_path: Path, alone: Undisturbed, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, real, written = digits(str(tmp_path / "runs")), os.write, [0]

    def write(descriptor: int, data: memoryview) -> int:
        written[0] += len(data)
        if written[0] > 2**20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data)

    with monkeypatch.context() as full:
        full.setattr(os, "write", write)
        failed = run_to_end(config)
    assert failed.error is not None and failed.error.exit_code == EXIT_STORAGE
    alone.check("disk full, as os.write says", "local store", 1, failed, resumed(config))


def test_disk_that_becomes_read_only_is_named_and_the_run_goes_on_when_it_is_writable(
    disk: Path, alone: Undisturbed
) -> None:
    remount(disk, "size=64m")
    config = digits(str(disk / "runs"))

    def lock(event: Event) -> None:
        if isinstance(event, EpochDone) and event.epoch == 1:
            remount(disk, "ro")

    failed = run_to_end(config, lock)
    assert isinstance(failed.error, StorageError)
    assert os.strerror(errno.EROFS) in str(failed.error)
    assert "Fix: give this user write access" in str(failed.error)
    remount(disk, "rw")
    alone.check("disk read-only", "local store, in training", 1, failed, resumed(config))


@pytest.fixture
def proxy(minio_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A proxy in front of a real server; the environment leads to it, and the store gives up after seconds."""
    monkeypatch.setattr(s3, "MAX_ATTEMPTS", 1)
    monkeypatch.setattr(s3, "READ_TIMEOUT_S", 1)
    with running_proxy(minio_server.endpoint) as proxy:
        lead_to(monkeypatch, minio_server, proxy)
        yield proxy


@pytest.mark.s3
def test_server_that_hangs_for_a_while_costs_its_time_outs(
    proxy: FaultProxy, minio_server: S3Server, alone: Undisturbed
) -> None:
    hanging = Rule(fault=Hang(), times=None, for_s=3.0)
    proxy.add(when(WRITING, lambda: proxy.add(hanging)))
    outcome = run_to_end(digits(f"s3://{minio_server.make_bucket()}/runs"))
    alone.check("S3 server hangs for 3 s, time-out 1 s", "writing shards and after", len(hanging.hits), outcome)


@pytest.mark.s3
@pytest.mark.parametrize("fault", ["refuses connections", pytest.param("hangs", marks=pytest.mark.slow)])
def test_server_that_is_gone_for_good_ends_the_run_and_the_run_goes_on_when_it_is_back(
    fault: str, proxy: FaultProxy, minio_server: S3Server, alone: Undisturbed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "OUTAGE_TIMEOUT_S", 3.0)
    upstream, config = proxy.upstream, digits(f"s3://{minio_server.make_bucket()}/runs")
    gone = Rule(fault=Hang(), times=None)

    def go() -> None:
        if fault == "hangs":
            proxy.add(gone)
        else:
            proxy.upstream = ("127.0.0.1", 1)

    rule = proxy.add(when(WRITING, go))
    failed = run_to_end(config)
    assert isinstance(failed.error, StoreUnreachable)
    assert failed.error.exit_code == EXIT_STORAGE
    assert "resume" in failed.error.fix
    proxy.clear()
    proxy.upstream = upstream
    alone.check(f"S3 server {fault} for good", "writing shards", len(rule.hits), failed, resumed(config))


def test_second_driver_is_told_who_holds_the_run_and_the_first_one_finishes(
    tmp_path: Path, alone: Undisturbed
) -> None:
    config, refused = digits(str(tmp_path / "runs")), list[Outcome]()
    second = threading.Thread(target=lambda: refused.append(run_to_end(config)))

    def start_second(event: Event) -> None:
        if isinstance(event, EpochDone) and not refused and not second.is_alive():
            second.start()
            second.join(60)

    first = run_to_end(config, start_second)
    (other,) = refused
    assert isinstance(other.error, RunLocked)
    assert f"{socket.gethostname()}:{os.getpid()}" in str(other.error)
    alone.check("a second driver on the same run", "block-000, in training", 1, first)
