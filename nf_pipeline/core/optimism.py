"""How much too good the chosen exit looks because it was chosen on the same samples.

Knows nothing of stores and models. Entry: `choice_optimism`.
"""

from collections.abc import Sequence
from itertools import islice

import numpy as np

from nf_pipeline.core.exits import ExitCandidate, ExitRule

NUM_RESAMPLES = 200
"""With as many, the mean moves by a fifteenth of the spread of one resample: hundredths of a point."""


def choice_optimism(candidates: Sequence[ExitCandidate], rule: ExitRule, seed: int = 0) -> float:
    """Returns by how much the chosen exit looks too good on average: its accuracy too high, or its error too low.

    The whole choice is made again on resamples of the validation split, drawn with replacement: what an exit chosen
    on a resample is better there than on the split itself is the estimate (the bootstrap of the optimism: Efron 1983,
    https://doi.org/10.1080/01621459.1983.10477973). It is an average over what might have been drawn; it does not say
    how lucky this one draw was. Most of it comes from exits that hardly differ: where one is clearly chosen it is
    about zero.

    Args:
        candidates: see `choose_exit`.
        rule: by which the exit is chosen.
        seed: of the resamples.
    """
    # One that gave what is no number is never chosen; without the sample that shows it, it would be.
    candidates = [one for one in candidates if one.results.is_finite] or candidates
    results, sizes = [one.results for one in candidates], [one.size for one in candidates]
    kind, found = type(results[0]), 0.0
    for drawn in islice(kind.resamples(results, sizes, np.random.default_rng(seed)), NUM_RESAMPLES):
        chosen = rule.pick(sizes, drawn)
        found += kind.sign * (drawn.means[chosen] - results[chosen].mean)
    return found / NUM_RESAMPLES
