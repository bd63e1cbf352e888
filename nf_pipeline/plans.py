"""What was decided: layers, units, blocks, batch sizes and predicted bytes, as plain numbers.

A plan is made by the planner from a profile and a budget, stored as plan.json, and read by everybody else.
Knows nothing of torch.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from nf_pipeline.documents import read_fields
from nf_pipeline.samples import InputSpec, TargetSpec

_PREVIOUS = -2


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


class UnitSpan(NamedTuple):
    """Which layers train together by backpropagation.

    Attributes:
        start, stop: half-open range of layers.
        segment_layers: activation checkpointing in segments of so many layers; 0 for none.
        head: name of the unit's auxiliary head; "" is the run's.
    """

    start: int
    stop: int
    segment_layers: int = 0
    head: str = ""


@dataclass(frozen=True, kw_only=True)
class StoreRates:
    """What the run's store was measured to do, encoding and decoding included.

    Attributes:
        read_bytes_per_s, write_bytes_per_s: tensor bytes of shards, several at a time as training reads them.
        read_cpu_s_per_byte: CPU seconds of this machine that reading takes.
    """

    read_bytes_per_s: float
    write_bytes_per_s: float
    read_cpu_s_per_byte: float = 0.0


@dataclass(frozen=True, kw_only=True)
class UnitProfile:
    """Predicted device bytes of one training step of a unit, linear in the batch size b.

    peak(b) = bytes_per_sample * b + constant_bytes, resident bytes included.

    Attributes:
        unit_idx: 0-based position.
        start, stop, segment_layers, head: see `UnitSpan`.
        bytes_per_sample: slope.
        constant_bytes: intercept.
        resident_bytes: weights and optimiser state, which stay while other units of the block train.
        head_params: number of weights of the unit's head.
        head_flops: of one sample's forward pass through the head.
        context_params, context_flops: the same of what looks at the network's own sample before the layers; 0 where
            nothing does.
    """

    unit_idx: int
    start: int
    stop: int
    bytes_per_sample: int
    constant_bytes: int
    resident_bytes: int
    head_params: int
    head_flops: int
    segment_layers: int = 0
    head: str = ""
    context_params: int = 0
    context_flops: int = 0

    @property
    def span(self) -> UnitSpan:
        """The layers, how their activations are kept, and the head."""
        return UnitSpan(self.start, self.stop, self.segment_layers, self.head)

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
        predicted_s: seconds of training, caching and loading, from measured times; None where nothing was timed.
        shard_bytes: tensor bytes that the block's activations of all stored splits take; 0 if no block reads them.
        reason: why the block ends here and has this batch size.
        source_block: the block whose stored activations this one reads, -1 for the images: the one before unless
            told otherwise. What lies between is computed again from there, with every batch.
    """

    block_idx: int
    units: tuple[int, int]
    layers: tuple[int, int]
    batch_size: int
    budget_bytes: int
    predicted_peak_bytes: int
    shard_bytes: int
    reason: str
    source_block: int = _PREVIOUS
    predicted_s: float | None = None

    def __post_init__(self) -> None:
        """Fills in the block before, also where a plan of an earlier version does not say."""
        if self.source_block == _PREVIOUS:
            object.__setattr__(self, "source_block", self.block_idx - 1)

    @property
    def recomputed(self) -> range:
        """The blocks between its source and this one, whose layers run on every batch that it reads."""
        return range(self.source_block + 1, self.block_idx)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A plan that was considered.

    Attributes:
        name: how its units were formed.
        num_units: heads, the model's own classifier included; 1 is plain backpropagation.
        batch_sizes: per block.
        predicted_peak_bytes: of the block that takes the most.
        predicted_s: seconds of training all blocks, of caching and of loading, from measured times.
        verdict: why it was taken, or not.
    """

    name: str
    num_units: int
    batch_sizes: tuple[int, ...]
    predicted_peak_bytes: int
    predicted_s: float
    verdict: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The whole decision.

    Attributes:
        model: resolved model name.
        inputs: what a stored sample is.
        target: what is predicted for it.
        budget_bytes: the user's dial, or the smallest class of workers that it was left to.
        layers, units, blocks: in order; units and blocks cover all layers without gaps.
        params_full: weights of the uncut model.
        flops_full: of one sample's forward pass through the uncut model.
        profile_s: seconds that profiling took.
        device: "cpu" or "cuda", on which it was profiled and is to be trained.
        predicted_s: of all blocks, of the slowest one where they train at the same time; None if nothing was timed.
        candidates: the plans that were compared, fastest first; none where the user fixed the units.
    """

    model: str
    inputs: InputSpec
    target: TargetSpec
    budget_bytes: int
    layers: tuple[LayerSpec, ...]
    units: tuple[UnitProfile, ...]
    blocks: tuple[BlockPlan, ...]
    params_full: int
    flops_full: int
    profile_s: float
    device: str = "auto"
    predicted_s: float | None = None
    candidates: tuple[Candidate, ...] = ()

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
        plan.inputs.check()
        plan.target.check()
        _check_cover("units", [(unit.start, unit.stop) for unit in plan.units], len(plan.layers))
        _check_cover("blocks", [block.units for block in plan.blocks], len(plan.units))
        for block_idx, block in enumerate(plan.blocks):
            first, last = plan.units[block.units[0]], plan.units[block.units[1] - 1]
            if block.layers != (first.start, last.stop):
                raise ValueError(f"blocks: layers {list(block.layers)} are not those of units {list(block.units)}")
            if not (block.block_idx == block_idx and -1 <= block.source_block < block_idx):
                got = f"block {block.block_idx} reading {block.source_block}"
                raise ValueError(f"source_block: got {got}, want block {block_idx} reading one before it, or -1")
        return plan

    @property
    def spans(self) -> tuple[UnitSpan, ...]:
        """The layers of every unit."""
        return tuple(unit.span for unit in self.units)

    def units_of(self, block: BlockPlan) -> tuple[UnitProfile, ...]:
        """Returns the units that a block trains, in order."""
        return self.units[block.units[0] : block.units[1]]

    def readers(self, block_idx: int) -> tuple[BlockPlan, ...]:
        """Returns the later blocks that read a block's stored activations, in order (-1: the images)."""
        return tuple(block for block in self.blocks if block.source_block == block_idx)

    def stores(self, block_idx: int) -> bool:
        """Whether a block stores its activations: whether some later block reads them."""
        return bool(self.readers(block_idx))


