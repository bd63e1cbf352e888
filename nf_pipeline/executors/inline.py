"""Runs every stage in the calling process: no Ray, original exceptions, easy to debug."""

from collections.abc import Iterator, Sequence
from typing import Any

from nf_pipeline.errors import ConfigError
from nf_pipeline.events import Event
from nf_pipeline.executors.base import IsWanted, Resources, WorkerClass, always, load_stage
from nf_pipeline.host import available_threads


class InlineExecutor:
    """Calls the stage where it stands, one after the other."""

    @property
    def is_parallel(self) -> bool:
        """One process trains one block at a time."""
        return False

    def worker_classes(self, device: str) -> Sequence[WorkerClass]:
        """Knows of no workers: what this process has, it finds out itself."""
        return ()

    def device_for(self, device: str) -> str:
        """Leaves "auto" to torch, which is not loaded here."""
        return device

    def default_threads(self, device: str) -> int:
        """Returns what this machine has."""
        return available_threads()

    def check(self, name: str, resources: Resources) -> None:
        """Refuses what takes more than one process."""
        if resources.num_workers > 1:
            raise ConfigError(
                f"{name} asks for {resources.num_workers} workers, executor inline is one process",
                "--executor ray, or leave --workers-per-block at 1",
            )

    def run(
        self, name: str, stage: str, task: Any, resources: Resources, is_wanted: IsWanted = always
    ) -> Iterator[Event]:
        """Yields the stage's events; nothing is shipped anywhere."""
        self.check(name, resources)
        yield from load_stage(stage)(task)

    def observe(self, event: Event) -> None:
        """Has no operators: whoever runs this sees the events."""

    def stop(self) -> None:
        """Has nothing to stop: a stage that ran here has ended with its error."""

    def close(self) -> None:
        """Has nothing to close."""

    def __enter__(self) -> "InlineExecutor":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
