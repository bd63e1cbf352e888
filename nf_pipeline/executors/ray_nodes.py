"""What the nodes of a Ray cluster have, and whether a stage could ever be placed on them.

Works on what `ray.nodes()` returns and imports no Ray. Memory is placed by a number that each node advertises:
Ray itself schedules whole GPUs and knows nothing of their memory (https://github.com/ray-project/ray/issues/26929).
A number is a sum per node, so a node stands for one GPU. Entry points: `wanted_of`, `find_missing`, `classes_of`.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from nf_pipeline.executors.base import Resources, WorkerClass
from nf_pipeline.worker_resources import CPU_MEMORY, GPU_MEMORY, MIB

Node = Mapping[str, float]
"""Resource -> amount, of one living node."""


def living(nodes: Sequence[Mapping[str, Any]]) -> list[Node]:
    """Takes the resources of all living nodes out of what `ray.nodes()` returns."""
    return [node["Resources"] for node in nodes if node["Alive"]]


def names_of(nodes: Sequence[Node]) -> frozenset[str]:
    """Returns the names of all resources that some node has."""
    return frozenset(name for node in nodes for name, amount in node.items() if amount > 0)


def needs_gpu(device: str, known: frozenset[str]) -> bool:
    """Tells whether a stage takes a GPU: "auto" does where any node has one.

    Args:
        device: "auto", "cpu" or "cuda".
        known: names of the resources that any node has, or has had: a stage whose GPU was lost waits for another.
    """
    return device == "cuda" or (device == "auto" and "GPU" in known)


def wanted_of(resources: Resources, known: frozenset[str]) -> dict[str, float]:
    """Returns what one worker of a stage asks of its node: Ray resource -> amount.

    Memory is asked for only where some node advertises it, or has.
    """
    on_gpu = needs_gpu(resources.device, known)
    wanted = {"CPU": float(resources.num_cpus), "GPU": 1.0 if on_gpu else 0.0}
    memory = GPU_MEMORY if on_gpu else CPU_MEMORY
    if resources.memory_bytes and memory in known:
        wanted[memory] = float(-(-resources.memory_bytes // MIB))
    return wanted


def find_missing(wanted: Mapping[str, float], num_workers: int, nodes: Sequence[Node]) -> str | None:
    """Says what is asked for and what there is, if the nodes could not hold the workers even when empty.

    Returns:
        None if they can.
    """
    if sum(_holds(node, wanted) for node in nodes) >= num_workers:
        return None
    asked = ", ".join(f"{amount:g} {name}" for name, amount in wanted.items() if amount or name == "GPU")
    workers = f"{num_workers} workers with " if num_workers > 1 else ""
    return f"asks for {workers}{asked} on one node; the cluster's nodes have: {_describe(wanted, nodes)}"


def classes_of(device: str, nodes: Sequence[Node]) -> list[WorkerClass]:
    """Groups the nodes that could train by what they advertise, smallest memory first, silent ones last.

    Where some nodes advertise memory the others are left out: no block is placed there.
    """
    on_gpu = needs_gpu(device, names_of(nodes))
    memory = GPU_MEMORY if on_gpu else CPU_MEMORY
    usable = [node for node in nodes if node.get("GPU" if on_gpu else "CPU", 0) >= 1]
    if any(memory in node for node in usable):
        usable = [node for node in usable if memory in node]
    kinds = Counter((node.get(memory), int(node.get("CPU", 0))) for node in usable)
    return [
        WorkerClass(
            count=count,
            device="cuda" if on_gpu else "cpu",
            memory_bytes=None if mib is None else int(mib) * MIB,
            num_cpus=num_cpus,
        )
        for (mib, num_cpus), count in sorted(kinds.items(), key=lambda item: (item[0][0] is None, item[0]))
    ]


def _holds(node: Node, wanted: Mapping[str, float]) -> int:
    """Counts the workers that a node could hold at the same time."""
    return min(int(node.get(name, 0) / amount) for name, amount in wanted.items() if amount)


def _describe(wanted: Mapping[str, float], nodes: Sequence[Node]) -> str:
    kinds = Counter(", ".join(f"{node.get(name, 0):g} {name}" for name in wanted) for node in nodes)
    return "; ".join(f"{count} x ({text})" if count > 1 else text for text, count in kinds.items()) or "none"
