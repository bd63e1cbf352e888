import pytest

from nf_pipeline.errors import (
    ConfigError,
    Diverged,
    NFError,
    ObjectCorrupt,
    OutOfBudget,
    PlanError,
    StorageError,
    StoreUnreachable,
    WorkerLost,
)
from nf_pipeline.retry import Decision, decide, shrink_batch

LOST = WorkerLost("block-000", "died")
AWAY = StoreUnreachable("cannot read a: 503")
TOO_BIG = OutOfBudget("block-000", "peak over budget")


@pytest.mark.parametrize(
    ("error", "failures", "want"),
    [
        (LOST, 1, Decision.RETRY),
        (LOST, 3, Decision.RETRY),
        (LOST, 4, Decision.RAISE),
        (AWAY, 1, Decision.RETRY),
        (AWAY, 3, Decision.RETRY),
        (AWAY, 4, Decision.RAISE),
        (StorageError("disk full"), 1, Decision.RAISE),
        (TOO_BIG, 1, Decision.SHRINK_BATCH),
        (TOO_BIG, 2, Decision.SHRINK_BATCH),
        (TOO_BIG, 3, Decision.RAISE),
        (Diverged("block-000", "loss nan"), 1, Decision.RAISE),
        (ConfigError("bad"), 1, Decision.RAISE),
        (PlanError("conv", 2, 1, 3), 1, Decision.RAISE),
        (ObjectCorrupt("bad"), 1, Decision.RAISE),
        (KeyError("bug"), 1, Decision.RAISE),
    ],
)
def test_decision_follows_cause_and_how_often_it_happened(
    error: BaseException, failures: int, want: Decision
) -> None:
    assert decide(error, failures) is want


def test_batch_shrinks_until_two_samples() -> None:
    sizes = [128]
    while sizes[-1] > 2:
        sizes.append(shrink_batch("block-000", sizes[-1]))
    assert sizes == sorted(set(sizes), reverse=True)
    with pytest.raises(NFError, match="below 2"):
        shrink_batch("block-000", 2)
