"""Seconds, CPU seconds and bytes written while something trains, summed over several processes.

Entry class: `Stopwatch`.
"""

import time
from dataclasses import dataclass
from pathlib import Path

_PROCESS_IO = Path("/proc/self/io")


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What a training took so far.

    Attributes:
        wall_s: seconds.
        cpu_s: seconds of all threads of the process.
        written_bytes: through system calls, page cache included; 0 where the system does not say.
    """

    wall_s: float = 0.0
    cpu_s: float = 0.0
    written_bytes: int = 0


class Stopwatch:
    """Counts while it runs; begins stopped.

    Args:
        before: what earlier processes spent on the same training.
    """

    def __init__(self, before: Spent) -> None:
        self._before = before
        self._since: Spent | None = None

    def go(self) -> None:
        """Counts from now on; does nothing if it runs."""
        if self._since is None:
            self._since = _now()

    def stop(self) -> None:
        """Counts no more until `go`."""
        self._before, self._since = self.spent(), None

    def spent(self) -> Spent:
        """Returns the sum up to now."""
        if self._since is None:
            return self._before
        since, now, before = self._since, _now(), self._before
        return Spent(
            wall_s=before.wall_s + now.wall_s - since.wall_s,
            cpu_s=before.cpu_s + now.cpu_s - since.cpu_s,
            written_bytes=before.written_bytes + now.written_bytes - since.written_bytes,
        )


def _now() -> Spent:
    return Spent(wall_s=time.monotonic(), cpu_s=time.process_time(), written_bytes=_written_bytes())


def _written_bytes() -> int:
    # https://docs.kernel.org/filesystems/proc.html: wchar counts what write calls moved. What is read is
    # mostly mapped, and no call tells: see `images.bytes_per_pass`.
    try:
        counts = dict(line.split(": ") for line in _PROCESS_IO.read_text().splitlines())
    except OSError:  # not Linux
        return 0
    return int(counts["wchar"])
