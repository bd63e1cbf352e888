"""Checks what a run needs on this machine and in the store, and says what to fix.

Every check really does what a run would do, on a small scale. Never raises for what it finds: a finding is a
`Check`. Entry: `run_checks`.
"""

import contextlib
import importlib.metadata
import os
import secrets
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nf_pipeline.config import ClusterConfig
from nf_pipeline.errors import EXIT_CONFIG, EXIT_DONE, EXIT_STORAGE, AlreadyExists, ConfigError, NFError, StorageError
from nf_pipeline.events import Event, Note
from nf_pipeline.gpus import Driver, Gpu, read_driver
from nf_pipeline.host import usable_cpus, worker_name
from nf_pipeline.storage.store import Store, open_store
from nf_pipeline.units import format_bytes

State = Literal["ok", "warn", "fail"]

MIN_PYTHON = (3, 11)
LOW_DISK_BYTES = 5 * 2**30
NO_DISK_BYTES = 2**28
GREETING_STAGE = "nf_pipeline.driver.doctor:greet"
_PROBE = b"nf-pipeline doctor\n" * 64


@dataclass(frozen=True, kw_only=True)
class Check:
    """One finding.

    Attributes:
        name: what was checked, "store: write".
        state: "ok", "warn" (runs, but not as it could) or "fail" (a run would fail).
        detail: what was found.
        fix: one action, "" if nothing is wrong.
    """

    name: str
    state: State
    detail: str
    fix: str = ""


def run_checks(uri: str, *, start_ray: bool = False) -> list[Check]:
    """Runs every check.

    Args:
        uri: of a store; a small object is written below it and removed again.
        start_ray: also start a local Ray and run one task on it, which takes seconds.
    """
    checks = [check_python(), *check_torch()]
    has_torch = all(check.state == "ok" for check in checks)
    checks += [*check_gpu(has_torch=has_torch), *([check_threads()] if has_torch else []), check_ray()]
    if start_ray and checks[-1].state == "ok":
        checks.append(check_ray_task())
    return [*checks, *check_store(uri), *check_disk(uri)]


def exit_code_of(checks: Sequence[Check]) -> int:
    """Returns 0 if nothing failed, 4 if the store did, 2 otherwise."""
    failed = [check.name for check in checks if check.state == "fail"]
    if not failed:
        return EXIT_DONE
    return EXIT_STORAGE if any(name.startswith("store") for name in failed) else EXIT_CONFIG


def check_python() -> Check:
    """Checks the interpreter's version."""
    found, wanted = ".".join(map(str, sys.version_info[:3])), ".".join(map(str, MIN_PYTHON))
    if sys.version_info < MIN_PYTHON:
        return Check(name="python", state="fail", detail=found, fix=f"use Python {wanted} or later")
    return Check(name="python", state="ok", detail=found)


def check_torch() -> list[Check]:
    """Imports torch and torchvision, which fails when their builds do not belong together."""
    checks = []
    for name in ("torch", "torchvision"):
        try:
            module = importlib.import_module(name)
        except (ImportError, OSError, RuntimeError) as error:
            fix = "install torch and torchvision of matching versions"
            checks.append(Check(name=name, state="fail", detail=f"cannot be imported: {error}", fix=fix))
        else:
            checks.append(Check(name=name, state="ok", detail=str(module.__version__)))
    return checks


def check_gpu(*, has_torch: bool = True) -> list[Check]:
    """Lists what the NVIDIA driver has, and computes on it with torch if that can be imported."""
    try:
        driver = read_driver()
    except ConfigError as error:
        return [Check(name="driver", state="fail", detail=error.what, fix=error.fix)]
    if driver.problem and driver.fix:
        return [Check(name="gpu", state="warn", detail=driver.problem, fix=driver.fix)]
    if driver.problem:
        return [Check(name="gpu", state="ok", detail=f"{driver.problem}: training runs on the CPU")]
    return list(_driver_checks(driver, has_torch=has_torch))


def check_threads() -> Check:
    """Compares torch's CPU threads with the CPUs that this process may use."""
    import torch

    usable, threads = usable_cpus(), torch.get_num_threads()
    detail = f"{usable:g} CPUs usable, torch uses {threads} threads"
    if threads > usable + 0.5:
        fix = f"--set cluster.num_threads={max(1, int(usable))}"
        return Check(name="cpu", state="warn", detail=detail, fix=fix)
    return Check(name="cpu", state="ok", detail=detail)


def check_ray() -> Check:
    """Looks for Ray without starting or importing it."""
    try:
        return Check(name="ray", state="ok", detail=importlib.metadata.version("ray"))
    except importlib.metadata.PackageNotFoundError:
        fix = "pip install 'ray[default]', or use --executor inline"
        return Check(name="ray", state="warn", detail="not installed", fix=fix)


