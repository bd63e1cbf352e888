"""A small search for a learning rate: up or down by a constant factor while that helps.

Pure: whoever calls it trains. Entries: `next_rate`, `search_group`.
"""

from collections.abc import Mapping

from nf_pipeline.bench.methods import Method

FACTOR = 3.0


def search_group(method: Method, batch_size: int | None) -> str:
    """Names what shares one search: baselines whose optimiser takes the same steps.

    Checkpointing changes no gradient, accumulated micro-batches are one batch (but for the statistics of batch norm),
    and bf16 rounds the same ones; so what is left is the batch. Rates are given for batch 128 and follow the batch
    linearly; batches between two powers of two differ by less than the step of the search.

    Args:
        batch_size: samples per optimiser step; None where a plan decides, which shares nothing.

    Returns:
        Its name; "" for a search of its own. Methods with settings of their own share with others of the same.
    """
    if batch_size is None:
        return ""
    low = 1 << (batch_size.bit_length() - 1)
    own = "".join(f", {name}={value}" for name, value in sorted(method.changes.items()))
    return f"{method.family}, batch {low} to {2 * low - 1}{own}"


def epochs_for(seconds: float, epoch_s: float, max_epochs: int) -> int:
    """Returns the schedule of one try: what fits the seconds, at least an epoch, at most the whole schedule."""
    return max(1, min(max_epochs, round(seconds / max(epoch_s, 1e-9))))


def next_rate(scores: Mapping[float, float], start: float, max_tries: int) -> float | None:
    """Decides what to try next.

    First `start` and its two neighbours, then beyond the best one as long as the best one is at an edge.

    Args:
        scores: accuracy by learning rate of what was tried.
        start: first rate.
        max_tries: rates tried at most.

    Returns:
        A rate; None when the search is done.
    """
    if start not in scores:
        return start if max_tries > 0 else None
    if len(scores) >= max_tries:
        return None
    best = best_rate(scores)
    for neighbour in (best / FACTOR, best * FACTOR):
        rounded = _round(neighbour)
        if rounded not in scores:
            return rounded
    return None


def best_rate(scores: Mapping[float, float]) -> float:
    """Returns the rate with the highest accuracy; of equal ones the lowest."""
    return min(scores, key=lambda rate: (-scores[rate], rate))


def _round(rate: float) -> float:
    return float(f"{rate:.2g}")
