"""The stage of the fault tests: a Ray of several raylets, an S3 server that can be killed, a proxy between them.

Runs are small trainings on the shipped digits; what a fault did to a run is a row of a table, appended as a JSON line
to the file that the environment variable NF_FAULT_TABLE names. Entry: `Scene`.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from fault_proxy import At, Call, FaultProxy, Request, Rule
from process_sessions import Session, running, wait_until
from s3_servers import S3Server, minio_server

from nf_pipeline.config import RunConfig, resolve_config
from nf_pipeline.driver.run import train
from nf_pipeline.errors import NFError
from nf_pipeline.events import Event, StageFailed, StageStarted

TABLE_VARIABLE = "NF_FAULT_TABLE"

DIGITS = {
    "memory.budget_bytes": "4MiB",
    "data.max_train_images": 400,
    "train.epochs": 2,
    "train.unit_layers": 3,
    "exits.patience": "never",
    "train.device": "cpu",
    "storage.shard_bytes": "128KiB",
    "cluster.num_threads": 1,
}
"""Two blocks, the same whatever a busy machine would time, and some shards of every split."""

WRITING = "/blocks/000/attempt-[^/]*/activations/train-00001"
CHECKPOINT = "/blocks/000/attempt-[^/]*/checkpoint-00001.safetensors"
CHECKPOINT_RECORD = "/blocks/000/attempt-[^/]*/checkpoint.json"
MANIFEST = "/blocks/000/manifest.json"
SECOND_BLOCK = "/blocks/001/attempt-[^/]*/checkpoint.json"
INGEST = "/ingest/attempt-[^/]*/train-00000"
PLAN = "/plan.json"
MODEL = "/model/model.safetensors"


@dataclass(frozen=True, kw_only=True)
class Row:
    """What a fault did to a run.

    Attributes:
        fault, where: in words.
        times: how often it struck.
        end: "survived", or the error that the run ended with before it was resumed.
        lost_s: seconds that the run, resuming included, took longer than an undisturbed one.
        same_weights: whether it ended with the weights of the undisturbed one, bit for bit.
    """

    fault: str
    where: str
    times: int
    end: str = "survived"
    lost_s: float
    same_weights: bool


@dataclass(kw_only=True)
class Outcome:
    """How a run went.

    Attributes:
        summary: of the run; empty if it ended with an error.
        error: that ended it.
        events: as they came.
        seconds: wall time.
    """

    summary: dict[str, Any] = field(default_factory=dict)
    error: NFError | None = None
    events: list[Event] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def lost_workers(self) -> int:
        """Attempts that ended because their worker died; a block that was reading from it then starts again too."""
        return sum(isinstance(event, StageFailed) and event.error == "WorkerLost" for event in self.events)

    def workers(self, stage: str) -> list[int]:
        """Processes that worked on a stage, in order."""
        return workers_of(self.events, stage)


def workers_of(events: list[Event], stage: str) -> list[int]:
    """Processes that worked on a stage, in order."""
    started = [event for event in events if isinstance(event, StageStarted) and event.stage == stage]
    return [int(event.worker.rpartition(":")[2]) for event in started]


def digits(uri: str, **changes: Any) -> RunConfig:
    """Makes the small configuration; `train__epochs=3` changes a field."""
    flags = {**DIGITS, "storage.uri": uri, "cluster.executor": "inline"}
    return resolve_config(flags={**flags, **{name.replace("__", "."): value for name, value in changes.items()}})


def run_to_end(config: RunConfig, on_event: Callable[[Event], None] | None = None) -> Outcome:
    """Trains in this process and takes an error as an outcome."""
    outcome, began = Outcome(), time.monotonic()

    def listen(event: Event) -> None:
        outcome.events.append(event)
        if on_event is not None:
            on_event(event)

    try:
        outcome.summary = train(config, on_event=listen)
    except NFError as error:
        outcome.error = error
    outcome.seconds = time.monotonic() - began
    return outcome


@dataclass(frozen=True, kw_only=True)
class Undisturbed:
    """What a run without faults ends with.

    Attributes:
        weights: checksum of the weights.
        seconds: wall time.
    """

    weights: str
    seconds: float

    def check(self, fault: str, where: str, times: int, *outcomes: Outcome) -> None:
        """Adds a row of a disturbed run and those that resumed it, and holds the last one's weights to these."""
        error, last = outcomes[0].error, outcomes[-1]
        assert last.error is None, last.error
        row = Row(
            fault=fault,
            where=where,
            times=times,
            end="survived" if error is None else f"exit code {error.exit_code}, then resumed",
            lost_s=round(sum(outcome.seconds for outcome in outcomes) - self.seconds, 1),
            same_weights=last.summary["weights_checksum"] == self.weights,
        )
        append_row(row)
        assert times > 0, "the fault never happened"
        assert row.same_weights


def append_row(row: Row) -> None:
    """Adds a row to the table, where one is wanted."""
    path = os.environ.get(TABLE_VARIABLE)
    if path:
        with open(path, "a", encoding="utf8") as file:
            file.write(json.dumps(asdict(row)) + "\n")


