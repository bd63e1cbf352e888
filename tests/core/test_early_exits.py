"""Operating points, with numbers that can be worked out by hand and against trying everything."""

import numpy as np
import pytest

from nf_pipeline.core.early_exits import (
    MAX_POINTS,
    ExitCosts,
    OperatingPoint,
    best_within,
    cheapest_with,
    exit_sets,
    find_points,
    leaving_exits,
    measure_point,
)

COSTS = ExitCosts(layers=(100, 300, 600), heads=(10, 20, 40))
# Three exits, four samples.
CONFIDENCE_EN = np.array([[0.9, 0.6, 0.6, 0.2], [0.9, 0.8, 0.5, 0.3], [0.9, 0.9, 0.9, 0.9]], np.float32)
RIGHT_EN = np.array([[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]], bool)


def test_cost_of_leaving_counts_the_heads_that_were_run_on_the_way():
    assert COSTS.of_leaving((0, 1)).tolist() == [110, 330, 670]
    assert COSTS.of_leaving((1,)).tolist() == [100, 320, 660]
    assert COSTS.of_leaving(()).tolist() == [100, 300, 640]


@pytest.mark.parametrize(
    ("exits", "threshold", "left", "accuracy", "flops"),
    [
        ((0, 1), 0.7, [0, 1, 2, 2], 1.0, (110 + 330 + 670 + 670) / 4),
        ((0, 1), 0.6, [0, 0, 0, 2], 0.75, (110 * 3 + 670) / 4),
        ((1,), 0.5, [1, 1, 1, 2], 1.0, (320 * 3 + 660) / 4),
        ((0, 1), 0.0, [0, 0, 0, 0], 0.5, 110),
        ((), 0.0, [2, 2, 2, 2], 1.0, 640),
    ],
)
def test_samples_leave_at_the_first_exit_that_is_sure_enough(exits, threshold, left, accuracy, flops):
    assert leaving_exits(CONFIDENCE_EN, exits, np.float32(threshold)).tolist() == left
    assert measure_point(CONFIDENCE_EN, RIGHT_EN, COSTS, exits, np.float32(threshold)) == (accuracy, flops)


def test_points_are_those_that_none_beats():
    points = find_points(CONFIDENCE_EN, RIGHT_EN, COSTS)
    best = points[-1]
    assert (best.exits, best.val_accuracy, best.val_flops) == ((1,), 1.0, 405.0)
    assert (points[0].val_accuracy, points[0].val_flops) == (0.5, 110.0)
    pairs = [(point.val_flops, point.val_accuracy) for point in points]
    assert pairs == sorted(pairs) and len({accuracy for _, accuracy in pairs}) == len(pairs)


@pytest.mark.parametrize(
    ("num_exits", "sets"),
    [
        (1, [()]),
        (2, [(), (0,)]),
        (3, [(), (0,), (1,), (0, 1)]),
        (5, [(), (0,), (1,), (2,), (3,), (0, 1, 2, 3), (0, 2)]),
    ],
)
def test_sets_are_none_each_alone_and_every_so_many(num_exits, sets):
    assert exit_sets(num_exits) == sets


@pytest.mark.parametrize("num_exits", [1, 2, 7, 30])
def test_sets_of_any_number_of_exits_are_in_order_and_leave_the_last_out(num_exits):
    for exits in exit_sets(num_exits):
        assert list(exits) == sorted(set(exits)) and all(0 <= exit_idx < num_exits - 1 for exit_idx in exits)


def drawn(seed, num=400, num_exits=5):
    """Exits that get better with depth, and whose confidence says how likely they are right."""
    random = np.random.default_rng(seed)
    ease_N = random.random(num)
    sure_EN = np.clip(ease_N + 0.15 * np.arange(num_exits)[:, None], 0.1, 0.99).astype(np.float32)
    return sure_EN, random.random((num_exits, num)) < sure_EN


def test_no_set_and_threshold_that_were_tried_beats_a_point():
    sure_EN, right_EN = drawn(0, num=10)
    costs = ExitCosts(layers=(10, 20, 30, 40, 50), heads=(1, 1, 1, 1, 1))
    points = find_points(sure_EN, right_EN, costs)
    for exits in exit_sets(5):
        for threshold in np.unique(sure_EN):
            accuracy, flops = measure_point(sure_EN, right_EN, costs, exits, threshold)
            assert any(point.val_accuracy >= accuracy - 1e-9 and point.val_flops <= flops + 1e-9 for point in points)


def test_points_hold_on_samples_that_they_were_not_found_on():
    costs = ExitCosts(layers=(10, 20, 30, 40, 50), heads=(1, 1, 1, 1, 1))
    points = find_points(*drawn(0, num=4000), costs)
    assert 1 < len(points) <= MAX_POINTS
    for point in points:
        accuracy, flops = measure_point(*drawn(1, num=20_000), costs, point.exits, point.threshold)
        assert accuracy == pytest.approx(point.val_accuracy, abs=0.03)
        assert flops == pytest.approx(point.val_flops, rel=0.05)


def test_single_exit_has_the_one_point_that_it_is():
    (point,) = find_points(
        np.ones((1, 4), np.float32), np.array([[1, 1, 1, 0]], bool), ExitCosts(layers=(9,), heads=(1,))
    )
    assert point == OperatingPoint(exits=(), threshold=1.0, val_accuracy=0.75, val_flops=10.0)


def test_wanted_accuracy_and_wanted_cost_pick_the_best_point_that_keeps_them():
    points = find_points(CONFIDENCE_EN, RIGHT_EN, COSTS)
    assert cheapest_with(points, 0.6).val_accuracy >= 0.6
    assert cheapest_with(points, 0.6).val_flops == min(p.val_flops for p in points if p.val_accuracy >= 0.6)
    assert best_within(points, 405.0).val_accuracy == 1.0
    assert best_within(points, 404.0).val_accuracy < 1.0
    assert cheapest_with(points, 1.01) is None and best_within(points, 1.0) is None
