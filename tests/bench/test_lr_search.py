"""The search for a learning rate finds the best of a hill, and stops."""

import math

import pytest

from nf_pipeline.bench.lr_search import best_rate, next_rate


def searched(score, max_tries, start=0.05):
    scores = {}
    while (rate := next_rate(scores, start, max_tries)) is not None:
        assert rate not in scores
        scores[rate] = score(rate)
    return scores


@pytest.mark.parametrize("peak", [0.001, 0.006, 0.05, 0.3])
def test_search_climbs_to_a_peak_wherever_it_is(peak):
    scores = searched(lambda rate: -abs(math.log(rate / peak)), max_tries=12)
    best = best_rate(scores)
    assert abs(math.log(best / peak)) <= math.log(3.0) / 2 + 0.1
    assert min(scores) < best < max(scores)


@pytest.mark.parametrize("max_tries", [1, 2, 3, 5])
def test_search_tries_no_more_than_allowed(max_tries):
    assert len(searched(lambda rate: rate, max_tries)) == max_tries


def test_best_rate_of_equal_accuracies_is_the_lowest():
    assert best_rate({0.15: 0.5, 0.05: 0.5, 0.017: 0.4}) == 0.05
