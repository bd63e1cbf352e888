"""Decides whether training deeper blocks still pays. Plain arithmetic, no torch.

Knows nothing of stores and schedules: what it is given are results that finished blocks reported, so a run that was
killed and goes on decides the same again. Entry: `reason_to_stop`, which states the rule.
"""

from collections.abc import Sequence
from statistics import NormalDist

from nf_pipeline.core.results import Results

ONE_STANDARD_ERROR = 2 * NormalDist().cdf(1.0) - 1
"""Level of an interval that reaches one standard error to either side, 68.3 %."""


def reason_to_stop(blocks: Sequence[Sequence[Results]], patience: int | None) -> str | None:
    """Says why no further block is worth its time, or None as long as one may be.

    Training stops when the last `patience` blocks together brought no exit beyond the validation noise of the best
    exit before them: none whose accuracy is higher than the upper end of that exit's Wilson interval of one standard
    error, or whose error is lower than one standard error below that exit's. [ours]

    Why one standard error, and not the 95 % of `exits.confidence`: the two mistakes do not cost the same. Going on
    for nothing costs a block's time; stopping at an exit that only looked like the last good one costs accuracy. One
    standard error is also the rule by which the larger of two models is preferred since Breiman et al. (1984). All
    exits see the same samples, so most of their luck is shared: where two exits differ on p(1-p) of the samples,
    which neighbours do not exceed by much, the standard error of their difference is about that of one of them; of
    errors it is about that of one where the two are correlated by one half, as neighbours are or more.

    Why the best exit before the last `patience` blocks, and not the one right before: exits that climb by less than
    the noise per block still climb, and over several blocks it shows. With one block of patience a run whose exits
    went 46.5, 57.8, 59.8, 61.8, 62.5 % on 600 images ended at 59.8 %; with two it went on (a VGG-16 of a quarter of
    the width, 6,000 images of CIFAR-10). That the best of several earlier exits was picked for its luck makes the
    rule stop a little earlier; that a block may bring several exits, each with a chance to be lucky, a little later.

    Args:
        blocks: per finished block, in order, what each of its exits made of the validation split.
        patience: how many blocks may pass without a better exit, at least 1; None never stops.

    Returns:
        One line for people.
    """
    if patience is None or len(blocks) <= patience:
        return None
    earlier, latest = _best(blocks[:-patience]), _best(blocks[-patience:])
    bar, sign = earlier.bar(ONE_STANDARD_ERROR), earlier.sign
    if sign * latest.mean > sign * bar:
        return None
    num_blocks = "block" if patience == 1 else f"{patience} blocks"
    beyond = "above" if sign > 0 else "below"
    return (
        f"the best exit of the last {num_blocks} has {latest.show(latest.mean)} on validation, before there was one "
        f"of {latest.show(earlier.mean)}: not {beyond} its noise, which ends at {latest.show(bar)} "
        f"({earlier.num_samples} samples)"
    )


def _best(blocks: Sequence[Sequence[Results]]) -> Results:
    return max((one for block in blocks for one in block), key=lambda one: one.sign * one.mean)
