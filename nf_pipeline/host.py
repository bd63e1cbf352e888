"""What this process may use of the machine it runs on, and how it is called in logs. Standard library only."""

import os
import socket
from pathlib import Path

CGROUP_CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")


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


def worker_name() -> str:
    """Returns "host:pid" for logs and the summary."""
    return f"{socket.gethostname()}:{os.getpid()}"
