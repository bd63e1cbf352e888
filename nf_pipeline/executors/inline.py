"""Runs every stage in the calling process: no Ray, original exceptions, easy to debug."""

from collections.abc import Iterator, Sequence
from typing import Any

from nf_pipeline.errors import ConfigError
from nf_pipeline.events import Event
from nf_pipeline.executors.base import IsWanted, Resources, WorkerClass, always, load_stage


class InlineExecutor:
    """Calls the stage where it stands, one after the other."""

    @property
    def is_parallel(self) -> bool:
        """One process trains one block at a time."""
        return False

    def worker_classes(self, device: str) -> Sequence[WorkerClass]:
        """Knows of no workers: what this process has, it finds out itself."""
        return ()

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
