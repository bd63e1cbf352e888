"""Runs every stage as a Ray task.

A stage becomes a streaming-generator task, so its events reach the driver as they happen and its error arrives
as what it was. On a GPU the worker process ends with its stage: that is what gives its device memory back (a reused
process keeps its CUDA context and cache). Several workers of one stage are placed together by a placement group.
Ray itself never retries: it would retry with the same resources; `nf_pipeline.retry` decides instead.
"""

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from nf_pipeline.config import ClusterConfig
from nf_pipeline.errors import (
    BlockError,
    ConfigError,
    InputReplaced,
    NFError,
    StageStopped,
    WorkerLost,
)
from nf_pipeline.events import Event
from nf_pipeline.executors.base import IsWanted, Resources, WorkerClass, always, load_stage
from nf_pipeline.executors.ray_connection import connect
from nf_pipeline.executors.ray_errors import translated
from nf_pipeline.executors.ray_metrics import RunMetrics
from nf_pipeline.executors.ray_nodes import classes_of, find_missing, living, names_of, needs_gpu, wanted_of
from nf_pipeline.gang import Gang
from nf_pipeline.host import available_threads
from nf_pipeline.worker_resources import GPU_MEMORY

logger = logging.getLogger(__name__)

STALL_TIMEOUT_S = 3600.0  # a stage reports every few seconds where it can; an hour of silence is a hang
EVENT_TIMEOUT_S = 60.0  # fetching an event that is ready
LOOK_EVERY_S = 1.0  # how soon a waiting stage notices that the run is being stopped
ENDING_S = 0.5  # in which a stage ends whose error is here
LAST_WORDS_S = 5.0  # in which the other members of a gang say why one of them died


Stream = ray.ObjectRefGenerator


def _run_stage(stage: str, task: Any) -> Iterator[Event | None]:
    yield None  # a worker is there; what comes next may import torch and fetch a checkpoint first
    yield from load_stage(stage)(task)


_IN_OWN_PROCESS = ray.remote(max_calls=1, max_retries=0, num_returns="streaming")(_run_stage)
_IN_KEPT_PROCESS = ray.remote(max_retries=0, num_returns="streaming")(_run_stage)


@ray.remote(max_retries=0, num_cpus=0)
def _find_address() -> str:
    """Returns an address of this node that is free now."""
    host = ray.util.get_node_ip_address()
    with socket.socket() as probe:
        probe.bind((host, 0))
        return f"{host}:{probe.getsockname()[1]}"


@dataclass(frozen=True, kw_only=True)
class _Request:
    """One stage that is to be placed: its name, what each worker asks for, how many there are, and until when."""

    name: str
    wanted: dict[str, float]
    num_workers: int
    is_wanted: IsWanted

    @property
    def bundle(self) -> dict[str, float]:
        """What a placement group reserves for one worker."""
        return {name: amount for name, amount in self.wanted.items() if amount}

    @property
    def options(self) -> dict[str, Any]:
        """The same for a task."""
        special = {name: amount for name, amount in self.wanted.items() if name not in ("CPU", "GPU") and amount}
        return {
            "name": self.name,
            "num_cpus": self.wanted["CPU"],
            "num_gpus": self.wanted["GPU"],
            "resources": special,
        }


