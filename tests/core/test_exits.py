"""The choice of the exit, against the rule spelled out and the textbook's numbers."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nf_pipeline.core.chance import sign_test
from nf_pipeline.core.exits import ExitCandidate, choose_exit
from nf_pipeline.core.hits import Hits

levels = st.floats(0.01, 0.999)


def candidate(idx, results, params):
    return ExitCandidate(
        layer_idx=idx,
        layer=f"features.{idx}",
        results=results,
        params=params,
        flops=params,
    )


def first_right(num_correct):
    """Hits of an exit that is right on the first samples: one with more has those of one with fewer."""
    return (1 << num_correct) - 1


def candidates_of(*rows, num_val=1000):
    """(correct, params) per exit, shallowest first; each is right wherever one with fewer hits is."""
    return [candidate(idx, Hits(first_right(correct), num_val), params) for idx, (correct, params) in enumerate(rows)]


def differing(only_best, only_one, num_val, both):
    """A small exit and the best one, which differ on so many samples."""
    best, one = first_right(both) | first_right(only_best) << both, first_right(both)
    one |= first_right(only_one) << (both + only_best)
    return [candidate(0, Hits(one, num_val), 10), candidate(1, Hits(best, num_val), 20)]


many_exits = st.integers(1, 300).flatmap(
    lambda n: st.lists(st.tuples(st.integers(0, 2**n - 1), st.integers(1, 20)), min_size=1, max_size=8).map(
        lambda rows: [candidate(idx, Hits(hits, n), params) for idx, (hits, params) in enumerate(rows)]
    )
)


@given(many_exits, st.floats(0, 100), levels)
def test_choice_is_the_smallest_exit_that_keeps_both_rules(exits, tolerance, confidence):
    chosen = exits[choose_exit(exits, tolerance, confidence).index]
    best = min(exits, key=lambda exit: (-exit.results.mean, exit.params, exit.layer_idx))

    def is_good(exit):
        best_hits, hits = best.results.bits, exit.results.bits
        only_best, only_one = (best_hits & ~hits).bit_count(), (hits & ~best_hits).bit_count()
        p_value = sign_test(only_best, only_one)
        near = 100 * (best.results.mean - exit.results.mean) <= tolerance + 1e-9
        return near and (p_value > (1 - confidence) / max(1, len(exits) - 1))

    good = [exit for exit in exits if is_good(exit)]
    assert chosen in good
    assert (chosen.params, chosen.layer_idx) == min((exit.params, exit.layer_idx) for exit in good)


@given(many_exits, st.floats(0, 100), st.floats(0, 100), levels)
def test_larger_tolerance_never_chooses_a_larger_model(exits, one, other, confidence):
    strict, lax = (choose_exit(exits, tolerance, confidence).index for tolerance in sorted((one, other)))
    assert exits[lax].params <= exits[strict].params


@given(many_exits, levels)
def test_tolerance_of_zero_never_gives_up_accuracy(exits, confidence):
    chosen = exits[choose_exit(exits, 0.0, confidence).index]
    assert chosen.results.mean == max(exit.results.mean for exit in exits)


@given(many_exits, st.floats(0, 100), levels, st.randoms(use_true_random=False))
def test_choice_does_not_depend_on_the_order_of_the_list(exits, tolerance, confidence, random):
    shuffled = random.sample(exits, len(exits))
    first = exits[choose_exit(exits, tolerance, confidence).index]
    assert shuffled[choose_exit(shuffled, tolerance, confidence).index] == first


@pytest.mark.parametrize(
    ("rows", "num_val", "tolerance", "index"),
    [
        # exactly at the tolerance of 0.5 points
        ([(996, 10), (1000, 20)], 1000, 0.4, 0),
        ([(995, 10), (1000, 20)], 1000, 0.4, 1),
        # 5 samples more and none less is beyond chance at 95 %, 4 are not
        ([(975, 10), (980, 20)], 1000, 0.5, 1),
        ([(976, 10), (980, 20)], 1000, 0.5, 0),
        # 2 points are within the noise of 100 samples: only the tolerance forbids them
        ([(96, 10), (98, 20)], 100, 0.5, 1),
        ([(96, 10), (98, 20)], 100, 2.0, 0),
        ([(80, 10), (98, 20)], 100, 100.0, 1),
        # a deeper exit with fewer weights (a small head on few channels) is the smaller model
        ([(980, 20), (980, 10)], 1000, 0.5, 1),
        # same size: the shallower
        ([(978, 10), (980, 10)], 1000, 0.5, 0),
        ([(500, 10)], 1000, 0.5, 0),
    ],
)
def test_choice_in_examples(rows, num_val, tolerance, index):
    assert choose_exit(candidates_of(*rows, num_val=num_val), tolerance, 0.95).index == index


@pytest.mark.parametrize(
    ("only_best", "only_one", "index"),
    [
        # 45 samples fewer of 10,000: certain where the two hardly differ, not where they differ on many
        (50, 5, 1),
        (1045, 1000, 0),
    ],
)
def test_same_accuracies_are_told_apart_where_the_exits_agree_on_most_samples(only_best, only_one, index):
    exits = differing(only_best, only_one, num_val=10_000, both=8000 - only_best)
    assert choose_exit(exits, 0.5, 0.95).index == index


def test_more_exits_to_compare_with_ask_for_more_evidence():
    pair = candidates_of((975, 10), (980, 20))
    assert choose_exit(pair, 0.5, 0.95).index == 1
    others = [candidate(idx, Hits(0, 1000), 100) for idx in range(2, 10)]
    assert choose_exit([*pair, *others], 0.5, 0.95).index == 0


def drawn_exits(random, num_exits, num_val, accuracy=0.8, shared=0.7):
    """Exits that are equally good: each answers most samples as all do, and the rest by itself, ever larger ones."""
    common, is_common = random.random(num_val) < accuracy, random.random(num_val) < shared
    rows = [np.where(is_common, common, random.random(num_val) < accuracy) for _ in range(num_exits)]
    return [candidate(idx, Hits.of(row), 10 + idx) for idx, row in enumerate(rows)]


def test_thirty_equal_exits_fool_the_choice_no_more_often_than_promised():
    """The smallest is as good as any: with no tolerance at stake it is left out for noise in 5 % of runs at most."""
    random = np.random.default_rng(0)
    chosen = [choose_exit(drawn_exits(random, 30, 400), 100.0, 0.95).index for _ in range(200)]
    assert sum(index != 0 for index in chosen) <= 0.05 * 200 + 2 * math.sqrt(200 * 0.05 * 0.95)


def test_interval_for_the_chosen_exit_covers_what_the_plain_one_of_the_luckiest_does_not():
    random = np.random.default_rng(1)
    plain = corrected = 0
    for _ in range(300):
        exits = drawn_exits(random, 30, 400, shared=0.0)
        luckiest = max(exits, key=lambda exit: exit.results.mean)
        plain += luckiest.interval(0.95)[0] <= 0.8 <= luckiest.interval(0.95)[1]
        low, high = luckiest.interval_among(30, 0.95)
        corrected += low <= 0.8 <= high
    assert corrected >= 0.95 * 300 > 300 / 2 > plain


def test_interval_among_one_exit_is_its_own():
    (exit,) = candidates_of((975, 10))
    assert exit.interval_among(1, 0.95) == pytest.approx(exit.interval(0.95))
    assert exit.interval_among(10, 0.95)[0] < exit.interval(0.95)[0]


def test_reason_names_both_exits_and_both_limits():
    reason = choose_exit(candidates_of((976, 12_345), (980, 67_890)), 0.5, 0.95).reason
    for part in ("features.0", "97.60 %", "12,345", "0.40 points", "features.1", "98.00 %", "67,890", "95 %"):
        assert part in reason
    assert "4 samples only the best of 2 exits got right, 0 only this one" in reason
    assert "\n" not in reason


def test_reason_says_so_when_the_best_is_chosen():
    assert "the best" in choose_exit(candidates_of((900, 10), (980, 20)), 0.5, 0.95).reason


@pytest.mark.parametrize(("exits", "tolerance", "level"), [([], 0.5, 0.95), ([(1, 1)], -1, 0.95), ([(1, 1)], 1, 1.0)])
def test_no_candidates_and_numbers_out_of_range_are_errors(exits, tolerance, level):
    with pytest.raises(ValueError, match=f"got {len(exits)} exits, a tolerance of {tolerance}"):
        choose_exit(candidates_of(*exits), tolerance, level)
