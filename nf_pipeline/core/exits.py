"""Chooses the exit of the final model on the validation split. Plain arithmetic, no torch.

Every unit's head is a candidate; the rule [ours] prefers the smallest model that cannot be told from the best
one. Entry: `choose_exit`, which states it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

# Accuracies are quotients of counts: 0.98 - 0.975 is not exactly 0.005.
_ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True)
class ExitCandidate:
    """A model that ends at one layer.

    Attributes:
        layer_idx: its last layer.
        layer: that layer's name.
        val_accuracy: in [0, 1].
        num_val: samples of the validation split.
        params: weights up to the exit, head included.
        flops: of one sample's forward pass, head included.
    """

    layer_idx: int
    layer: str
    val_accuracy: float
    num_val: int
    params: int
    flops: int

    def interval(self, confidence: float) -> tuple[float, float]:
        """Returns the Wilson interval around the validation accuracy."""
        return wilson_interval(round(self.val_accuracy * self.num_val), self.num_val, confidence)


@dataclass(frozen=True, kw_only=True)
class ChosenExit:
    """The decision.

    Attributes:
        index: position in the list of candidates.
        reason: one line for people.
    """

    index: int
    reason: str


def wilson_interval(num_correct: int, num_total: int, confidence: float) -> tuple[float, float]:
    """Returns the interval of Wilson (1927) around an accuracy, within [0, 1].

    Unlike the textbook p +- z*sqrt(p(1-p)/n) it holds for few samples and for accuracies near 0 and 1.

    Args:
        num_correct: 0 to num_total.
        num_total: at least 1.
        confidence: in (0, 1), such as 0.95.

    Raises:
        ValueError: an argument is out of range.
    """
    if num_total < 1 or not 0 <= num_correct <= num_total or not 0.0 < confidence < 1.0:
        raise ValueError(
            f"got {num_correct} of {num_total} at confidence {confidence}, "
            f"want 0 <= num_correct <= num_total, num_total >= 1, 0 < confidence < 1"
        )
    z2 = NormalDist().inv_cdf(0.5 + confidence / 2) ** 2
    share, rest = num_correct / num_total, (num_total - num_correct) / num_total
    centre = (share + z2 / (2 * num_total)) / (1 + z2 / num_total)
    half = math.sqrt(z2 * (share * rest / num_total + z2 / (4 * num_total**2))) / (1 + z2 / num_total)
    # min and max repair rounding: the accuracy itself always lies inside.
    return max(0.0, min(centre - half, share)), min(1.0, max(centre + half, share))


def choose_exit(candidates: Sequence[ExitCandidate], tolerance_points: float, confidence: float) -> ChosenExit:
    """Chooses the smallest exit that is as good as the best one.

    An exit is as good when both hold:
    1. its validation accuracy is at most `tolerance_points` percentage points below the best: what the user
       is ready to pay for a smaller model;
    2. the best accuracy lies within the exit's own Wilson interval at `confidence`: on a large split, where
       even a small loss is certain, the tolerance alone does not excuse it.
    Of these the one with the fewest parameters wins; ties go to the shallower.

    Why not simply the best: the highest of many noisy accuracies is too high on average (it was picked for
    its luck), so it is an optimistic goal, while the parameters of the exit that reached it are certain. The
    chosen exit's validation accuracy is the result of a choice too; only the test split, used once after it,
    is unbiased. All exits see the same samples: a paired test could tell closer ones apart, but needs each
    sample's predictions. Without it rule 2 is lenient and errs towards the smaller model; rule 1 bounds that.

    Args:
        candidates: all measured on the same validation split.
        tolerance_points: 0.5 allows 97.5 % beside 98.0 %; at least 0.
        confidence: in (0, 1).

    Raises:
        ValueError: no candidates, or an argument out of range.
    """
    if not candidates or tolerance_points < 0:
        raise ValueError(
            f"got {len(candidates)} exits and a tolerance of {tolerance_points}, want 1 or more and 0 or more"
        )
    best = max(candidates, key=lambda one: (one.val_accuracy, -one.params, -one.layer_idx))
    good = [idx for idx, one in enumerate(candidates) if _is_as_good(one, best, tolerance_points, confidence)]
    index = min(good, key=lambda idx: (candidates[idx].params, candidates[idx].layer_idx))
    return ChosenExit(index=index, reason=_explain(candidates[index], best, tolerance_points, confidence))


def _is_as_good(one: ExitCandidate, best: ExitCandidate, tolerance_points: float, confidence: float) -> bool:
    points_below = 100 * (best.val_accuracy - one.val_accuracy)
    _, high = one.interval(confidence)
    return points_below <= tolerance_points + _ROUNDING and best.val_accuracy <= high + _ROUNDING


def _explain(one: ExitCandidate, best: ExitCandidate, tolerance_points: float, confidence: float) -> str:
    chosen = f"layer {one.layer}: {100 * one.val_accuracy:.2f} % on validation, {one.params:,} parameters"
    if one == best:
        return f"{chosen}; the best, and no smaller exit is as good"
    low, high = one.interval(confidence)
    return (
        f"{chosen}; {100 * (best.val_accuracy - one.val_accuracy):.2f} points below the best "
        f"(layer {best.layer}: {100 * best.val_accuracy:.2f} %, {best.params:,} parameters), within the "
        f"tolerance of {tolerance_points:g} points and of its own {100 * confidence:g} % interval "
        f"[{100 * low:.2f} %, {100 * high:.2f} %]"
    )
