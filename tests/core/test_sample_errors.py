"""Errors of values, sample by sample: what they are, how they travel, and what they promise about exits."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nf_pipeline.core.chance import mean_test
from nf_pipeline.core.early_stop import reason_to_stop
from nf_pipeline.core.exits import ExitCandidate, ExitRule, choose_exit
from nf_pipeline.core.metrics import results_kind
from nf_pipeline.core.optimism import choice_optimism
from nf_pipeline.core.sample_errors import LARGEST_ERROR, SampleErrors
from nf_pipeline.samples import TargetSpec

BEST = ExitRule(tolerance=0.0, confidence=0.95)

many_errors = st.integers(2, 60).flatmap(
    lambda n: st.lists(
        st.tuples(st.lists(st.floats(0, 100, width=32), min_size=n, max_size=n), st.integers(1, 20)),
        min_size=1,
        max_size=6,
    ).map(lambda rows: exits_of(np.array([row for row, _ in rows]), [params for _, params in rows]))
)


def exits_of(errors_EN, params=None):
    sizes = params or range(10, 10 + len(errors_EN))
    return [
        ExitCandidate(
            layer_idx=idx, layer=f"features.{idx}", results=SampleErrors.of(np.array(row)), params=size, flops=1
        )
        for idx, (row, size) in enumerate(zip(errors_EN, sizes, strict=True))
    ]


def drawn_errors(random, num_exits, num_samples, shared=0.8):
    """Squared residuals of exits that are equally good: most of each is the same for all, the rest their own."""
    common = random.standard_normal(num_samples)
    own = random.standard_normal((num_exits, num_samples))
    return (math.sqrt(shared) * common + math.sqrt(1 - shared) * own) ** 2


def test_error_is_the_mean_squared_residual_and_one_for_who_predicts_the_mean():
    y_NK = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0))
    guess = SampleErrors.of(SampleErrors.measure(torch.zeros(4000, 3), y_NK).numpy())
    assert guess.mean == pytest.approx(1.0, abs=0.05)
    near = SampleErrors.of(SampleErrors.measure(y_NK + torch.tensor([0.3, 0.0, 0.0]), y_NK).numpy())
    assert near.mean == pytest.approx(0.03, rel=1e-5)
    assert results_kind(TargetSpec(kind="values", size=3)) is SampleErrors


@given(st.lists(st.floats(0, 2**60, width=32), min_size=1, max_size=40))
def test_errors_come_back_from_bytes_and_text(errors):
    results = SampleErrors.of(np.array(errors))
    assert (results.num_samples, results.errors_N.tolist()) == (len(errors), errors)
    assert SampleErrors.from_text(results.to_text(), len(errors)) == results
    assert results.mean == pytest.approx(np.mean(np.array(errors, np.float64)), rel=1e-12)


def test_parts_of_a_gang_add_up_byte_by_byte():
    errors = np.array([0.5, 0.1, 3.0, 0.0, 7.25], np.float32)
    parts = [SampleErrors.of(errors[:2]).spread_over(0, 5), SampleErrors.of(errors[2:]).spread_over(2, 5)]
    joined = bytes(sum(column) for column in zip(*(part.to_bytes() for part in parts), strict=True))
    assert SampleErrors.from_bytes(joined, 5) == SampleErrors.of(errors)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e38])
def test_prediction_that_is_no_number_counts_as_the_worst_and_stays_a_number(bad):
    results = SampleErrors.of(np.array([0.5, bad], np.float32))
    assert not results.is_finite and SampleErrors.of(np.array([0.5])).is_finite
    assert results.mean == pytest.approx(LARGEST_ERROR / 2)
    assert all(map(math.isfinite, results.interval(0.95)))
    chosen = choose_exit([*exits_of([[0.5, bad]]), *exits_of([[0.6, 0.6]], [99])], 50.0, 0.95)
    assert chosen.index == 1


@pytest.mark.parametrize(
    ("numbers", "num_samples"), [([0.5], 2), ([0.5, 1.0], 1), ([-1.0], 1), ([math.nan], 1), ([math.inf], 1)]
)
def test_bytes_of_other_samples_or_of_no_errors_are_refused(numbers, num_samples):
    with pytest.raises(ValueError, match=r"samples|below 0"):
        SampleErrors.from_bytes(np.array(numbers, "<f4").tobytes(), num_samples)


def test_interval_holds_the_mean_is_not_below_zero_and_covers_about_as_promised():
    random = np.random.default_rng(0)
    found = [SampleErrors.of(random.standard_normal(300) ** 2).interval(0.95) for _ in range(400)]
    assert 0.92 <= np.mean([low <= 1.0 <= high for low, high in found]) <= 0.98
    low, high = SampleErrors.of(np.array([0.0, 0.0, 1.0])).interval(0.95)
    assert low == 0.0 < high
    assert SampleErrors.of(np.array([0.4])).interval(0.95)[1] > 1.0


@given(many_errors, st.floats(0, 100), st.floats(0.01, 0.999))
def test_choice_is_the_smallest_exit_that_keeps_both_rules(exits, tolerance, confidence):
    chosen = exits[choose_exit(exits, tolerance, confidence).index]
    best = min(exits, key=lambda exit: (exit.results.mean, exit.size))

    def is_good(exit, slack):
        """Tells whether both rules are kept; rounding may decide what is exactly at a limit, hence some slack."""
        difference_N = exit.results.errors_N - best.results.errors_N
        p_value = mean_test(float(difference_N.mean()), float(difference_N.std(ddof=1)), len(difference_N))
        near = exit.results.mean <= best.results.mean * (1 + tolerance / 100 + slack) + slack
        return near and p_value > (1 - confidence) / max(1, len(exits) - 1) - slack

    assert chosen is best or is_good(chosen, 1e-6)
    assert not any(is_good(exit, -1e-6) for exit in exits if exit.size < chosen.size)


@pytest.mark.parametrize(
    ("more", "noise", "tolerance", "index"),
    [
        pytest.param(0.003, 0.1, 0.5, 0, id="within the tolerance and the noise"),
        pytest.param(0.003, 0.001, 0.5, 1, id="within the tolerance, but surely worse"),
        pytest.param(0.02, 1.0, 0.5, 1, id="within the noise, but beyond the tolerance"),
        pytest.param(0.02, 1.0, 5.0, 0, id="a larger tolerance"),
    ],
)
def test_choice_by_error_in_examples(more, noise, tolerance, index):
    signs_N = np.tile([1.0, -1.0], 500)
    exits = exits_of(np.stack([1.5 + more + noise * signs_N, np.full(1000, 1.5)]))
    assert choose_exit(exits, tolerance, 0.95).index == index


@pytest.mark.parametrize("num_samples", [40, 400])
def test_twenty_equal_exits_fool_the_choice_by_error_no_more_often_than_promised(num_samples):
    """The smallest is as good as any: with no tolerance at stake noise leaves it out in 5 % of splits at most."""
    random = np.random.default_rng(0)
    num_runs = 300
    runs = (exits_of(drawn_errors(random, 20, num_samples)) for _ in range(num_runs))
    left_out = sum(choose_exit(exits, 1e9, 0.95).index != 0 for exits in runs)
    assert left_out <= 0.05 * num_runs + 2 * math.sqrt(num_runs * 0.05 * 0.95)


def test_exit_that_is_truly_worse_is_found_out_where_samples_suffice():
    random = np.random.default_rng(1)
    errors_EN = drawn_errors(random, 2, 20_000)
    errors_EN[0] *= 1.03
    assert choose_exit(exits_of(errors_EN), 100.0, 0.95).index == 1


def test_reason_names_both_errors_and_both_limits():
    signs_N = np.tile([1.0, -1.0], 500)
    exits = exits_of(np.stack([0.4012 + 0.1 * signs_N, np.full(1000, 0.4)]), [12_345, 67_890])
    reason = choose_exit(exits, 0.5, 0.95).reason
    for part in (
        "features.0: error 0.4012 on validation",
        "12,345",
        "0.30 % above",
        "error 0.4000",
        "67,890",
        "0.5 %",
    ):
        assert part in reason
    assert "its errors are 0.0012 above those of the best of 2 exits, standard error 0.0032" in reason
    assert "\n" not in reason


@pytest.mark.parametrize(
    ("means", "patience", "is_over"),
    [
        pytest.param([[0.5]], 1, False, id="one block has nothing before it"),
        pytest.param([[0.5], [0.49]], 1, True, id="a gain within the noise"),
        pytest.param([[0.5], [0.45]], 1, False, id="a gain beyond the noise"),
        pytest.param([[0.5], [0.6]], 1, True, id="a loss"),
        pytest.param([[0.9, 0.5], [0.49, 0.6]], 1, True, id="the best of each block's exits counts"),
        pytest.param([[0.5], [0.49], [0.48]], 2, False, id="small gains that add up"),
        pytest.param([[0.5], [0.495], [0.49]], 2, True, id="small gains that do not"),
    ],
)
def test_training_stops_when_no_error_is_a_standard_error_below(means, patience, is_over):
    # Half of the errors are 0, half twice the mean: the standard error is a 31st of the mean.
    blocks = [[SampleErrors.of(np.tile([0.0, 2 * mean], 500)) for mean in block] for block in means]
    reason = reason_to_stop(blocks, patience)
    assert (reason is not None) is is_over
    if is_over:
        assert "not below its noise, which ends at error 0.484 (1000 samples)" in reason


def test_optimism_is_what_the_best_of_many_equal_errors_gains_by_luck():
    random, gained, estimated = np.random.default_rng(0), [], []
    for _ in range(25):
        exits = exits_of(drawn_errors(random, 15, 200, shared=0.0))
        gained.append(1.0 - exits[choose_exit(exits, 0.0, 0.95).index].results.mean)
        estimated.append(choice_optimism(exits, BEST))
    assert np.mean(gained) > 0.1
    assert np.mean(estimated) == pytest.approx(np.mean(gained), rel=0.4)


def test_optimism_leaves_out_an_exit_that_gave_what_is_no_number():
    errors_EN = np.random.default_rng(3).exponential(0.3, (2, 400))
    errors_EN[0, 7] = np.inf
    exits = exits_of(errors_EN, params=[1, 2])
    rule = ExitRule(tolerance=50.0, confidence=0.95)
    assert choose_exit(exits, 50.0, 0.95).index == 1
    assert abs(choice_optimism(exits, rule)) < 1.0
