"""What this process may use of the machine it runs on, and how it is called in logs. Standard library only."""

import os
import socket
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
CGROUP_CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")
CGROUP_MEMORY_LIMIT = Path("/sys/fs/cgroup/memory.max")


def usable_cpus() -> float:
    """Returns the CPUs that this process may use: its affinity, cut by the container's limit."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = CGROUP_CPU_LIMIT.read_text().split()
    except (OSError, ValueError):
        return float(affinity)
    return float(affinity) if quota == "max" else min(float(affinity), int(quota) / int(period))


def available_threads() -> int:
    """Returns how many threads can compute at the same time, at least 1."""
    return max(1, int(usable_cpus()))


def memory_bytes() -> int:
    """Returns the memory of this machine, cut by the container's limit."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(physical, int(CGROUP_MEMORY_LIMIT.read_text()))
    except (OSError, ValueError):  # no such file, or "max"
        return physical


def worker_name() -> str:
    """Returns "host:pid" for logs and the summary."""
    return f"{socket.gethostname()}:{os.getpid()}"


def process_identity() -> str:
    """Names this process so that `has_ended` can tell, on this machine, whether it still runs.

    "PLACE/PID/START": the place is one boot of one machine and one container on it, the start tells processes with
    the same number apart. "" where the operating system does not say.
    """
    place = _place()
    return f"{place}/{os.getpid()}/{_start_of(os.getpid())}" if place else ""


def has_ended(identity: str) -> bool:
    """Whether a process named by `process_identity` has certainly ended; False where that cannot be known."""
    place, pid, start = [*identity.split("/"), "", "", ""][:3]
    if not place or place != _place() or not pid.isdecimal():
        return False
    try:
        os.kill(int(pid), 0)
        return _start_of(int(pid)) != start
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):  # somebody else's, or no file can be opened: nothing is known of it
        return False


def _place() -> str:
    try:
        return f"{_BOOT_ID.read_text().strip()}-{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # not Linux
        return ""


def _start_of(pid: int) -> str:
    """Returns when a process began, in clock ticks since boot; "" if only its entry is left.

    Raises:
        OSError: it cannot be looked at.
    """
    # Field 2, the name, may hold spaces and brackets: https://man7.org/linux/man-pages/man5/proc_pid_stat.5.html
    state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return "" if state in "ZX" else fields[18]
