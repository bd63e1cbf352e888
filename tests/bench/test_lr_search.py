"""The search for a learning rate finds the best of a hill, and stops."""

import math

import pytest

from nf_pipeline.bench.lr_search import best_rate, epochs_for, next_rate, search_group
from nf_pipeline.bench.methods import METHODS, method_named


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


@pytest.mark.parametrize("name", ["bp-ckpt", "bp-micro", "bp-both", "bp-bf16"])
def test_baselines_that_take_the_same_steps_share_a_search(name):
    assert search_group(METHODS[name], 28) == search_group(METHODS["bp"], 16) != search_group(METHODS["bp"], 32)


def test_other_losses_have_a_search_of_their_own():
    assert search_group(METHODS["dgl"], 16) != search_group(METHODS["bp"], 16)
    assert search_group(METHODS["nf"], None) == ""


def test_baselines_with_settings_of_their_own_share_with_each_other_alone():
    names = [
        "bp+train.mixup=0.2+train.loss=auto",
        "bp-ckpt+train.loss=auto+train.mixup=0.2",
        "bp+train.mixup=0.3",
        "bp",
    ]
    groups = [search_group(method_named(name), 28) for name in names]
    assert groups[0] == groups[1] and len(set(groups)) == 3


@pytest.mark.parametrize(("epoch_s", "epochs"), [(0.0, 5), (0.1, 5), (1.6, 3), (2.4, 2), (9.0, 1), (math.inf, 1)])
def test_tries_take_equal_seconds_but_see_all_images_and_no_more_than_the_schedule(epoch_s, epochs):
    assert epochs_for(5.0, epoch_s, 5) == epochs
