"""Chooses the exit of the final model on the validation split. Plain arithmetic, no torch.

Every unit's head is a candidate; the rule [ours] prefers the smallest model that cannot be told from the best
one. What is compared, accuracies or errors, is for `nf_pipeline.core.results`. Entry: `choose_exit`, which states
the rule.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from nf_pipeline.core.results import Comparison, Results, Size

# Accuracies are quotients of counts: 0.98 - 0.975 is not exactly 0.005.
_ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True)
class ExitCandidate:
    """A model that ends at one layer.

    Attributes:
        layer_idx: its last layer.
        layer: that layer's name.
        results: what it made of the samples of the validation split.
        params: weights up to the exit, head included.
        flops: of one sample's forward pass, head included.
    """

    layer_idx: int
    layer: str
    results: Results
    params: int
    flops: int

    @property
    def size(self) -> Size:
        """By which the smaller of two exits is told: parameters, then depth."""
        return self.params, self.layer_idx

    def interval(self, confidence: float) -> tuple[float, float]:
        """Returns the interval around what validation found, for an exit that was fixed beforehand."""
        return self.results.interval(confidence)

    def interval_among(self, num_exits: int, confidence: float) -> tuple[float, float]:
        """Returns an interval that holds for whichever of so many exits is chosen, by whatever rule.

        The intervals of all exits hold together with about this confidence or more (Bonferroni), hence that of the
        one that is picked, however it was picked: about, as Wilson's intervals keep theirs on average over
        accuracies. As all exits see the same samples it is wider than it had to be.
        """
        return self.results.interval(1 - (1 - confidence) / num_exits)


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
        tolerance: at least 0, in the unit of `Comparison.given_up`: percentage points of accuracy, or per cent of the
            smallest error.
        confidence: in (0, 1).
    """

    tolerance: float
    confidence: float

    def level(self, num_exits: int) -> float:
        """Returns the p-value below which an exit counts as worse than the best of so many."""
        return (1 - self.confidence) / max(1, num_exits - 1)

    def pick(self, sizes: Sequence[Size], compared: Comparison) -> int:
        """Returns the position of the smallest exit that is as good as the best one.

        Args:
            sizes: see `ExitCandidate.size`.
            compared: the exits, on the samples that decide.
        """
        ascending = sorted(range(len(sizes)), key=sizes.__getitem__)
        return next(idx for idx in ascending if self.is_as_good(compared, idx))  # the best is as good as itself

    def is_as_good(self, compared: Comparison, idx: int) -> bool:
        """Tells whether an exit keeps both rules."""
        if idx == compared.best:
            return True
        if compared.given_up(idx) > self.tolerance + _ROUNDING:
            return False
        return compared.p_value(idx) > self.level(len(compared.means))


def choose_exit(candidates: Sequence[ExitCandidate], tolerance: float, confidence: float) -> ChosenExit:
    """Chooses the smallest exit that is as good as the best one.

    An exit is as good when both hold:
    1. on validation it is at most `tolerance` worse than the best, in percentage points of accuracy, or in per cent
       of the best one's error: what the user is ready to pay for a smaller model;
    2. a paired test on the validation samples does not show that the best is better, at the level
       (1 - `confidence`) / (number of exits - 1): on a large split, where even a small loss is certain, the
       tolerance alone does not excuse it. Of classes the test is McNemar's (`chance.sign_test`), of errors a t-test
       of the differences of the samples' errors (`chance.mean_test`), both one-sided.
    Of these the one with the fewest parameters wins; ties go to the shallower.

    What rule 2 promises: an exit that is truly as good as any other is left out for noise with a probability of at
    most 1 - `confidence`, however many exits there are. It would have to lose against one of the others, which has
    at most that probability over all of them together (Bonferroni); so it does not matter that the one to compare
    with is picked for its luck, as the highest of many noisy accuracies is. That is the selection of a subset which
    holds the best (Gupta 1965, https://doi.org/10.1080/00401706.1965.10490251; Hsu, Multiple Comparisons, 1996). A
    step-down correction such as Holm's would be sharper, but needs comparisons with one that was fixed beforehand.

    What it does not promise: that the chosen exit is as good as the best. On a small split the test can tell next to
    nothing, and rule 1 alone bounds what is given up, by what was measured. Nor that what validation found of it is
    free of the luck of the choice: `nf_pipeline.core.optimism` says how much that is, and only the test split, used
    once after it, is unbiased. Samples that depend on each other, such as overlapping windows of one series, tell
    less than as many independent ones: then both tests are too sure.

    Args:
        candidates: all measured on the same validation split.
        tolerance: 0.5 allows 97.5 % beside 98.0 %, or an error of 0.3015 beside 0.3000; at least 0.
        confidence: in (0, 1).

    Raises:
        ValueError: no candidates, or an argument out of range.
    """
    if not candidates or tolerance < 0 or not 0.0 < confidence < 1.0:
        raise ValueError(
            f"got {len(candidates)} exits, a tolerance of {tolerance} and a confidence of {confidence}, "
            f"want 1 or more, 0 or more, and between 0 and 1"
        )
    rule, compared = ExitRule(tolerance=tolerance, confidence=confidence), compare(candidates)
    index = rule.pick([one.size for one in candidates], compared)
    return ChosenExit(index=index, reason=_explain(candidates, compared, index, rule))


def compare(candidates: Sequence[ExitCandidate]) -> Comparison:
    """Compares what exits made of the validation split."""
    results = [one.results for one in candidates]
    return type(results[0]).compare(results, [one.size for one in candidates])


def _explain(candidates: Sequence[ExitCandidate], compared: Comparison, index: int, rule: ExitRule) -> str:
    one, best = candidates[index], candidates[compared.best]
    chosen = f"layer {one.layer}: {_shown(one)} on validation, {one.params:,} parameters"
    if index == compared.best:
        return f"{chosen}; the best, and no smaller exit is as good"
    given_up, unit, saw = compared.explain(index)
    return (
        f"{chosen}; {given_up} the best (layer {best.layer}: {_shown(best)}, {best.params:,} parameters), within the "
        f"tolerance of {rule.tolerance:g} {unit}, and by a paired test at {100 * rule.confidence:g} % no worse "
        f"({saw})"
    )


def _shown(one: ExitCandidate) -> str:
    return one.results.show(one.results.mean, 2)
