"""What a Ray worker advertises, so that blocks are placed by memory: the words that `ray start` takes.

Ray schedules by GPUs, not by their memory, and sums resources over a node: a custom resource holds what training
may use, in MiB, and every GPU has a raylet of its own. Knows nothing of Ray itself. Entry: `advertise`.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nf_pipeline.errors import ConfigError
from nf_pipeline.gpus import VISIBLE_DEVICES, Gpu
from nf_pipeline.units import format_bytes

GPU_MEMORY = "gpu_mem_mib"
CPU_MEMORY = "cpu_mem_mib"
DEVICE_LABEL = "nf-device"
GPU_LABEL = "nf-gpu"

MIB = 2**20
MAX_LABEL_CHARS = 63  # of Kubernetes, which Ray follows
START = "ray start --address=HEAD:6379 $(nf-pipeline worker-resources --gpu {gpu})"


@dataclass(frozen=True, kw_only=True)
class WorkerResources:
    """What one raylet advertises.

    Attributes:
        num_gpus: 0 or 1.
        resources: custom resources, in MiB.
        labels: of the node.
        notes: what a person should know, one line each.
    """

    num_gpus: int
    resources: dict[str, int]
    labels: dict[str, str]
    notes: tuple[str, ...] = ()

    @property
    def words(self) -> list[str]:
        """Arguments of `ray start`; none holds a blank or needs quoting in an unquoted $(...)."""
        words = [f"--num-gpus={self.num_gpus}"]
        if self.resources:
            words.append(f"--resources={json.dumps(self.resources, separators=(',', ':'))}")
        return [*words, "--labels=" + ",".join(f"{name}={value}" for name, value in self.labels.items())]

    def to_json(self) -> dict[str, Any]:
        """Returns the same as a JSON document, `words` included."""
        return {
            "num_gpus": self.num_gpus,
            "resources": self.resources,
            "labels": self.labels,
            "words": self.words,
            "notes": list(self.notes),
        }


def advertise(gpus: Sequence[Gpu], reserve_bytes: int, memory_bytes: int | None = None) -> WorkerResources:
    """Decides what a raylet that sees these cards advertises.

    Args:
        gpus: none for a CPU worker, or one.
        reserve_bytes: part of a card that the CUDA context takes, beside what training holds.
        memory_bytes: what training may hold; None takes a card less the reserve, and nothing of a CPU worker:
            how much of a machine's memory is free for training is not to be guessed.

    Raises:
        ConfigError: several cards, or a size that the card does not have.
    """
    if len(gpus) > 1:
        raise _several(gpus)
    if memory_bytes is not None and memory_bytes < MIB:
        raise ConfigError(f"--memory {memory_bytes} bytes: want at least 1MiB", "--memory 300MiB")
    return _gpu_worker(gpus[0], reserve_bytes, memory_bytes) if gpus else _cpu_worker(memory_bytes)


def _cpu_worker(memory_bytes: int | None) -> WorkerResources:
    labels = {DEVICE_LABEL: "cpu"}
    if memory_bytes is None:
        note = "no GPU and no --memory: no memory is advertised, and blocks are placed by CPUs alone"
        return WorkerResources(num_gpus=0, resources={}, labels=labels, notes=(note,))
    return WorkerResources(num_gpus=0, resources={CPU_MEMORY: memory_bytes // MIB}, labels=labels)


def _gpu_worker(gpu: Gpu, reserve_bytes: int, memory_bytes: int | None) -> WorkerResources:
    usable = _usable_bytes(gpu, reserve_bytes, memory_bytes)
    notes = []
    if gpu.free_bytes is not None and gpu.free_bytes < usable:
        notes.append(
            f"{_called(gpu)} has {format_bytes(gpu.free_bytes)} free now, {format_bytes(usable)} are advertised: "
            "other programs hold memory on it"
        )
    labels = {DEVICE_LABEL: "cuda"}
    if label := label_value(gpu.name):
        labels[GPU_LABEL] = label
    resources = {GPU_MEMORY: usable // MIB}
    return WorkerResources(num_gpus=1, resources=resources, labels=labels, notes=tuple(notes))


def label_value(text: str) -> str:
    """Turns a name into a label's value: up to 63 letters, digits, '-', '_' and '.', the latter three not at an end.

    "NVIDIA GeForce RTX 3060 Ti" becomes "NVIDIA-GeForce-RTX-3060-Ti"; "" if nothing is left.
    """
    joined = re.sub(r"[^A-Za-z0-9._-]+", "-", text)
    return joined.lstrip("-._")[:MAX_LABEL_CHARS].rstrip("-._")


def _usable_bytes(gpu: Gpu, reserve_bytes: int, memory_bytes: int | None) -> int:
    total = gpu.total_bytes
    if total is None:
        if memory_bytes is None:
            raise ConfigError(f"{_called(gpu)} does not say how much memory it has", "--memory SIZE")
        return memory_bytes
    usable = total - reserve_bytes if memory_bytes is None else memory_bytes
    if usable > total:
        raise ConfigError(
            f"--memory {format_bytes(usable)}: {_called(gpu)} has {format_bytes(total)}",
            f"--memory {max(total - reserve_bytes, MIB) // MIB}MiB or less",
        )
    if usable < MIB:
        raise ConfigError(
            f"--reserve {format_bytes(reserve_bytes)} leaves nothing: {_called(gpu)} has {format_bytes(total)}",
            "a smaller --reserve, or --memory SIZE",
        )
    return usable


def _several(gpus: Sequence[Gpu]) -> ConfigError:
    lines = "\n".join(f"  {_start_line(gpu, gpus)}" for gpu in gpus)
    return ConfigError(
        f"{len(gpus)} GPUs are visible: a node's memory is one sum to Ray, so that blocks could land on a card that "
        "is too small",
        f"start one raylet per GPU:\n{lines}",
    )


def _start_line(gpu: Gpu, gpus: Sequence[Gpu]) -> str:
    selector = gpu.uuid if gpu.is_slice else str(gpu.index)
    # CUDA's own order puts the fastest card first; the positions here are those of the bus.
    alike = len({(other.name, other.total_bytes) for other in gpus}) == 1
    order = "" if alike or gpu.is_slice else "CUDA_DEVICE_ORDER=PCI_BUS_ID "
    return f"{order}{VISIBLE_DEVICES}={selector} {START.format(gpu=selector)}"


def _called(gpu: Gpu) -> str:
    return f"GPU {gpu.index} ({gpu.name})"
