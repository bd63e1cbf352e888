"""The budgets of a comparison, from the smallest at which anything trains to where backpropagation has all it wants.

Entry: `choose_budgets`.
"""

from nf_pipeline.bench.fit import OUT_OF_MEMORY, FitProbe
from nf_pipeline.bench.methods import METHODS
from nf_pipeline.bench.task import Task
from nf_pipeline.core.planner import make_plan
from nf_pipeline.errors import PlanError

_TIGHT_BATCHES = (2, 4, 16)
_ROOM = 1.02  # as a person would set a limit: not to the byte
_STEP = 2**16
_DIFFERENT = 1.15


def choose_budgets(task: Task) -> dict[str, int]:
    """Computes budgets for a task's model.

    Returns:
        Bytes by what they are: "smallest" (the pipeline's), "backprop batch 2", ... up to the largest batch.
    """
    probe = FitProbe(task, METHODS["bp"])
    wanted = (*_TIGHT_BATCHES, task.config.memory.max_batch_size)
    budgets = {f"backprop batch {size}": probe.peak_bytes(size) for size in wanted}
    smallest = smallest_budget(task)
    found = {"smallest": smallest} if smallest is not None else {}
    return spread({**found, **{name: peak for name, peak in budgets.items() if peak < OUT_OF_MEMORY}})


def smallest_budget(task: Task) -> int | None:
    """Returns the smallest budget with which the pipeline trains; None if any does."""
    facts = task.ingest.facts
    config = task.config.model_copy(update={"memory": task.config.memory.model_copy(update={"budget_bytes": 1})})
    try:
        make_plan(
            config,
            image_shape=task.image_shape,
            num_classes=facts["num_classes"],
            split_rows=facts["split_rows"],
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
