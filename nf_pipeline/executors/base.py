"""What every executor offers, and how a stage is found by its name."""

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from nf_pipeline.events import Event

Stage = Callable[[Any], Iterator[Event]]
IsWanted = Callable[[], bool]


def always() -> bool:
    """Wants a stage until its end."""
    return True


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one stage needs of each of its workers.

    Attributes:
        num_cpus: threads it computes with.
        device: "auto", "cpu" or "cuda".
        memory_bytes: what it may hold on its device; 0 for a stage that trains nothing. Only workers that advertise
            as much are taken, if any advertise anything.
        num_workers: workers that run the stage together.
    """

    num_cpus: int
    device: str
    memory_bytes: int = 0
    num_workers: int = 1


@dataclass(frozen=True, kw_only=True)
class WorkerClass:
    """Workers of one kind.

    Attributes:
        count: how many there are.
        device: "cpu" or "cuda".
        memory_bytes: what training may hold on each; None if they do not say.
        num_cpus: of each.
    """

    count: int
    device: str
    memory_bytes: int | None
    num_cpus: int


class Executor(Protocol):
    """Runs stages; a context manager that gives back what it started."""

    @property
    def is_parallel(self) -> bool:
        """Whether `run` may be called from several threads to run several stages at the same time."""
        ...

    def worker_classes(self, device: str) -> Sequence[WorkerClass]:
        """Lists the workers that could train on a device ("auto", "cpu" or "cuda"), smallest memory first."""
        ...

    def device_for(self, device: str) -> str:
        """Turns "auto" into the device that stages are placed on: where any worker has a GPU, "cuda"."""
        ...

    def default_threads(self, device: str) -> int:
        """Returns how many CPU threads a worker has that trains on a device ("auto", "cpu" or "cuda")."""
        ...

    def check(self, name: str, resources: Resources) -> None:
        """Finds out at once whether a stage could ever be placed.

        Raises:
            ConfigError: no worker has what it asks for; says what it asks for and what there is.
        """
        ...

    def run(
        self, name: str, stage: str, task: Any, resources: Resources, is_wanted: IsWanted = always
    ) -> Iterator[Event]:
        """Runs one stage and yields its events as they happen.

        Args:
            name: shown wherever the executor lists its tasks.
            stage: "package.module:function", a generator function of one argument.
            task: its picklable argument; a dataclass with a field `gang` if there are several workers, each of
                which gets its own place in it.
            resources: what each worker must have.
            is_wanted: asked about once a second while the stage waits or runs elsewhere.

        Raises:
            NFError: as the stage raised it.
            InputReplaced: the stage was ended because it is no longer wanted.
            WorkerLost: a process or node that ran the stage died.
            StageStopped: `stop` was called meanwhile.
        """
        ...

    def observe(self, event: Event) -> None:
        """Shows an event of the run where operators of the workers look."""
        ...

    def stop(self) -> None:
        """Ends all stages that run now, and every later one at its start."""
        ...

    def close(self) -> None:
        """Stops what the executor started; safe to call twice."""
        ...

    def __enter__(self) -> "Executor": ...

    def __exit__(self, *exc_info: object) -> None: ...


def load_stage(stage: str) -> Stage:
    """Imports the generator function that "package.module:function" names."""
    module, _, function = stage.partition(":")
    return getattr(importlib.import_module(module), function)
