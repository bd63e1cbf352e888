"""What an accuracy curve says: when a target was reached, how accurate a method was after a given time.

A curve is a list of (seconds, validation accuracy) in the order of time. Pure. Entries: `time_to`, `accuracy_at`,
`spread_of`.
"""

import statistics
from collections.abc import Sequence

Curve = Sequence[Sequence[float]]


def time_to(curve: Curve, target: float) -> float | None:
    """Returns the seconds after which a curve first has at least the target; None if it never has."""
    return next((seconds for seconds, accuracy in curve if accuracy >= target), None)


def accuracy_at(curve: Curve, seconds: float) -> float | None:
    """Returns the newest accuracy that was there after so many seconds; None if there was none yet."""
    before = [accuracy for moment, accuracy in curve if moment <= seconds]
    return before[-1] if before else None


def spread_of(values: Sequence[float | None]) -> list[float] | None:
    """Returns median, smallest and largest of repetitions; None unless more than half of them have a value."""
    there = [value for value in values if value is not None]
    if 2 * len(there) <= len(values):
        return None
    return [statistics.median(there), min(there), max(there)]
