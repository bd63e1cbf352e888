"""A small search for a learning rate: up or down by a constant factor while that helps.

Pure: whoever calls it trains. Entry: `next_rate`.
"""

from collections.abc import Mapping

FACTOR = 3.0


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