_SMALLEST = {
    **dict.fromkeys(("size", "shape", "out_shape", "batch_size", "budget_bytes"), 1),
    **dict.fromkeys(("mean", "std"), -math.inf),
    "constant_bytes": -(2**63),
    "source_block": -1,
}


def _check_cover(what: str, ranges: Sequence[tuple[int, int]], num_parts: int) -> None:
    starts, stops = [start for start, _ in ranges], [stop for _, stop in ranges]
    if [*starts, num_parts] != [0, *stops] or not all(start < stop for start, stop in ranges):
        raise ValueError(f"{what}: {[list(part) for part in ranges][:5]} do not cover {num_parts} parts in order")


def _check_numbers(value: Any, field: str = "plan") -> None:
    """Refuses what no size, count or position can be: below zero (but for a fitted line's intercept and the images as
    a source), beyond 63 bits, infinite."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, part in inner:
        _check_numbers(part, name if isinstance(name, str) else field)
    smallest = _SMALLEST.get(field, 0)
    if isinstance(value, int | float) and not smallest <= value < 2**63:
        raise ValueError(f"{field}: got {value}, want a number from {smallest} to 2**63 - 1")


def _with_budgets(document: Any) -> Any:
    """Plans of earlier versions have one budget for all blocks."""
    blocks = document.get("blocks") if isinstance(document, dict) else None
    if not isinstance(blocks, list) or not all(isinstance(block, dict) for block in blocks):
        return document  # which is refused where fields are checked
    whole = {"budget_bytes": document.get("budget_bytes")}
    return {**document, "blocks": [{**whole, **block} for block in blocks]}
