"""What measurements were made on. Entry: `describe_machine`."""

import importlib.metadata
import platform
from pathlib import Path
from typing import Any

from nf_pipeline.host import available_threads

_CPU_FACTS = Path("/proc/cpuinfo")


def describe_machine(device: str) -> dict[str, Any]:
    """Returns names and versions.

    Args:
        device: "cpu" or "cuda".
    """
    import torch

    cpu = _cpu_name()
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu,
        "cpu": cpu,
        "cores": available_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device == "cuda" else None,
        "nf_pipeline": _own_version(),
    }


def _own_version() -> str:
    try:
        return importlib.metadata.version("nf_pipeline")
    except importlib.metadata.PackageNotFoundError:  # run from a copy of the tree
        return "not installed"


def _cpu_name() -> str:
    try:
        lines = _CPU_FACTS.read_text(encoding="utf8").splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
