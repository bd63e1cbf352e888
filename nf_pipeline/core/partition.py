"""Groups units into blocks and gives each block its batch size, from profiles and a budget.

Integers only, so that a plan is the same on every machine, and no torch. Bytes of a block at batch b, when
its units train one after the other:

    peak(b) = max over units u of (bytes_per_sample_u * b + constant_bytes_u + resident_bytes of all others)

Blocks grow greedily from the front: a unit joins while it wants a batch like that of the block's first unit.
Joining saves a pass through the store; a batch far below what a unit could take costs speed. Entry function:
`partition`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from nf_pipeline.config import MemoryConfig
from nf_pipeline.errors import PlanError
from nf_pipeline.plans import UnitProfile


@dataclass(frozen=True, kw_only=True)
class Group:
    """Units that become one block.

    Attributes:
        start, stop: half-open range of units.
        batch_size: largest that fits the effective budget, capped.
        reason: why the block ends here and has this batch size.
    """

    start: int
    stop: int
    batch_size: int
    reason: str


def partition(
    units: Sequence[UnitProfile],
    budget_bytes: int,
    cfg: MemoryConfig,
    *,
    unit_names: Sequence[str] | None = None,
    cap_name: str = "memory.max_batch_size",
) -> list[Group]:
    """Cuts the units into blocks that cover them in order without gaps.

    Args:
        units: profiles, at least one.
        budget_bytes: what the training process may hold, the safety margin included.
        cfg: thresholds, margin and batch limits; its own budget is not read.
        unit_names: for errors and reasons; "unit 3" when not given.
        cap_name: what `cfg.max_batch_size` stands for, for reasons.

    Raises:
        PlanError: a unit alone cannot train with the smallest batch; names the unit that needs the most.
    """
    names = unit_names or [f"unit {unit.unit_idx}" for unit in units]
    available = effective_budget(budget_bytes, cfg)
    _check_every_unit_fits(units, names, budget_bytes, cfg)
    groups = []
    start = 0
    while start < len(units):
        stop, reason = _grow(units, names, start, available, cfg)
        batch_size, limit = limit_batch(units[start:stop], names[start:stop], available, cfg, cap_name)
        groups.append(Group(start=start, stop=stop, batch_size=batch_size, reason=f"{reason}; {limit}"))
        start = stop
    return groups


def assign_budgets(
    units: Sequence[UnitProfile], names: Sequence[str], budgets: Sequence[int], cfg: MemoryConfig
) -> list[tuple[int, int, int]]:
    """Gives every unit the smallest class of workers on which it trains at all.

    Args:
        units: profiles, in order.
        names: of the units, for errors.
        budgets: bytes per class of workers, ascending, at least one.
        cfg: margin and smallest batch.

    Returns:
        Runs of consecutive units with one budget: (start, stop, budget_bytes), half-open, covering all units.

    Raises:
        PlanError: a unit trains on no class; names the unit that needs the most and the largest class.
    """
    _check_every_unit_fits(units, names, budgets[-1], cfg)
    runs: list[tuple[int, int, int]] = []
    for idx, unit in enumerate(units):
        needed = unit.peak_bytes(cfg.min_batch_size)
        budget = next(budget for budget in budgets if needed <= effective_budget(budget, cfg))
        if runs and runs[-1][2] == budget:
            runs[-1] = (runs[-1][0], idx + 1, budget)
        else:
            runs.append((idx, idx + 1, budget))
    return runs


def limit_batch(
    units: Sequence[UnitProfile], names: Sequence[str], available: int, cfg: MemoryConfig, cap_name: str
) -> tuple[int, str]:
    """Returns the largest batch of a block's units, and what keeps it from being larger."""
    batch_size = feasible_batch(units, available, cfg.max_batch_size)
    if batch_size == cfg.max_batch_size:
        return batch_size, f"batch {batch_size} is {cap_name}"
    needed = [unit.peak_bytes(batch_size + 1) - unit.resident_bytes for unit in units]
    return batch_size, f"batch {batch_size} is what {names[needed.index(max(needed))]} leaves room for"


def effective_budget(budget_bytes: int, cfg: MemoryConfig) -> int:
    """Returns what plans may use: the budget less the safety margin, rounded down."""
    keep = _keep(cfg)
    return budget_bytes * keep.numerator // keep.denominator


def smallest_budget(units: Sequence[UnitProfile], cfg: MemoryConfig) -> int:
    """Returns the smallest budget, margin included, with which every unit trains at the smallest batch."""
    return budget_for(max(unit.peak_bytes(cfg.min_batch_size) for unit in units), cfg)


def budget_for(needed_bytes: int, cfg: MemoryConfig) -> int:
    """Returns the smallest budget whose `effective_budget` is at least the bytes needed."""
    keep = _keep(cfg)
    return -(-needed_bytes * keep.denominator // keep.numerator)


def feasible_batch(units: Sequence[UnitProfile], available_bytes: int, max_batch_size: int) -> int:
    """Returns the largest batch, at most the cap, with which a block of units fits; 0 or less if none does."""
    free = available_bytes - sum(unit.resident_bytes for unit in units)
    batch_size = max_batch_size
    for unit in units:
        unit_free = free + unit.resident_bytes - unit.constant_bytes
        if unit.bytes_per_sample > 0:
            batch_size = min(batch_size, unit_free // unit.bytes_per_sample)
        elif unit_free < 0:
            return 0
    return batch_size


def _keep(cfg: MemoryConfig) -> Fraction:
    # The decimal that the user wrote, not its binary neighbour: 0.03 is 3/100.
    return 1 - Fraction(str(cfg.safety_margin))


def _check_every_unit_fits(
    units: Sequence[UnitProfile], names: Sequence[str], budget_bytes: int, cfg: MemoryConfig
) -> None:
    needed = [unit.peak_bytes(cfg.min_batch_size) for unit in units]
    if max(needed) > effective_budget(budget_bytes, cfg):
        worst = names[needed.index(max(needed))]
        raise PlanError(worst, max(needed), budget_bytes, smallest_budget(units, cfg))


def _grow(
    units: Sequence[UnitProfile], names: Sequence[str], start: int, available: int, cfg: MemoryConfig
) -> tuple[int, str]:
    """Returns where the block that starts here stops, and why."""
    threshold = Fraction(str(cfg.join_threshold))
    reference = feasible_batch(units[start : start + 1], available, cfg.max_batch_size)
    for stop in range(start + 1, len(units)):
        alone = feasible_batch(units[stop : stop + 1], available, cfg.max_batch_size)
        if abs(alone - reference) > threshold * reference:
            return stop, f"{names[stop]} takes batch {alone}, this block's first unit {reference}"
        joint = feasible_batch(units[start : stop + 1], available, cfg.max_batch_size)
        if joint < (1 - threshold) * reference or joint < cfg.min_batch_size:
            return stop, f"with {names[stop]} the batch would fall from {reference} to {max(joint, 0)}"
    return len(units), "the model ends"
