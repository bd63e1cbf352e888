"""How accuracies and errors are written: per cent of the one, parts of the variance of the other.

A document says by `metric` which of the two it has. Knows nothing of tables. Entry: `metric_text`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nf_pipeline.units import format_accuracy, format_error


@dataclass(frozen=True)
class MetricText:
    """The words for one metric.

    Attributes:
        name: of its mean in documents, and for people.
        interval: of the interval around the mean in documents, behind the split's name.
        show: writes a mean; "-" for None.
    """

    name: str
    interval: str
    show: Callable[[float | None], str]

    def show_interval(self, interval: tuple[float, float]) -> str:
        """Writes an interval, "59.0-63.0 %" or "0.391-0.442"."""
        low, high = (self.show(end) for end in interval)
        unit = " %" if low.endswith(" %") else ""
        return f"{low.removesuffix(unit)}-{high}"


def metric_text(document: Mapping[str, Any]) -> MetricText:
    """Returns the words for a document with `metric`, or for a row with one of the means."""
    name = document.get("metric", "error" if "error" in document else "accuracy")
    return _METRICS[name]


def percent(part: float | None) -> str:
    """Writes a part of 1, "61.3 %"; "-" for None."""
    return "-" if part is None else format_accuracy(part)


def error_text(part: float | None) -> str:
    """Writes an error, "0.412"; "-" for None."""
    return "-" if part is None else format_error(part)


_METRICS = {
    "accuracy": MetricText("accuracy", "interval", percent),
    "error": MetricText("error", "error_interval", error_text),
}
