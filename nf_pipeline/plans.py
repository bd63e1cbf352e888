"""What was decided: layers, units, blocks, batch sizes and predicted bytes, as plain numbers.

A plan is made by the planner from a profile and a budget, stored as plan.json, and read by everybody else.
Knows nothing of torch.
"""

from dataclasses import asdict, dataclass
from typing import Any


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
        """Reads what `to_json` returned (lists become tuples again)."""
        fields = {key: _as_tuple(value) for key, value in document.items()}
        fields["layers"] = tuple(LayerSpec(**_tuples(entry)) for entry in document["layers"])
        fields["units"] = tuple(UnitProfile(**_tuples(entry)) for entry in document["units"])
        whole = {"budget_bytes": document["budget_bytes"]}  # plans of earlier versions have one budget for all
        fields["blocks"] = tuple(BlockPlan(**{**whole, **_tuples(entry)}) for entry in document["blocks"])
        return cls(**fields)

    def units_of(self, block: BlockPlan) -> tuple[UnitProfile, ...]:
        """Returns the units that a block trains, in order."""
        return self.units[block.units[0] : block.units[1]]


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _tuples(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: _as_tuple(value) for key, value in entry.items()}
