"""When a curve reaches a target, and what repetitions amount to."""

import pytest

from nf_pipeline.bench.curves import accuracy_at, spread_of, time_to

CURVE = [(1.0, 0.2), (2.0, 0.5), (3.0, 0.4), (4.0, 0.6)]


@pytest.mark.parametrize(("target", "seconds"), [(0.1, 1.0), (0.5, 2.0), (0.55, 4.0), (0.7, None)])
def test_time_to_is_the_first_moment_with_the_target(target, seconds):
    assert time_to(CURVE, target) == seconds


@pytest.mark.parametrize(("seconds", "accuracy"), [(0.5, None), (1.0, 0.2), (3.5, 0.4), (99.0, 0.6)])
def test_accuracy_at_is_the_newest_one_and_not_the_best(seconds, accuracy):
    assert accuracy_at(CURVE, seconds) == accuracy


@pytest.mark.parametrize(
    ("values", "spread"),
    [
        ([3.0, 1.0, 2.0], [2.0, 1.0, 3.0]),
        ([3.0, None, 2.0], [2.5, 2.0, 3.0]),
        ([3.0, None], None),
        ([None], None),
    ],
)
def test_spread_needs_more_than_half_of_the_repetitions(values, spread):
    assert spread_of(values) == spread
