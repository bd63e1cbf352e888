"""How much too good the accuracy of the chosen exit looks because it was chosen on the same samples.

Knows nothing of stores and models. Entry: `choice_optimism`.
"""

from collections.abc import Sequence

import numpy as np

from nf_pipeline.core.exits import ExitCandidate, ExitRule, Tally, best_exit
from nf_pipeline.core.hits import unpacked

NUM_RESAMPLES = 200
"""With as many, the mean moves by a fifteenth of the spread of one resample: hundredths of a point."""


def choice_optimism(candidates: Sequence[ExitCandidate], rule: ExitRule, seed: int = 0) -> float:
    """Returns by how much the validation accuracy of the chosen exit is too high on average, a part of 1.

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
    patterns_KP, counts_P = _patterns(candidates)
    sizes, num_val = [one.size for one in candidates], candidates[0].num_val
    generator, found = np.random.default_rng(seed), 0.0
    for _ in range(NUM_RESAMPLES):
        drawn_P = generator.multinomial(num_val, counts_P / num_val)
        correct = _counts(patterns_KP, drawn_P)
        best = best_exit(sizes, correct)
        both = _counts(patterns_KP, drawn_P * patterns_KP[best])
        chosen = rule.pick(sizes, Tally(best=best, correct=correct, both=both, num_samples=num_val))
        found += correct[chosen] / num_val - candidates[chosen].val_accuracy
    return found / NUM_RESAMPLES


def _patterns(candidates: Sequence[ExitCandidate]) -> tuple[np.ndarray, np.ndarray]:
    """Groups samples that the same exits got right: drawing groups is drawing samples, and takes less.

    Returns:
        float64 [exits, groups] of 0 and 1, and the samples in each group.
    """
    right_KN = np.stack([unpacked(one.hits, one.num_val) for one in candidates])
    packed_NB = np.packbits(right_KN, axis=0).T
    groups_PB, counts_P = np.unique(packed_NB, axis=0, return_counts=True)
    patterns_PK = np.unpackbits(groups_PB, axis=1, count=len(candidates))
    return patterns_PK.T.astype(np.float64), counts_P


def _counts(patterns_KP: np.ndarray, drawn_P: np.ndarray) -> list[int]:
    # Products of float64 are fast, and exact for counts.
    return (patterns_KP @ drawn_P).astype(np.int64).tolist()
