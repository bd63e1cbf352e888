"""Asks a run to end soon, but at a point where nothing is lost.

An epoch that is being trained is finished and checkpointed first; everything else can be repeated quickly and is left
where it is. Deliberately knows nothing of signals. Entry class: `StopRequest`.
"""

import threading

from nf_pipeline.errors import RunInterrupted
from nf_pipeline.events import Event, Progress

_EPOCH_PHASES = ("train", "validate")


class StopRequest:
    """Set once, from a signal handler or any thread; looked at by every stage of the run."""

    def __init__(self) -> None:
        self._asked = threading.Event()

    @property
    def is_asked(self) -> bool:
        """Whether the run is to end."""
        return self._asked.is_set()

    def ask(self) -> None:
        """Asks the run to end when the epochs that are being trained are checkpointed."""
        self._asked.set()

    def check(self, event: Event | None = None) -> None:
        """Ends a stage, if that was asked for and its last event shows that no epoch would be lost.

        Args:
            event: the stage's last; None before its first.

        Raises:
            RunInterrupted: the stage is to end here.
        """
        in_epoch = isinstance(event, Progress) and event.phase in _EPOCH_PHASES
        if self.is_asked and not in_epoch:
            raise RunInterrupted("stopped as asked; what is finished is stored")
