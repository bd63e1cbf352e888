"""The choice of the exit, against the rule spelled out and the textbook's numbers."""

from statistics import NormalDist

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nf_pipeline.core.exits import ExitCandidate, choose_exit, wilson_interval

counts = st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
levels = st.floats(0.01, 0.999)


def candidate(idx, num_correct, num_val, params):
    return ExitCandidate(
        layer_idx=idx,
        layer=f"features.{idx}",
        val_accuracy=num_correct / num_val,
        num_val=num_val,
        params=params,
        flops=params,
    )


def candidates_of(*rows, num_val=1000):
    """(correct, params) per exit, shallowest first."""
    return [candidate(idx, correct, num_val, params) for idx, (correct, params) in enumerate(rows)]


many_exits = st.integers(1, 3000).flatmap(
    lambda n: st.lists(st.tuples(st.integers(0, n), st.integers(1, 20)), min_size=1, max_size=8).map(
        lambda rows: candidates_of(*rows, num_val=n)
    )
)


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [
        # Newcombe, Statistics in Medicine 17 (1998) 857-872, table I, method 3 (score).
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_equals_published_values(correct, total, low, high):
    assert wilson_interval(correct, total, 0.95) == pytest.approx((low, high), abs=5e-5)


@given(counts, levels)
def test_interval_holds_the_accuracy_and_stays_within_zero_and_one(count, confidence):
    low, high = wilson_interval(*count, confidence)
    assert 0.0 <= low <= count[0] / count[1] <= high <= 1.0


@given(counts, levels)
def test_interval_ends_are_where_the_score_test_just_fails(count, confidence):
    (correct, total), z = count, NormalDist().inv_cdf(0.5 + confidence / 2)
    for end in wilson_interval(correct, total, confidence):
        # Multiplied out: (p - end)^2 = z^2 * end * (1 - end) / n.
        assert (correct / total - end) ** 2 == pytest.approx(z**2 * end * (1 - end) / total, abs=1e-9)


@given(counts, levels)
def test_interval_of_the_errors_mirrors_that_of_the_hits(count, confidence):
    low, high = wilson_interval(*count, confidence)
    mirrored = wilson_interval(count[1] - count[0], count[1], confidence)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-12)


@given(counts, st.lists(levels, min_size=2, max_size=2))
def test_more_confidence_widens_the_interval(count, confidences):
    narrow, wide = (wilson_interval(*count, confidence) for confidence in sorted(confidences))
    assert wide[0] <= narrow[0] + 1e-12 and narrow[1] <= wide[1] + 1e-12


@pytest.mark.parametrize(
    ("correct", "total", "confidence"), [(1, 0, 0.9), (-1, 5, 0.9), (6, 5, 0.9), (1, 5, 0.0), (1, 5, 1.0)]
)
def test_interval_of_impossible_numbers_is_an_error(correct, total, confidence):
    with pytest.raises(ValueError, match="want 0 <= num_correct"):
        wilson_interval(correct, total, confidence)


@given(many_exits, st.floats(0, 100), levels)
def test_choice_is_the_smallest_exit_that_keeps_both_rules(exits, tolerance, confidence):
    chosen = exits[choose_exit(exits, tolerance, confidence).index]
    best = max(exit.val_accuracy for exit in exits)

    def is_good(exit):
        correct = round(exit.val_accuracy * exit.num_val)
        _, high = wilson_interval(correct, exit.num_val, confidence)
        return 100 * (best - exit.val_accuracy) <= tolerance + 1e-9 and best <= high + 1e-9

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
    assert chosen.val_accuracy == max(exit.val_accuracy for exit in exits)


@given(many_exits, st.floats(0, 100), levels, st.randoms(use_true_random=False))
def test_choice_does_not_depend_on_the_order_of_the_list(exits, tolerance, confidence, random):
    shuffled = random.sample(exits, len(exits))
    first = exits[choose_exit(exits, tolerance, confidence).index]
    assert shuffled[choose_exit(shuffled, tolerance, confidence).index] == first


@pytest.mark.parametrize(
    ("rows", "num_val", "tolerance", "index"),
    [
        # exactly at the tolerance of 0.5 points
        ([(975, 10), (980, 20)], 1000, 0.5, 0),
        ([(974, 10), (980, 20)], 1000, 0.5, 1),
        # 0.45 points are within the tolerance, but certain with 100,000 samples
        ([(97_550, 10), (98_000, 20)], 100_000, 0.5, 1),
        ([(97_950, 10), (98_000, 20)], 100_000, 0.5, 0),
        # 2 points are within the noise of 100 samples: only the tolerance forbids them
        ([(96, 10), (98, 20)], 100, 0.5, 1),
        ([(96, 10), (98, 20)], 100, 2.0, 0),
        ([(80, 10), (98, 20)], 100, 100.0, 1),
        # a deeper exit with fewer weights (a small head on few channels) is the smaller model
        ([(980, 20), (980, 10)], 1000, 0.5, 1),
        # same size: the shallower
        ([(976, 10), (980, 10)], 1000, 0.5, 0),
        ([(500, 10)], 1000, 0.5, 0),
    ],
)
def test_choice_in_examples(rows, num_val, tolerance, index):
    assert choose_exit(candidates_of(*rows, num_val=num_val), tolerance, 0.95).index == index


def test_reason_names_both_exits_and_both_limits():
    reason = choose_exit(candidates_of((975, 12_345), (980, 67_890)), 0.5, 0.95).reason
    for part in ("features.0", "97.50 %", "12,345", "0.50 points", "features.1", "98.00 %", "67,890", "95 %"):
        assert part in reason
    assert "\n" not in reason


def test_reason_says_so_when_the_best_is_chosen():
    assert "the best" in choose_exit(candidates_of((900, 10), (980, 20)), 0.5, 0.95).reason


def test_no_candidates_is_an_error():
    with pytest.raises(ValueError, match="got 0 exits"):
        choose_exit([], 0.5, 0.95)


def test_negative_tolerance_is_an_error():
    with pytest.raises(ValueError, match="tolerance of -1"):
        choose_exit(candidates_of((1, 1)), -1, 0.95)