def check_ray_task() -> Check:
    """Starts a local Ray, runs one task on it and stops it."""
    from nf_pipeline.executors import open_executor
    from nf_pipeline.executors.base import Resources

    try:
        with open_executor(ClusterConfig()) as executor:
            events = list(executor.run("doctor", GREETING_STAGE, None, Resources(num_cpus=1, device="cpu")))
    except (NFError, ImportError, OSError) as error:
        detail = str(error).splitlines()[0]
        return Check(name="ray: task", state="fail", detail=detail, fix="use --executor inline, or see Ray's logs")
    return Check(name="ray: task", state="ok", detail=f"ran on a local Ray, {len(events)} event came back")


def greet(_task: None) -> Iterator[Event]:
    """The smallest stage: says hello from wherever it runs."""
    yield Note(stage="doctor", text=f"hello from {worker_name()}")


def check_store(uri: str) -> list[Check]:
    """Writes, reads back, creates once and deletes a small object in the store; ends at the first failure."""
    checks: list[Check] = []
    key = f"doctor-{secrets.token_hex(4)}"
    try:
        for check in _probe(open_store(uri), key):
            checks.append(check)
    except NFError as error:
        detail, _, fix = str(error).partition("\nFix: ")
        checks.append(Check(name="store", state="fail", detail=detail, fix=fix))
    return checks


def check_disk(uri: str) -> list[Check]:
    """Checks the free space of a store in a local folder; an object store has no such limit."""
    if "://" in uri and not uri.startswith("file://"):
        return []
    folder = Path(uri.removeprefix("file://")).expanduser().absolute()
    existing = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    free = shutil.disk_usage(existing).free
    detail = f"{format_bytes(free)} free at {existing}"
    if free >= LOW_DISK_BYTES:
        return [Check(name="disk", state="ok", detail=detail)]
    state: State = "warn" if free >= NO_DISK_BYTES else "fail"
    return [Check(name="disk", state=state, detail=detail, fix="free space, or choose another --store")]


def _driver_checks(driver: Driver, *, has_torch: bool) -> Iterator[Check]:
    count = len(driver.gpus)
    yield Check(name="driver", state="ok", detail=f"NVIDIA {driver.version}, {count} GPUs")
    for gpu in driver.gpus:
        yield Check(name=f"gpu {gpu.index}", state="ok", detail=_describe_gpu(gpu))
    if count and has_torch:
        yield _check_cuda(count)


def _describe_gpu(gpu: Gpu) -> str:
    if gpu.total_bytes is None or gpu.free_bytes is None:
        return f"{gpu.name}, does not say how much memory it has"
    return f"{gpu.name}, {format_bytes(gpu.free_bytes)} of {format_bytes(gpu.total_bytes)} free"


def _check_cuda(num_gpus: int) -> Check:
    import torch

    name, fix = "cuda", "install a CUDA build of torch that suits the driver: https://pytorch.org/get-started"
    built_for = torch.version.cuda or "no CUDA"
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        detail = "CUDA_VISIBLE_DEVICES is empty: torch sees no GPU"
        return Check(name=name, state="warn", detail=detail, fix="unset CUDA_VISIBLE_DEVICES")
    if not torch.cuda.is_available():
        detail = f"the driver has {num_gpus} GPUs, torch {torch.__version__} (built for {built_for}) sees none"
        return Check(name=name, state="fail", detail=detail, fix=fix)
    try:
        total = torch.ones(8, device="cuda").sum().item()
    except RuntimeError as error:
        return Check(name=name, state="fail", detail=f"torch cannot compute on it: {error}", fix=fix)
    return Check(name=name, state="ok", detail=f"torch (built for {built_for}) computes on it ({total:g} = 8)")


def _probe(store: Store, key: str) -> Iterator[Check]:
    try:
        yield from _write_and_read(store, key)
    except StorageError:
        with contextlib.suppress(StorageError):  # the first error is the one to report
            store.delete([key])
        raise
    store.delete([key])
    if store.size(key) is not None:
        raise StorageError("an object is still there after it was deleted", store.uri, "allow deletes")
    yield Check(name="store: delete", state="ok", detail=f"{len(_PROBE)} bytes removed")


def _write_and_read(store: Store, key: str) -> Iterator[Check]:
    store.create(key, _PROBE)
    yield Check(name="store: write", state="ok", detail=f"{len(_PROBE)} bytes to {store.uri}")
    if bytes(store.get(key)) != _PROBE or store.size(key) != len(_PROBE):
        raise StorageError("what was read is not what was written", store.uri, "use another store")
    yield Check(name="store: read", state="ok", detail="same bytes and size came back")
    try:
        store.create(key, b"second")
    except AlreadyExists:
        yield Check(name="store: create-once", state="ok", detail="a second writer is refused")
        return
    raise StorageError("a second writer replaced an object that must be written once", store.uri, "use another store")
