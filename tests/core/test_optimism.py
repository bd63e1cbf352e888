"""The optimism of the choice against what drawing the validation split again and again shows."""

import numpy as np
import pytest

from nf_pipeline.core.exits import ExitCandidate, ExitRule, choose_exit
from nf_pipeline.core.hits import Hits
from nf_pipeline.core.optimism import choice_optimism

BEST = ExitRule(tolerance=0.0, confidence=0.95)
"""The rule that always takes the best one, and is fooled most."""


def exits_of(right_KN):
    return [
        ExitCandidate(layer_idx=idx, layer=str(idx), results=Hits.of(row), params=idx, flops=1)
        for idx, row in enumerate(right_KN)
    ]


def test_optimism_of_one_exit_is_nothing_but_the_noise_of_resamples():
    right_N = np.random.default_rng(0).random(500) < 0.7
    assert abs(choice_optimism(exits_of([right_N]), BEST)) < 4 * np.sqrt(0.21 / 500 / 200)


def test_optimism_is_what_the_best_of_many_equal_exits_gains_by_luck():
    random, accuracy = np.random.default_rng(0), 0.7
    gained, estimated = [], []
    for _ in range(40):
        exits = exits_of(random.random((20, 400)) < accuracy)
        chosen = choose_exit(exits, 0.0, 0.95).index
        gained.append(exits[chosen].results.mean - accuracy)
        estimated.append(choice_optimism(exits, BEST))
    assert np.mean(gained) > 0.03
    assert np.mean(estimated) == pytest.approx(np.mean(gained), rel=0.4)


def test_rule_that_prefers_small_exits_is_fooled_less():
    exits = exits_of(np.random.default_rng(2).random((20, 400)) < 0.7)
    assert choice_optimism(exits, ExitRule(tolerance=100.0, confidence=0.95)) < choice_optimism(exits, BEST) / 3


def test_optimism_of_an_exit_far_above_the_others_is_about_zero():
    random = np.random.default_rng(0)
    right_KN = random.random((10, 500)) < 0.3
    right_KN[4] = random.random(500) < 0.9
    assert abs(choice_optimism(exits_of(right_KN), BEST)) < 0.005


def test_same_seed_gives_the_same_optimism_and_order_of_samples_does_not_matter():
    right_KN = np.random.default_rng(3).random((9, 300)) < 0.6
    first = choice_optimism(exits_of(right_KN), BEST)
    assert first == choice_optimism(exits_of(right_KN), BEST) == choice_optimism(exits_of(right_KN[:, ::-1]), BEST)