class RayExecutor:
    """Joins the Ray at `cluster.address`, or starts a local one and stops it at the end."""

    def __init__(self, cluster: ClusterConfig, run: str | None = None) -> None:
        """Connects.

        Raises:
            ConfigError: there is no Ray at the address.
        """
        self._placement_timeout_s = cluster.placement_timeout_s
        self._is_autoscaling = cluster.autoscaling
        # What nodes have had: a stage never makes do with less because a node was lost. Nodes that an autoscaler has
        # yet to start are taken to advertise their GPU's memory.
        self._known = frozenset({GPU_MEMORY}) if cluster.autoscaling else frozenset()
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._num_placed = 0
        self._owns_ray = not ray.is_initialized()
        self._is_local = self._owns_ray and cluster.address is None
        self._connection = connect(cluster) if self._owns_ray else ExitStack()
        self._metrics = RunMetrics(run) if run is not None else None

    @property
    def is_parallel(self) -> bool:
        """Ray runs as many stages at the same time as it has room for."""
        return True

    def worker_classes(self, device: str) -> Sequence[WorkerClass]:
        """Lists the nodes that could train, smallest memory first; see `Executor.worker_classes`."""
        return classes_of(device, living(ray.nodes()))

    def device_for(self, device: str) -> str:
        """Looks whether the nodes have GPUs."""
        return "cuda" if needs_gpu(device, self._look()) else "cpu"

    def default_threads(self, device: str) -> int:
        """Returns the CPUs of the smallest node that could train, so that all of them are workers."""
        if self._is_local:
            return available_threads()
        return max(1, min((kind.num_cpus for kind in self.worker_classes(device)), default=1))

    def check(self, name: str, resources: Resources) -> None:
        """Compares with what the nodes have; where nodes may still come nothing can be said."""
        missing = None if self._is_autoscaling else self._find_missing(self._request(name, resources))
        if missing is not None:
            raise _unplaceable(name, missing)

    def run(
        self, name: str, stage: str, task: Any, resources: Resources, is_wanted: IsWanted = always
    ) -> Iterator[Event]:
        """Submits the stage and yields its events; see `Executor.run`."""
        request = self._request(name, resources, is_wanted)
        self._await_room(request)
        on_gpu = request.wanted["GPU"] > 0
        function = _IN_OWN_PROCESS if on_gpu else _IN_KEPT_PROCESS
        with self._submitted(request, function, stage, task) as streams:
            self._await_hello(request, streams)
            with self._placed():
                yield from self._events(request, streams)

    def observe(self, event: Event) -> None:
        """Turns the event into Ray metrics."""
        if self._metrics is not None:
            self._metrics.observe(event)

    def stop(self) -> None:
        """Ends all running stages within a second or two."""
        self._stopping.set()

    def close(self) -> None:
        """Stops the local Ray, or leaves the cluster it joined."""
        self._connection.close()

    def __enter__(self) -> "RayExecutor":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _request(self, name: str, resources: Resources, is_wanted: IsWanted = always) -> _Request:
        wanted = wanted_of(resources, self._look())
        return _Request(name=name, wanted=wanted, num_workers=resources.num_workers, is_wanted=is_wanted)

    def _look(self) -> frozenset[str]:
        """Returns the names of all resources that nodes have, or have had since this executor was made."""
        self._known |= names_of(living(ray.nodes()))
        return self._known

    @staticmethod
    def _find_missing(request: _Request) -> str | None:
        return find_missing(request.wanted, request.num_workers, living(ray.nodes()))

    def _await_room(self, request: _Request) -> None:
        """Waits for a node that could hold the stage: one that was lost may be replaced.

        Ray lets a task that no node can ever hold wait silently. An autoscaler must see it wait.
        """
        deadline = time.monotonic() + self._placement_timeout_s
        while not self._is_autoscaling and (missing := self._find_missing(request)) is not None:
            self._check_wanted(request)
            if time.monotonic() > deadline:
                raise _unplaceable(request.name, missing)
            time.sleep(LOOK_EVERY_S)

    @contextmanager
    def _submitted(self, request: _Request, function: Any, stage: str, task: Any) -> Iterator[list[Stream]]:
        """Submits one task per worker; what still runs at the end is cancelled."""
        if request.num_workers == 1:
            streams = [function.options(**request.options).remote(stage, task)]
            try:
                yield streams
            finally:
                _cancel(streams)
            return
        group = placement_group([request.bundle] * request.num_workers, name=request.name)
        streams = []
        try:
            self._wait_for(request, lambda timeout_s: group.wait(timeout_s))
            streams += _submit_gang(request, function, stage, task, group)
            yield streams
        finally:
            _cancel(streams)
            remove_placement_group(group)

    def _await_hello(self, request: _Request, streams: list[Stream]) -> None:
        for stream in streams:
            self._wait_for(request, lambda timeout_s, s=stream: bool(ray.wait([s], timeout=timeout_s)[0]))
            _next_event(request.name, stream)

    def _wait_for(self, request: _Request, is_ready: Callable[[float], bool]) -> None:
        """Waits until workers are there; the time counts only while no other stage of this run holds any."""
        waited_s = 0.0
        while not is_ready(LOOK_EVERY_S):
            self._check_wanted(request)
            waited_s = 0.0 if self._num_placed else waited_s + LOOK_EVERY_S
            if waited_s >= self._placement_timeout_s:
                raise BlockError(
                    request.name,
                    f"no worker became free within {self._placement_timeout_s:g} s (asked for {request.num_workers} "
                    f"x {request.bundle}, free now: {_free_resources()})",
                    "free a worker, add one, or raise --set cluster.placement_timeout_s",
                )

    @contextmanager
    def _placed(self) -> Iterator[None]:
        with self._lock:
            self._num_placed += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_placed -= 1

    def _events(self, request: _Request, streams: list[Stream]) -> Iterator[Event]:
        """Yields the events of the first worker, which speaks for all; an error of any ends the stage."""
        pending, heard = list(streams), time.monotonic()
        while pending:
            ready, _ = ray.wait(pending, timeout=LOOK_EVERY_S)
            self._check_wanted(request)
            if ready:
                heard = time.monotonic()
            elif time.monotonic() - heard > STALL_TIMEOUT_S:
                raise WorkerLost(request.name, f"no word from its worker for {STALL_TIMEOUT_S:g} s", "resume the run")
            for stream in ready:
                try:
                    event = _next_event(request.name, stream)
                except WorkerLost as lost:
                    raise _reason(request.name, [s for s in pending if s is not stream], lost) from None
                if event is None:
                    pending.remove(stream)
                elif stream is streams[0]:
                    yield event

    def _check_wanted(self, request: _Request) -> None:
        if self._stopping.is_set():
            raise StageStopped(f"{request.name} was stopped")
        if not request.is_wanted():
            raise InputReplaced(request.name, "what it was reading was given up; it is written anew")


