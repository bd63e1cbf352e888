"""What was decided: layers, units, blocks, batch sizes and predicted bytes, as plain numbers.

A plan is made by the planner from a profile and a budget, stored as plan.json, and read by everybody else.
Knows nothing of torch.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nf_pipeline.documents import read_fields


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """One layer of the cut model.

    Attributes:
        layer_idx: 0-based position.
        name: path of its first module with weights in the uncut model, such as "features.0".
        out_shape: (C, H, W) of one sample's output; a vector (F,) is possible after the features.
        params: number of weights.
        flops: multiply-adds x 2 of one sample's forward pass.
    """

    layer_idx: int
    name: str
    out_shape: tuple[int, ...]
    params: int
    flops: int


@dataclass(frozen=True, kw_only=True)
class UnitProfile:
    """Predicted device bytes of one training step of a unit, linear in the batch size b.

    peak(b) = bytes_per_sample * b + constant_bytes, resident bytes included.

    Attributes:
        unit_idx: 0-based position.
        start, stop: half-open range of layers.
        bytes_per_sample: slope.
        constant_bytes: intercept.
        resident_bytes: weights and optimiser state, which stay while other units of the block train.
        head_params: number of weights of the unit's head.
        head_flops: of one sample's forward pass through the head.
    """

    unit_idx: int
    start: int
    stop: int
    bytes_per_sample: int
    constant_bytes: int
    resident_bytes: int
    head_params: int
    head_flops: int

    def peak_bytes(self, batch_size: int) -> int:
        """Returns the predicted peak of this unit alone at a batch size."""
        return self.bytes_per_sample * batch_size + self.constant_bytes


@dataclass(frozen=True, kw_only=True)
class BlockPlan:
    """Units that are trained together by one worker task.

    Attributes:
        block_idx: 0-based position.
        units: half-open range of units.
        layers: half-open range of layers.
        batch_size: samples per training step and worker.
        budget_bytes: what a worker of this block may hold; more than the plan's where only larger workers do.
        predicted_peak_bytes: of the block's training step at that batch size.
        shard_bytes: tensor bytes that the block's activations of all stored splits take; 0 for the last block.
        reason: why the block ends here and has this batch size.
    """

    block_idx: int
    units: tuple[int, int]
    layers: tuple[int, int]
    batch_size: int
    budget_bytes: int
    predicted_peak_bytes: int
    shard_bytes: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The whole decision.

    Attributes:
        model: resolved model name.
        num_classes: K.
        image_shape: (C, H, W) of the stored images.
        budget_bytes: the user's dial, or the smallest class of workers that it was left to.
        layers, units, blocks: in order; units and blocks cover all layers without gaps.
        params_full: weights of the uncut model.
        flops_full: of one sample's forward pass through the uncut model.
        profile_s: seconds that profiling took.
        device: "cpu" or "cuda", on which it was profiled and is to be trained.
    """

    model: str
    num_classes: int
    image_shape: tuple[int, int, int]
    budget_bytes: int
    layers: tuple[LayerSpec, ...]
    units: tuple[UnitProfile, ...]
    blocks: tuple[BlockPlan, ...]
    params_full: int
    flops_full: int
    profile_s: float
    device: str = "auto"

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON document that `from_json` reads back."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> "Plan":
        """Reads what `to_json` returned (lists become tuples again).

        Raises:
            ValueError: a field is missing or of another type, or units and blocks do not cover the layers in order.
        """
        plan = read_fields(cls, _with_budgets(document))
        _check_numbers(document)
        _check_cover("units", [(unit.start, unit.stop) for unit in plan.units], len(plan.layers))
        _check_cover("blocks", [block.units for block in plan.blocks], len(plan.units))
        for block in plan.blocks:
            first, last = plan.units[block.units[0]], plan.units[block.units[1] - 1]
            if block.layers != (first.start, last.stop):
                raise ValueError(f"blocks: layers {list(block.layers)} are not those of units {list(block.units)}")
        return plan

    def units_of(self, block: BlockPlan) -> tuple[UnitProfile, ...]:
        """Returns the units that a block trains, in order."""
        return self.units[block.units[0] : block.units[1]]


_POSITIVE = ("num_classes", "image_shape", "out_shape", "batch_size", "budget_bytes")


def _check_cover(what: str, ranges: Sequence[tuple[int, int]], num_parts: int) -> None:
    starts, stops = [start for start, _ in ranges], [stop for _, stop in ranges]
    if [*starts, num_parts] != [0, *stops] or not all(start < stop for start, stop in ranges):
        raise ValueError(f"{what}: {[list(part) for part in ranges][:5]} do not cover {num_parts} parts in order")


def _check_numbers(value: Any, field: str = "plan") -> None:
    """Refuses what no size, count or position can be: below zero (of a fitted line only the intercept may), beyond 63
    bits, infinite."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, part in inner:
        _check_numbers(part, name if isinstance(name, str) else field)
    smallest = -(2**63) if field == "constant_bytes" else int(field in _POSITIVE)
    if isinstance(value, int | float) and not smallest <= value < 2**63:
        raise ValueError(f"{field}: got {value}, want a number from {smallest} to 2**63 - 1")


def _with_budgets(document: Any) -> Any:
    """Plans of earlier versions have one budget for all blocks."""
    blocks = document.get("blocks") if isinstance(document, dict) else None
    if not isinstance(blocks, list) or not all(isinstance(block, dict) for block in blocks):
        return document  # which is refused where fields are checked
    whole = {"budget_bytes": document.get("budget_bytes")}
    return {**document, "blocks": [{**whole, **block} for block in blocks]}
