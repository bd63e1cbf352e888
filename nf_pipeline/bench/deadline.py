"""A moment at which a process should have ended, and whether something still fits before it.

Entry class: `Deadline`.
"""

import math
import os
import time

_RESERVE = 1.3  # no two epochs take the same time


class Deadline:
    """Counts down from now; nothing fits any more once the process that started this one is gone.

    Args:
        seconds: None never ends.
    """

    def __init__(self, seconds: float | None) -> None:
        self._end = math.inf if seconds is None else time.monotonic() + seconds
        self._parent = os.getppid()

    @property
    def left_s(self) -> float:
        """Seconds left; infinite without an end."""
        return self._end - time.monotonic() if os.getppid() == self._parent else 0.0

    def leaves(self, seconds: float) -> bool:
        """Whether something that took so many seconds before fits once more, with some reserve."""
        return self.left_s > _RESERVE * seconds
