"""The partitioner against slow oracles that try every batch size and every budget."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nf_pipeline.config import MemoryConfig
from nf_pipeline.core.partition import (
    budget_for,
    effective_budget,
    feasible_batch,
    partition,
    smallest_budget,
)
from nf_pipeline.errors import PlanError
from nf_pipeline.plans import UnitProfile


def make_unit(unit_idx: int, slope: int, constant: int, resident: int) -> UnitProfile:
    return UnitProfile(
        unit_idx=unit_idx,
        start=unit_idx,
        stop=unit_idx + 1,
        bytes_per_sample=slope,
        constant_bytes=constant,
        resident_bytes=resident,
        head_params=0,
        head_flops=0,
    )


def make_units(*rows: tuple[int, int, int]) -> list[UnitProfile]:
    return [make_unit(unit_idx, *row) for unit_idx, row in enumerate(rows)]


def make_cfg(**fields: object) -> MemoryConfig:
    return MemoryConfig(**{"budget_bytes": 1000, "safety_margin": 0.0, **fields})


@st.composite
def unit_lists(draw: st.DrawFn) -> list[UnitProfile]:
    rows = []
    for _ in range(draw(st.integers(1, 7))):
        resident = draw(st.integers(0, 120))
        rows.append((draw(st.integers(0, 40)), resident + draw(st.integers(0, 80)), resident))
    return make_units(*rows)


configs = st.builds(
    make_cfg,
    max_batch_size=st.integers(4, 40),
    min_batch_size=st.integers(2, 4),
    safety_margin=st.sampled_from([0.0, 0.03, 0.1, 0.5]),
    join_threshold=st.sampled_from([0.0, 0.1, 0.4, 1.0]),
)


def oracle_peak(units: list[UnitProfile], batch_size: int) -> int:
    """Trains unit after unit: each needs its own bytes beside what stays of the others."""
    return max(
        unit.bytes_per_sample * batch_size
        + unit.constant_bytes
        + sum(other.resident_bytes for other in units if other is not unit)
        for unit in units
    )


def oracle_batch(units: list[UnitProfile], available: Fraction, cap: int) -> int:
    """Tries every batch size."""
    return max((b for b in range(1, cap + 1) if oracle_peak(units, b) <= available), default=0)


def oracle_partition(units: list[UnitProfile], budget: int, cfg: MemoryConfig) -> list[tuple[int, int, int]] | None:
    """The joining rule spelled out, unit by unit; None where a unit alone takes no allowed batch."""
    available = budget * (1 - Fraction(str(cfg.safety_margin)))
    threshold = Fraction(str(cfg.join_threshold))
    alone = [oracle_batch([unit], available, cfg.max_batch_size) for unit in units]
    if min(alone) < cfg.min_batch_size:
        return None
    blocks: list[list[int]] = []
    for unit_idx in range(len(units)):
        if blocks:
            block = blocks[-1]
            reference = alone[block[0]]
            joint = oracle_batch([units[i] for i in [*block, unit_idx]], available, cfg.max_batch_size)
            similar = Fraction(abs(alone[unit_idx] - reference), reference) <= threshold
            if similar and joint >= (1 - threshold) * reference and joint >= cfg.min_batch_size:
                block.append(unit_idx)
                continue
        blocks.append([unit_idx])
    return [(b[0], b[-1] + 1, oracle_batch([units[i] for i in b], available, cfg.max_batch_size)) for b in blocks]


@settings(max_examples=400, deadline=None)
@given(units=unit_lists(), budget=st.integers(1, 900), cfg=configs)
def test_partition_equals_the_brute_force_oracle(units: list[UnitProfile], budget: int, cfg: MemoryConfig) -> None:
    expected = oracle_partition(units, budget, cfg)
    if expected is None:
        with pytest.raises(PlanError):
            partition(units, budget, cfg)
    else:
        groups = partition(units, budget, cfg)
        assert [(group.start, group.stop, group.batch_size) for group in groups] == expected


@settings(max_examples=200, deadline=None)
@given(units=unit_lists(), cfg=configs)
def test_smallest_budget_is_the_first_that_works(units: list[UnitProfile], cfg: MemoryConfig) -> None:
    smallest = smallest_budget(units, cfg)
    partition(units, smallest, cfg)
    for budget in range(max(1, smallest - 5), smallest):
        with pytest.raises(PlanError) as caught:
            partition(units, budget, cfg)
        assert caught.value.smallest_budget_bytes == smallest


@settings(max_examples=200, deadline=None)
@given(units=unit_lists(), budget=st.integers(1, 900), cfg=configs)
def test_blocks_cover_all_units_and_stay_within_the_effective_budget(
    units: list[UnitProfile], budget: int, cfg: MemoryConfig
) -> None:
    try:
        groups = partition(units, budget, cfg)
    except PlanError:
        return
    assert [group.start for group in groups] == [0, *(group.stop for group in groups[:-1])]
    assert groups[-1].stop == len(units)
    for group in groups:
        peak = oracle_peak(units[group.start : group.stop], group.batch_size)
        assert peak <= effective_budget(budget, cfg) <= budget
        assert cfg.min_batch_size <= group.batch_size <= cfg.max_batch_size


@given(needed=st.integers(1, 10**12), margin=st.sampled_from([0.0, 0.01, 0.03, 0.07, 0.5]))
def test_budget_for_is_the_inverse_of_effective_budget(needed: int, margin: float) -> None:
    cfg = make_cfg(safety_margin=margin)
    assert effective_budget(budget_for(needed, cfg), cfg) >= needed
    assert effective_budget(budget_for(needed, cfg) - 1, cfg) < needed


def test_margin_is_the_decimal_that_was_written() -> None:
    # In binary floating point 0.03 is a little less, and 100 * (1 - 0.03) rounds down to 96 or 97 by luck.
    assert effective_budget(100, make_cfg(safety_margin=0.03)) == 97
    assert effective_budget(10**18, make_cfg(safety_margin=0.07)) == 93 * 10**16


def test_a_unit_too_large_is_an_error_with_the_worst_unit_and_all_numbers() -> None:
    units = make_units((10, 100, 50), (20, 300, 50), (1, 10, 5))
    with pytest.raises(PlanError) as caught:
        partition(units, 339, make_cfg(safety_margin=0.1), unit_names=["a", "b", "c"])
    error = caught.value
    assert (error.layer, error.needed_bytes, error.budget_bytes) == ("b", 340, 339)
    assert error.smallest_budget_bytes == 378  # 340 / 0.9, rounded up


def test_similar_units_share_a_block_until_the_batch_differs_too_much() -> None:
    units = make_units((100, 0, 0), (70, 0, 0), (20, 0, 0), (20, 0, 0))
    groups = partition(units, 1000, make_cfg())
    # Alone they take 10, 14, 50 and 50; 14 is within 40 % of 10, 50 is not.
    assert [(group.start, group.stop, group.batch_size) for group in groups] == [(0, 2, 10), (2, 4, 50)]
    assert groups[0].reason == (
        "unit 2 takes batch 50, this block's first unit 10; batch 10 is what unit 0 leaves room for"
    )
    assert groups[1].reason.startswith("the model ends; ")


def test_resident_weights_of_the_others_end_a_block() -> None:
    units = make_units((10, 450, 450), (10, 450, 450))
    groups = partition(units, 1000, make_cfg())
    # Each takes 55 alone, both together 10.
    assert [group.batch_size for group in groups] == [55, 55]
    assert "with unit 1 the batch would fall from 55 to 10" in groups[0].reason


def test_a_block_never_falls_below_the_smallest_batch_whatever_the_threshold() -> None:
    units = make_units((10, 480, 480), (10, 500, 500))
    groups = partition(units, 1000, make_cfg(join_threshold=1.0, min_batch_size=3))
    assert [(group.start, group.stop) for group in groups] == [(0, 1), (1, 2)]


def test_a_generous_budget_makes_one_block_at_the_cap() -> None:
    groups = partition(make_units((10, 50, 20), (1, 60, 50), (3, 9, 9)), 10**6, make_cfg())
    assert [(group.start, group.stop, group.batch_size) for group in groups] == [(0, 3, 128)]
    assert groups[0].reason == "the model ends; batch 128 is memory.max_batch_size"


def test_the_cap_is_named_as_the_caller_says() -> None:
    groups = partition(make_units((10, 50, 20)), 10**6, make_cfg(), cap_name="what there is")
    assert groups[0].reason == "the model ends; batch 128 is what there is"


def test_feasible_batch_without_slope_is_all_or_nothing() -> None:
    assert feasible_batch(make_units((0, 10, 0)), 10, 7) == 7
    assert feasible_batch(make_units((0, 10, 0)), 9, 7) == 0


def test_200_units_are_covered_in_one_pass() -> None:
    units = make_units(*[(100 + idx % 7, 1000 + idx, 100) for idx in range(200)])
    groups = partition(units, 10**6, make_cfg())
    assert [group.start for group in groups[1:]] == [group.stop for group in groups[:-1]]
    assert groups[-1].stop == 200
