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
        hits: which samples of the validation split it got right; see `nf_pipeline.core.hits`.
        num_val: samples of that split.
        params: weights up to the exit, head included.
        flops: of one sample's forward pass, head included.
    """

    layer_idx: int
    layer: str
    hits: int
    num_val: int
    params: int
    flops: int

    @property
    def val_accuracy(self) -> float:
        """On the validation split, in [0, 1]."""
        return self.hits.bit_count() / self.num_val

    @property
    def size(self) -> tuple[int, int]:
        """By which the smaller of two exits is told: parameters, then depth."""
        return self.params, self.layer_idx

    def interval(self, confidence: float) -> tuple[float, float]:
        """Returns the Wilson interval around the validation accuracy, for an exit that was fixed beforehand."""
        return wilson_interval(self.hits.bit_count(), self.num_val, confidence)

    def interval_among(self, num_exits: int, confidence: float) -> tuple[float, float]:
        """Returns an interval that holds for whichever of so many exits is chosen, by whatever rule.

        The intervals of all exits hold together with about this confidence or more (Bonferroni), hence that of the
        one that is picked, however it was picked: about, as Wilson's intervals keep theirs on average over
        accuracies. As all exits see the same samples it is wider than it had to be.
        """
        return wilson_interval(self.hits.bit_count(), self.num_val, 1 - (1 - confidence) / num_exits)


@dataclass(frozen=True, kw_only=True)
class ChosenExit:
    """The decision.

    Attributes:
        index: position in the list of candidates.
        reason: one line for people.
    """

    index: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class ExitRule:
    """What may be given up for a smaller model; see `choose_exit`.

    Attributes:
        tolerance_points: percentage points below the best, at least 0.
        confidence: in (0, 1).
    """

    tolerance_points: float
    confidence: float

    def level(self, num_exits: int) -> float:
        """Returns the p-value below which an exit counts as worse than the best of so many."""
        return (1 - self.confidence) / max(1, num_exits - 1)

    def pick(self, sizes: Sequence[tuple[int, int]], tally: "Tally") -> int:
        """Returns the position of the smallest exit that is as good as the best one.

        Args:
            sizes: see `ExitCandidate.size`.
            tally: of the samples that decide.
        """
        ascending = sorted(range(len(sizes)), key=sizes.__getitem__)
        return next(idx for idx in ascending if self.is_as_good(tally, idx))  # the best is as good as itself

    def is_as_good(self, tally: "Tally", idx: int) -> bool:
        """Tells whether an exit keeps both rules."""
        lost = tally.correct[tally.best] - tally.correct[idx]
        if 100 * lost / tally.num_samples > self.tolerance_points + _ROUNDING:
            return False
        return sign_test(*tally.only_one(idx)) > self.level(len(tally.correct))


@dataclass(frozen=True, kw_only=True)
class Tally:
    """How often exits were right on the same samples.

    Attributes:
        best: position of the one that was right most often.
        correct: how often each one was right.
        both: how often each one and the best were.
        num_samples: of all.
    """

    best: int
    correct: Sequence[int]
    both: Sequence[int]
    num_samples: int

    def only_one(self, idx: int) -> tuple[int, int]:
        """Returns on how many samples only the best was right, and on how many only this exit."""
        return self.correct[self.best] - self.both[idx], self.correct[idx] - self.both[idx]


def best_exit(sizes: Sequence[tuple[int, int]], correct: Sequence[int]) -> int:
    """Returns the exit that was right most often; of several the smallest."""
    return min(range(len(sizes)), key=lambda idx: (-correct[idx], sizes[idx]))


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


def sign_test(num_better: int, num_worse: int) -> float:
    """Returns how likely so many samples in favour of one model are if both are equally good: McNemar's exact test.

    Of two models that see the same samples only those tell which is better that just one of them gets right
    (McNemar 1947, https://doi.org/10.1007/BF02295996). If both are equally good, each of these is as likely to favour
    one as the other: P(X >= num_better) for X ~ Binomial(num_better + num_worse, 1/2). One-sided.

    Args:
        num_better, num_worse: samples that only the first, or only the second, got right; at least 0.
    """
    total = num_better + num_worse
    if 2 * num_better <= total:  # then the terms left out are the few
        return 1.0 - _tail(num_worse + 1, total)
    return _tail(num_better, total)


def choose_exit(candidates: Sequence[ExitCandidate], tolerance_points: float, confidence: float) -> ChosenExit:
    """Chooses the smallest exit that is as good as the best one.

    An exit is as good when both hold:
    1. its validation accuracy is at most `tolerance_points` percentage points below the best: what the user
       is ready to pay for a smaller model;
    2. a paired test (`sign_test`) on the validation samples does not show that the best is better, at the level
       (1 - `confidence`) / (number of exits - 1): on a large split, where even a small loss is certain, the
       tolerance alone does not excuse it.
    Of these the one with the fewest parameters wins; ties go to the shallower.

    What rule 2 promises: an exit that is truly as good as any other is left out for noise with a probability of at
    most 1 - `confidence`, however many exits there are. It would have to lose against one of the others, which has
    at most that probability over all of them together (Bonferroni); so it does not matter that the one to compare
    with is picked for its luck, as the highest of many noisy accuracies is. That is the selection of a subset which
    holds the best (Gupta 1965, https://doi.org/10.1080/00401706.1965.10490251; Hsu, Multiple Comparisons, 1996). A
    step-down correction such as Holm's would be sharper, but needs comparisons with one that was fixed beforehand.

    What it does not promise: that the chosen exit is as good as the best. On a small split the test can tell next to
    nothing, and rule 1 alone bounds what is given up, by what was measured. Nor that its validation accuracy is free
    of the luck of the choice: `nf_pipeline.core.optimism` says how much that is, and only the test split, used once
    after it, is unbiased.

    Args:
        candidates: all measured on the same validation split.
        tolerance_points: 0.5 allows 97.5 % beside 98.0 %; at least 0.
        confidence: in (0, 1).

    Raises:
        ValueError: no candidates, or an argument out of range.
    """
    if not candidates or tolerance_points < 0 or not 0.0 < confidence < 1.0:
        raise ValueError(
            f"got {len(candidates)} exits, a tolerance of {tolerance_points} and a confidence of {confidence}, "
            f"want 1 or more, 0 or more, and between 0 and 1"
        )
    rule = ExitRule(tolerance_points=tolerance_points, confidence=confidence)
    sizes, tally = [one.size for one in candidates], tally_of(candidates)
    index = rule.pick(sizes, tally)
    return ChosenExit(index=index, reason=_explain(candidates, tally, index, rule))


def tally_of(candidates: Sequence[ExitCandidate]) -> Tally:
    """Counts what the exits got right alone and together."""
    correct = [one.hits.bit_count() for one in candidates]
    best = best_exit([one.size for one in candidates], correct)
    both = [(one.hits & candidates[best].hits).bit_count() for one in candidates]
    return Tally(best=best, correct=correct, both=both, num_samples=candidates[0].num_val)


def _tail(first: int, total: int) -> float:
    """Sums the probabilities of `first` and more of `total` tosses, for more than half of them."""
    if first > total:
        return 0.0
    log_term = math.lgamma(total + 1) - math.lgamma(first + 1) - math.lgamma(total - first + 1)
    term = math.exp(log_term - total * math.log(2))
    tail = 0.0
    for number in range(first, total + 1):
        tail += term
        term *= (total - number) / (number + 1)
        if term < tail * _ROUNDING * _ROUNDING:
            break
    return min(1.0, tail)


def _explain(candidates: Sequence[ExitCandidate], tally: Tally, index: int, rule: ExitRule) -> str:
    one, best = candidates[index], candidates[tally.best]
    chosen = f"layer {one.layer}: {100 * one.val_accuracy:.2f} % on validation, {one.params:,} parameters"
    if index == tally.best:
        return f"{chosen}; the best, and no smaller exit is as good"
    only_best, only_one = tally.only_one(index)
    return (
        f"{chosen}; {100 * (best.val_accuracy - one.val_accuracy):.2f} points below the best "
        f"(layer {best.layer}: {100 * best.val_accuracy:.2f} %, {best.params:,} parameters), within the "
        f"tolerance of {rule.tolerance_points:g} points, and by a paired test at {100 * rule.confidence:g} % no "
        f"worse ({only_best} images only the best of {len(candidates)} exits got right, {only_one} only this one)"
    )
