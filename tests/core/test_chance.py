"""Intervals and tests against published values, and against their definitions."""

import math
from fractions import Fraction
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nf_pipeline.core.chance import mean_interval, mean_test, sign_test, wilson_interval

counts = st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
levels = st.floats(0.01, 0.999)


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


@pytest.mark.parametrize(
    ("better", "worse", "p_value"),
    [(0, 0, 1.0), (1, 0, 0.5), (5, 0, 1 / 32), (0, 5, 1.0), (8, 2, 56 / 1024), (2, 8, 1013 / 1024), (3, 3, 42 / 64)],
)
def test_sign_test_adds_up_the_tosses(better, worse, p_value):
    assert sign_test(better, worse) == pytest.approx(p_value, rel=1e-12)


@given(st.integers(0, 400), st.integers(0, 400))
def test_sign_test_equals_the_sum_of_binomials(better, worse):
    total = better + worse
    exact = Fraction(sum(math.comb(total, number) for number in range(better, total + 1)), 2**total)
    assert sign_test(better, worse) == pytest.approx(float(exact), rel=1e-9, abs=1e-300)


def test_sign_test_of_many_samples_is_about_normal():
    num, z = 200_000, 3.0
    better = round(num / 2 + z * math.sqrt(num) / 2)
    assert sign_test(better, num - better) == pytest.approx(1 - NormalDist().cdf(z), rel=0.02)


@pytest.mark.parametrize(
    ("num_samples", "confidence", "quantile"),
    # Quantiles of Student's t as in every table: 4, 9, 30 and 120 degrees of freedom.
    [(5, 0.95, 2.776), (10, 0.95, 2.262), (10, 0.99, 3.250), (31, 0.999, 3.646), (121, 0.95, 1.980)],
)
def test_interval_of_a_mean_and_test_of_a_mean_are_students(num_samples, confidence, quantile):
    low, high = mean_interval(5.0, 2.0, num_samples, confidence)
    half = quantile * 2.0 / math.sqrt(num_samples)
    assert (low, high) == pytest.approx((5.0 - half, 5.0 + half), abs=0.006 * half)
    assert mean_test(half, 2.0, num_samples) == pytest.approx((1 - confidence) / 2, rel=0.02)
    assert mean_test(-half, 2.0, num_samples) == pytest.approx((1 + confidence) / 2, rel=0.02)


@given(st.floats(-10, 10), st.floats(0.01, 10), st.integers(2, 10_000), st.floats(0.01, 0.999))
def test_interval_ends_at_zero_where_the_test_of_the_mean_just_fails(mean, spread, num_samples, confidence):
    half = mean_interval(mean, spread, num_samples, confidence)[1] - mean
    assert mean_test(half, spread, num_samples) == pytest.approx((1 - confidence) / 2, rel=1e-3)


def test_interval_of_a_mean_of_skewed_samples_covers_it_about_as_often_as_promised():
    random = np.random.default_rng(0)
    drawn = random.standard_normal((2000, 200)) ** 2
    ends = [mean_interval(row.mean(), row.std(ddof=1), 200, 0.95) for row in drawn]
    assert np.mean([low <= 1.0 <= high for low, high in ends]) == pytest.approx(0.94, abs=0.02)


@pytest.mark.parametrize(
    ("mean", "spread", "num_samples", "p_value"), [(1.0, 0.0, 9, 0.0), (0.0, 0.0, 9, 1.0), (1.0, 1.0, 1, 1.0)]
)
def test_differences_without_spread_are_certain_and_one_sample_tells_nothing(mean, spread, num_samples, p_value):
    assert mean_test(mean, spread, num_samples) == p_value


@pytest.mark.parametrize(("spread", "num_samples", "confidence"), [(1.0, 0, 0.9), (-1.0, 5, 0.9), (1.0, 5, 1.0)])
def test_interval_of_a_mean_of_impossible_numbers_is_an_error(spread, num_samples, confidence):
    with pytest.raises(ValueError, match="samples, spread"):
        mean_interval(0.0, spread, num_samples, confidence)
