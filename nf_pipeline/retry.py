"""What the driver does after a stage failed: a pure table, tested without a cluster.

Ray would retry with the same resources, so the decision is made here, with a budget per cause.
"""

import enum

from nf_pipeline.errors import OutOfBudget, StoreUnreachable, WorkerLost

MAX_WORKERS_LOST = 4
MAX_TIMES_OUT_OF_BUDGET = 3
MAX_TIMES_UNREACHABLE = 4


class Decision(enum.Enum):
    """What happens next to a failed stage."""

    RETRY = "retry"
    SHRINK_BATCH = "shrink the batch and retry"
    RAISE = "give up"


def decide(error: BaseException, failures: int) -> Decision:
    """Decides from the error and how often this kind of error has ended an attempt, this time included.

    A lost worker says nothing about the work: retry. Nor does a store that is away for the worker: the driver meets
    it before the next attempt, and waits there or ends. Too much memory would happen again: retry smaller.
    Everything else (bad data, divergence, a store that refuses) is final. So is an
    input that was given up: the stage must wait until it is written anew, which is not for this table to know.
    """
    if isinstance(error, WorkerLost) and failures < MAX_WORKERS_LOST:
        return Decision.RETRY
    if isinstance(error, StoreUnreachable) and failures < MAX_TIMES_UNREACHABLE:
        return Decision.RETRY
    if isinstance(error, OutOfBudget) and failures < MAX_TIMES_OUT_OF_BUDGET:
        return Decision.SHRINK_BATCH
    return Decision.RAISE


def shrink_batch(stage: str, batch_size: int) -> int:
    """Returns three quarters of a batch size.

    Raises:
        OutOfBudget: nothing smaller than 2 samples trains batch norm.
    """
    if batch_size <= 2:
        raise OutOfBudget(stage, "the batch cannot shrink below 2 samples", "raise --memory-budget")
    return max(2, batch_size * 3 // 4)
