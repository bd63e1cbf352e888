"""How many CPU threads this machine lends this process; without torch, so that the driver can ask."""

import os


def available_threads() -> int:
    """Returns the processors this process may use (its affinity, not the machine's count)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
