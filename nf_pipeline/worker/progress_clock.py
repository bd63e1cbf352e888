"""When to report progress, and how fast it goes."""

import time

REPORT_EVERY_S = 1.0
POLL_S = 0.25


class ProgressClock:
    """Runs from its making on."""

    def __init__(self) -> None:
        self._began = self._reported = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the clock was made."""
        return time.monotonic() - self._began

    def sleep(self) -> None:
        """Waits a moment before something outside is looked at again."""
        time.sleep(POLL_S)

    def is_due(self) -> bool:
        """Tells about once a second that it is time for a report."""
        now = time.monotonic()
        due = now - self._reported >= REPORT_EVERY_S
        if due:
            self._reported = now
        return due

    def rate(self, done: int) -> float:
        """Returns how many were done per second so far."""
        return done / max(self.seconds, 1e-9)
