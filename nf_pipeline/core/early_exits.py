"""Who may leave early: thresholds on the confidence of an exit, and what they cost and give. Plain arithmetic.

A sample leaves at the first of some exits whose probability for its prediction reaches the threshold; the last exit
takes the rest. An operating point is those exits and that one threshold, for all of them: confidences are comparable
where every exit has its temperature. Knows nothing of models and stores. Entries: `find_points`, `measure_point`,
`check_exits`.

Shapes: E exits, the last one included; N samples.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from nf_pipeline.config import ExitsConfig
from nf_pipeline.errors import ConfigError
from nf_pipeline.samples import TargetSpec

NUM_THRESHOLDS = 48
"""Thresholds tried per set of exits: all of their confidences, or quantiles of more."""

MAX_POINTS = 24
"""Points kept of the best ones."""


@dataclass(frozen=True, kw_only=True)
class OperatingPoint:
    """A compromise between accuracy and cost, found on the validation split.

    Attributes:
        exits: positions of the exits at which samples may leave early, in order; the heads of others are not run.
        threshold: probability from which a sample leaves, in [0, 1].
        val_accuracy: on the validation split, in [0, 1].
        val_flops: mean of one sample's forward pass there.
    """

    exits: tuple[int, ...]
    threshold: float
    val_accuracy: float
    val_flops: float


@dataclass(frozen=True, kw_only=True)
class ExitCosts:
    """FLOPs of one sample.

    Attributes:
        layers: from the images to each exit, contexts included, heads left out.
        heads: of each exit's head.
    """

    layers: tuple[int, ...]
    heads: tuple[int, ...]

    def of_leaving(self, exits: Sequence[int]) -> np.ndarray:
        """Returns what a sample costs that leaves at each exit, float64 [E], if the heads of `exits` are run."""
        heads_E = np.zeros(len(self.heads))
        run = [*exits, len(self.heads) - 1]
        heads_E[run] = np.array(self.heads, np.float64)[run]
        return np.array(self.layers, np.float64) + np.cumsum(heads_E)


def check_exits(exits: ExitsConfig, target: TargetSpec) -> None:
    """Checks that samples could leave at the exits that are to be kept.

    Raises:
        ConfigError: values are predicted, of which no exit says how sure it is.
    """
    if exits.keep == "all" and target.kind != "class":
        what = "exits.keep: got all, but a sample leaves early by the probability of its class, and values have none"
        raise ConfigError(what, "--exits chosen")


def leaving_exits(confidence_EN: np.ndarray, exits: Sequence[int], threshold: float) -> np.ndarray:
    """Returns at which exit every sample leaves, int64 [N]."""
    last = len(confidence_EN) - 1
    sure = confidence_EN[list(exits)] >= threshold
    leaves = np.concatenate([sure, np.ones((1, confidence_EN.shape[1]), bool)])
    return np.array([*exits, last])[leaves.argmax(axis=0)]


def measure_point(
    confidence_EN: np.ndarray, right_EN: np.ndarray, costs: ExitCosts, exits: Sequence[int], threshold: float
) -> tuple[float, float]:
    """Returns accuracy in [0, 1] and mean FLOPs of an operating point.

    Args:
        confidence_EN: probability of each exit's prediction.
        right_EN: whether that is the label.
    """
    exit_N = leaving_exits(confidence_EN, exits, threshold)
    accuracy = right_EN[exit_N, np.arange(len(exit_N))].mean()
    return float(accuracy), float(costs.of_leaving(exits)[exit_N].mean())


def find_points(confidence_EN: np.ndarray, right_EN: np.ndarray, costs: ExitCosts) -> tuple[OperatingPoint, ...]:
    """Finds the operating points that no other one beats in both accuracy and cost, cheapest first. [ours]

    Tried are `exit_sets`, each with thresholds from "all leave at once" to "nobody leaves". The heads of exits that
    are run for nothing cost as much as some layers, which is why not all exits always pay. As the best of many, the
    points look a little better here than on samples that they were not found on.

    Args:
        confidence_EN, right_EN: see `measure_point`; of at least one sample.
        costs: of the exits.

    Returns:
        At most `MAX_POINTS`; the last one is as accurate as the last exit alone, or more.
    """
    tried = []
    for exits in exit_sets(len(confidence_EN)):
        for threshold in _thresholds(confidence_EN[list(exits)]):
            accuracy, flops = measure_point(confidence_EN, right_EN, costs, exits, threshold)
            tried.append(OperatingPoint(exits=exits, threshold=threshold, val_accuracy=accuracy, val_flops=flops))
    return _thinned(_undominated(tried))


def exit_sets(num_exits: int) -> list[tuple[int, ...]]:
    """Lists the sets of early exits to try: none, each alone, and every first, second, fourth ... before the last."""
    last = num_exits - 1
    steps = [2**power for power in range(max(1, math.ceil(math.log2(max(2, num_exits)))))]
    spread = [tuple(sorted(range(last - step, -1, -step))) for step in steps]
    return list(dict.fromkeys([(), *((exit_idx,) for exit_idx in range(last)), *spread]))


def cheapest_with(points: Sequence[OperatingPoint], accuracy: float) -> OperatingPoint | None:
    """Returns the cheapest point that is so accurate on the validation split; None if there is none."""
    enough = [point for point in points if point.val_accuracy >= accuracy]
    return min(enough, key=lambda point: point.val_flops, default=None)


def best_within(points: Sequence[OperatingPoint], flops: float) -> OperatingPoint | None:
    """Returns the most accurate point that costs no more on average; None if there is none."""
    cheap = [point for point in points if point.val_flops <= flops]
    return max(cheap, key=lambda point: (point.val_accuracy, -point.val_flops), default=None)


def _thresholds(confidence_EN: np.ndarray) -> Iterator[float]:
    if confidence_EN.size == 0:
        yield 1.0
        return
    thresholds = np.unique(confidence_EN)
    if len(thresholds) > NUM_THRESHOLDS:
        thresholds = np.unique(np.quantile(confidence_EN, np.linspace(0, 1, NUM_THRESHOLDS), method="lower"))
    yield from thresholds.tolist()


def _undominated(points: Sequence[OperatingPoint]) -> list[OperatingPoint]:
    front: list[OperatingPoint] = []
    for point in sorted(points, key=lambda point: (point.val_flops, -point.val_accuracy, len(point.exits))):
        if not front or point.val_accuracy > front[-1].val_accuracy:
            front.append(point)
    return front


def _thinned(front: list[OperatingPoint]) -> tuple[OperatingPoint, ...]:
    kept = np.unique(np.linspace(0, len(front) - 1, min(len(front), MAX_POINTS)).round().astype(int))
    return tuple(front[idx] for idx in kept)