class KillableServer:
    """An S3 server on a volume that outlives it: killed and started again, it answers at the same port."""

    def __init__(self, server: S3Server, log: Path) -> None:
        self.server = server
        self._log = log
        self._command = psutil.Process(server.process.pid).cmdline()
        credentials = {"MINIO_ROOT_USER": server.access_key, "MINIO_ROOT_PASSWORD": server.secret_key}
        self._environment = {**os.environ, **credentials}
        self._processes = [server.process]

    def kill(self) -> None:
        """Ends it without a word, and waits until it is gone."""
        process = self._processes[-1]
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)

    def start(self) -> None:
        """Starts it again, from any thread, and does not wait."""
        with self._log.open("ab") as output:
            process = subprocess.Popen(
                self._command,
                env=self._environment,
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self._processes.append(process)

    def restart_after(self, seconds: float) -> None:
        """Kills it now and starts it again after some seconds."""
        self.kill()
        threading.Timer(seconds, self.start).start()


@contextlib.contextmanager
def killable_server(folder: Path, juicefs: str) -> Iterator[KillableServer]:
    """Runs a server with MinIO's code until the context ends."""
    with minio_server(folder, juicefs) as server:
        killable = KillableServer(server, folder / "restarted.log")
        try:
            yield killable
        finally:
            killable.kill()


class Raylets:
    """A cluster on this machine: a head without CPUs, and nodes of one CPU each."""

    def __init__(self, num_nodes: int) -> None:
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self.address = self.cluster.address
        for _ in range(num_nodes):
            self.add()

    def add(self) -> None:
        """Adds a node."""
        self.cluster.add_node(num_cpus=1)
        self.cluster.wait_for_nodes()

    def lose_node_of(self, pid: int) -> None:
        """Kills the raylet that started a worker process."""
        parent = psutil.Process(pid).ppid()
        for node in self.cluster.list_all_nodes():
            if node.all_processes["raylet"][0].process.pid == parent:
                self.cluster.remove_node(node, allow_graceful=False)
                return
        raise AssertionError(f"no node started {pid}")


@dataclass(kw_only=True)
class Scene:
    """Where the faults happen.

    Attributes:
        server: S3, behind the proxy.
        proxy: which all clients take for S3.
        raylets: the Ray cluster.
        undisturbed: what a run without faults ends with there.
    """

    server: KillableServer
    proxy: FaultProxy
    raylets: Raylets
    undisturbed: Undisturbed | None = None

    def config(self, server: S3Server | None = None, **changes: Any) -> RunConfig:
        """Makes a configuration of a run of its own on the cluster and the server, or another server."""
        uri = f"s3://{(server or self.server.server).make_bucket()}/runs"
        on_cluster = {"cluster__executor": "ray", "cluster__address": self.raylets.address}
        return digits(uri, **{**on_cluster, **changes})

    @contextlib.contextmanager
    def in_front_of(self, server: S3Server) -> Iterator[None]:
        """Lets the proxy lead to another server, which must take the credentials of this one."""
        upstream = self.proxy.upstream
        host, port = server.endpoint.removeprefix("http://").split(":")
        self.proxy.upstream = (host, int(port))
        try:
            yield
        finally:
            self.proxy.upstream = upstream

    def measure(self) -> Undisturbed:
        """Runs once without a fault; where the time goes into a table, after a run that warms the cluster up."""
        if TABLE_VARIABLE in os.environ:
            run_to_end(self.config())
        outcome = run_to_end(self.config())
        return Undisturbed(weights=outcome.summary["weights_checksum"], seconds=outcome.seconds)

    def check(self, fault: str, where: str, times: int, *outcomes: Outcome) -> None:
        """Adds a row and holds the last outcome's weights to those of an undisturbed run."""
        assert self.undisturbed is not None
        self.undisturbed.check(fault, where, times, *outcomes)


def lead_to(environment: pytest.MonkeyPatch, server: S3Server, proxy: FaultProxy) -> None:
    """Makes this process, and what it starts, take the proxy for the server."""
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        environment.delenv(name, raising=False)
    for name, value in {**server.environment, "AWS_ENDPOINT_URL": proxy.endpoint}.items():
        environment.setenv(name, value)


@contextlib.contextmanager
def driver_process(config: RunConfig, folder: Path) -> Iterator[Session]:
    """Runs `nf-pipeline train` as a process of its own until the context ends."""
    file = folder / "config.json"
    file.write_text(config.model_dump_json())
    command = [sys.executable, "-m", "nf_pipeline", "train", "--config", str(file), "--quiet"]
    with running(command, os.environ, folder / "driver.log") as session:
        yield session


def kill_sender(*, at: At, path: str, method: str = "PUT") -> Rule:
    """Makes a rule that kills the process that sends a request, and its connection."""

    def kill(request: Request) -> None:
        assert request.pid != os.getpid()
        os.kill(request.pid, signal.SIGKILL)

    return Rule(fault=Call(function=kill, then_reset=True), at=at, method=method, path=path)


def when(path: str, then: Callable[[], object], *, at: At = At.REQUEST) -> Rule:
    """Makes a rule that does something before a PUT goes on."""
    return Rule(fault=Call(function=lambda _: then()), at=at, method="PUT", path=path)


def wait_for_exit(
    session: Session, timeout_s: float = 90.0, *, meanwhile: Callable[[], object] = lambda: None
) -> int:
    """Returns a command's exit code; does something again and again until it ends."""

    def has_ended() -> bool:
        meanwhile()
        return session.process.poll() is not None

    wait_until(has_ended, f"end of {session.log.name}", timeout_s=timeout_s)
    return session.process.wait()
