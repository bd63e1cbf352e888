"""Runs every stage in the calling process: no Ray, original exceptions, easy to debug."""

from collections.abc import Iterator
from typing import Any

from nf_pipeline.events import Event
from nf_pipeline.executors.base import Resources, load_stage


class InlineExecutor:
    """Calls the stage where it stands."""

    def run(self, name: str, stage: str, task: Any, resources: Resources) -> Iterator[Event]:
        """Yields the stage's events; nothing is shipped anywhere."""
        yield from load_stage(stage)(task)

    def close(self) -> None:
        """Has nothing to stop."""

    def __enter__(self) -> "InlineExecutor":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