def _submit_gang(request: _Request, function: Any, stage: str, task: Any, group: Any) -> list[Stream]:
    def on(bundle_idx: int) -> PlacementGroupSchedulingStrategy:
        return PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle_idx)

    reference = _find_address.options(scheduling_strategy=on(0)).remote()
    with translated(request.name):
        address = ray.get(reference, timeout=EVENT_TIMEOUT_S)
    size = request.num_workers
    return [
        function.options(scheduling_strategy=on(rank), **request.options).remote(
            stage, replace(task, gang=Gang(rank=rank, size=size, address=address))
        )
        for rank in range(size)
    ]


def _cancel(streams: list[Stream]) -> None:
    for stream in streams:
        if not stream.is_finished():
            ray.cancel(stream, force=True)


def _next_event(name: str, stream: Stream) -> Event | None:
    """Takes an event that is ready; None at the end of the stage."""
    with translated(name):
        try:
            return ray.get(next(stream), timeout=EVENT_TIMEOUT_S)
        except StopIteration:
            return None
        except RayError:
            _await_end(stream)
            raise


def _await_end(stream: Stream) -> None:
    """Waits for the end of a stage whose error has just arrived, which is a matter of milliseconds.

    Its process is kept: if it were cancelled then, that could hit the next stage there. (Asking for `completed()`
    instead makes Ray 2.60 abort this process now and then.)
    """
    deadline = time.monotonic() + ENDING_S
    while not stream.is_finished() and time.monotonic() < deadline:
        time.sleep(ENDING_S / 50)


def _reason(name: str, others: list[Stream], lost: WorkerLost) -> NFError:
    """Finds out why a member of a gang was lost: one that fails takes the others' connection with it."""
    deadline = time.monotonic() + LAST_WORDS_S
    while others and (left_s := deadline - time.monotonic()) > 0:
        ready, others = ray.wait(others, timeout=left_s)
        for stream in ready:
            try:
                if _next_event(name, stream) is not None:
                    others.append(stream)
            except WorkerLost:
                pass
            except NFError as error:
                return error
    return lost


def _free_resources() -> dict[str, float]:
    hidden = ("node:", "memory", "object_store_memory", "bundle", "accelerator_type")
    return {name: amount for name, amount in ray.available_resources().items() if not name.startswith(hidden)}


def _unplaceable(name: str, missing: str) -> ConfigError:
    return ConfigError(
        f"{name} {missing}",
        "--set cluster.num_threads or --memory-budget to what a node has (auto takes the smallest), --device cpu, "
        "or add a node",
    )
