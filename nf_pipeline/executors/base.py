"""What every executor offers, and how a stage is found by its name."""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from nf_pipeline.events import Event

Stage = Callable[[Any], Iterator[Event]]


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one stage needs of a worker.

    Attributes:
        num_cpus: threads it computes with.
        device: "auto", "cpu" or "cuda".
    """

    num_cpus: int
    device: str


class Executor(Protocol):
    """Runs stages; a context manager that gives back what it started."""

    def run(self, name: str, stage: str, task: Any, resources: Resources) -> Iterator[Event]:
        """Runs one stage and yields its events as they happen.

        Args:
            name: shown wherever the executor lists its tasks.
            stage: "package.module:function", a generator function of one argument.
            task: its picklable argument.
            resources: what the worker must have.

        Raises:
            NFError: as the stage raised it.
            WorkerLost: the process or the node that ran the stage died.
        """
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
