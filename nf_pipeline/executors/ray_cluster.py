"""Runs every stage as a Ray task: the only module that imports Ray.

A stage becomes a streaming-generator task, so its events reach the driver as they happen and its error arrives
as what it was. `max_calls=1` ends the worker process after each stage: that is what gives its device memory
back (a reused worker keeps its CUDA context and cache). Ray itself never retries: it would retry with the same
resources; `nf_pipeline.retry` decides instead.
"""

import logging
import re
import socket
from collections.abc import Iterator
from typing import Any

import ray
from ray.exceptions import (
    GetTimeoutError,
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayError,
    RayTaskError,
    TaskUnschedulableError,
    WorkerCrashedError,
)

from nf_pipeline.config import ClusterConfig
from nf_pipeline.errors import ConfigError, InternalError, NFError, WorkerLost
from nf_pipeline.events import Event
from nf_pipeline.executors.base import Resources, load_stage

logger = logging.getLogger(__name__)

LOCAL_OBJECT_STORE_BYTES = 100 * 2**20  # events only: the data goes through the run's store
STALL_TIMEOUT_S = 3600.0  # a stage reports every few seconds where it can; an hour of silence is a hang
CONNECT_TIMEOUT_S = 10.0
EVENT_TIMEOUT_S = 60.0  # fetching an event that is ready


_HOST_AND_PORT = re.compile(r"(?:ray://)?\[?(?P<host>[\w.:-]+?)\]?:(?P<port>\d+)")


@ray.remote(max_calls=1, max_retries=0, num_returns="streaming")
def _run_stage(stage: str, task: Any) -> Iterator[Event | None]:
    yield None  # a worker is there; what comes next may import torch and fetch a checkpoint first
    yield from load_stage(stage)(task)


class RayExecutor:
    """Joins the Ray at `cluster.address`, or starts a local one and stops it at the end."""

    def __init__(self, cluster: ClusterConfig) -> None:
        """Connects.

        Raises:
            ConfigError: there is no Ray at the address.
        """
        self._placement_timeout_s = cluster.placement_timeout_s
        self._owns_ray = not ray.is_initialized()
        if not self._owns_ray:
            return
        if cluster.address is not None:
            _check_reachable(cluster.address)
        try:
            if cluster.address is None:
                # "local": a bare init joins whatever a file in the temporary folder points at. Token
                # authentication is left as the environment says; Ray reads RAY_AUTH_MODE when it is imported
                # and since 2.59 turns it on for local clusters by itself.
                ray.init(
                    address="local",
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    object_store_memory=LOCAL_OBJECT_STORE_BYTES,
                )
            else:
                ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"cannot reach a Ray cluster at {cluster.address or 'this machine'}: {error}",
                "check --address, or leave it out to start a local Ray, or use --executor inline",
            ) from error

    def run(self, name: str, stage: str, task: Any, resources: Resources) -> Iterator[Event]:
        """Submits the stage and yields its events; see `Executor.run`."""
        wanted = self._wanted(resources)
        self._check_feasible(name, wanted)
        events = _run_stage.options(name=name, **wanted).remote(stage, task)
        finished = False
        try:
            self._next_event(name, events, self._placement_timeout_s, wanted)
            while not finished:
                event = self._next_event(name, events, STALL_TIMEOUT_S, wanted)
                finished = event is None
                if event is not None:
                    yield event
        finally:
            if not finished:
                ray.cancel(events, force=True)

    def close(self) -> None:
        """Stops the local Ray, or leaves the cluster it joined."""
        if self._owns_ray and ray.is_initialized():
            ray.shutdown()

    def __enter__(self) -> "RayExecutor":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @staticmethod
    def _wanted(resources: Resources) -> dict[str, float]:
        has_gpus = ray.cluster_resources().get("GPU", 0) > 0
        needs_gpu = resources.device == "cuda" or (resources.device == "auto" and has_gpus)
        return {"num_cpus": resources.num_cpus, "num_gpus": 1 if needs_gpu else 0}

    @staticmethod
    def _check_feasible(name: str, wanted: dict[str, float]) -> None:
        # Ray lets a task that no node can ever hold wait silently.
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        for node in nodes:
            if node.get("CPU", 0) >= wanted["num_cpus"] and node.get("GPU", 0) >= wanted["num_gpus"]:
                return
        has = "; ".join(f"{node.get('CPU', 0):g} CPU, {node.get('GPU', 0):g} GPU" for node in nodes)
        raise ConfigError(
            f"{name} asks for {wanted['num_cpus']:g} CPU and {wanted['num_gpus']:g} GPU on one node; "
            f"the cluster's nodes have: {has or 'none'}",
            "--set cluster.num_threads to what a node has, --device cpu, or add a node",
        )

    def _next_event(
        self, name: str, events: "ray.ObjectRefGenerator", timeout_s: float, wanted: dict[str, float]
    ) -> Event | None:
        ready, _ = ray.wait([events], timeout=timeout_s)
        if not ready:
            raise WorkerLost(
                name,
                f"no word from a worker for {timeout_s:g} s (asked for {wanted}, "
                f"free now: {ray.available_resources()})",
                "free a worker, add one, or raise --set cluster.placement_timeout_s",
            )
        try:
            return ray.get(next(events), timeout=EVENT_TIMEOUT_S)
        except StopIteration:
            return None
        except RayTaskError as error:
            raise _cause_of(error) from None
        except OutOfMemoryError as error:
            raise WorkerLost(name, f"Ray ended it for host memory: {error}", "give the worker more memory") from None
        except (WorkerCrashedError, NodeDiedError, LocalRayletDiedError, ObjectLostError, GetTimeoutError) as error:
            raise WorkerLost(name, type(error).__name__, "see the Ray logs of that worker") from None
        except TaskUnschedulableError as error:
            raise ConfigError(f"{name} cannot be placed: {error}", "add a node that holds it") from None
        except RayError as error:
            raise InternalError(f"{name}: {type(error).__name__}: {error}") from error


def _check_reachable(address: str) -> None:
    """Ray itself tries an address that nobody answers for minutes; names such as "auto" are left to it."""
    match = _HOST_AND_PORT.fullmatch(address)
    if match is None:
        return
    try:
        socket.create_connection((match["host"], int(match["port"])), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"no Ray cluster answers at {address}: {error}",
            "check --address, or leave it out to start a local Ray, or use --executor inline",
        ) from None


def _cause_of(error: RayTaskError) -> BaseException:
    cause = error.cause
    if isinstance(cause, NFError | MemoryError | OSError):
        return cause
    return InternalError(f"a worker raised {type(cause).__name__}: {cause}\n{error}")
