"""The budgets of a comparison, from the smallest at which anything trains to where backpropagation has all it wants.

Entries: `choose_budgets`, `backprop_peaks`.
"""

from collections.abc import Mapping

from nf_pipeline.bench.fit import OUT_OF_MEMORY, FitProbe
from nf_pipeline.bench.methods import METHODS, REFERENCE
from nf_pipeline.bench.task import Task
from nf_pipeline.core.planner import make_plan
from nf_pipeline.errors import PlanError

_TIGHT_BATCHES = (2, 4, 16)
_LARGE_BATCH = 256  # told although it may be above the largest that is trained
_ROOM = 1.02  # as a person would set a limit: not to the byte
_STEP = 2**16
_DIFFERENT = 1.15


def backprop_peaks(task: Task) -> dict[int, int]:
    """Returns what a step of plain backpropagation holds, in bytes, by batch; batches that no device holds are left
    out."""
    probe = FitProbe(task, METHODS[REFERENCE])
    sizes = sorted({*_TIGHT_BATCHES, task.config.memory.max_batch_size, _LARGE_BATCH})
    peaks = {size: probe.peak_bytes(size) for size in sizes}
    return {size: peak for size, peak in peaks.items() if peak < OUT_OF_MEMORY}


def choose_budgets(task: Task, peaks: Mapping[int, int]) -> dict[str, int]:
    """Computes budgets for a task's model.

    Args:
        peaks: see `backprop_peaks`.

    Returns:
        Bytes by what they are: "smallest" (the pipeline's), "backprop batch 2", ... up to the largest batch.
    """
    largest = task.config.memory.max_batch_size
    budgets = {f"backprop batch {size}": peak for size, peak in peaks.items() if size <= largest}
    smallest = smallest_budget(task)
    return spread({**({"smallest": smallest} if smallest is not None else {}), **budgets})


def smallest_budget(task: Task) -> int | None:
    """Returns the smallest budget with which the pipeline trains; None if any does."""
    config = task.config.model_copy(update={"memory": task.config.memory.model_copy(update={"budget_bytes": 1})})
    try:
        make_plan(
            config,
            inputs=task.inputs,
            target=task.target,
            split_rows=task.ingest.facts["split_rows"],
        )
    except PlanError as error:
        return error.smallest_budget_bytes
    return None


def spread(budgets: dict[str, int]) -> dict[str, int]:
    """Rounds budgets up and leaves out those that hardly differ from the one below."""
    kept: dict[str, int] = {}
    for name, num_bytes in sorted(budgets.items(), key=lambda item: item[1]):
        rounded = -(-int(num_bytes * _ROOM) // _STEP) * _STEP
        if not kept or rounded > _DIFFERENT * max(kept.values()):
            kept[name] = rounded
    return kept
