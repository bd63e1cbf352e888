"""Makes the plan: build the model, cut it, profile its units, partition them, verify every block.

Reads and writes nothing and trains nothing; needs the shape and the size of the data, not the data. Entry
function: `make_plan`.
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from nf_pipeline.config import MemoryConfig, RunConfig
from nf_pipeline.core.layers import CutModel, cut
from nf_pipeline.core.local_unit import LocalUnit, build_units, unit_ranges
from nf_pipeline.core.models import build_model, suggest_model
from nf_pipeline.core.partition import Group, budget_for, effective_budget, partition
from nf_pipeline.core.profiler import (
    Shape,
    StepProbe,
    count_params,
    forward_flops,
    probe_batch_sizes,
    profile_units,
)
from nf_pipeline.core.train_step import resolve_device
from nf_pipeline.errors import PlanError
from nf_pipeline.plan import BlockPlan, LayerSpec, Plan, UnitProfile
from nf_pipeline.units import format_bytes

logger = logging.getLogger(__name__)

_DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, kw_only=True)
class _Network:
    """The model cut and divided, and where each unit begins.

    `in_shapes[i]` is the shape of a sample at the input of layer i.
    """

    cut_model: CutModel
    units: list[LocalUnit]
    ranges: list[tuple[int, int]]
    in_shapes: list[Shape]
    device: torch.device


def make_plan(
    cfg: RunConfig, *, image_shape: tuple[int, int, int], num_classes: int, split_rows: dict[str, int]
) -> Plan:
    """Decides blocks and batch sizes for a model, a data set and a budget.

    Args:
        cfg: the run's configuration.
        image_shape: (C, H, W) of the stored images.
        num_classes: K.
        split_rows: samples per split; needs "train", and "val" where it is stored.

    Raises:
        PlanError: the budget is too small; names the layer and the smallest budget.
        ConfigError: the model cannot be built, cut or predicted.
    """
    name = cfg.model.name or suggest_model(image_shape, split_rows["train"])
    model = build_model(name, image_shape=image_shape, num_classes=num_classes, seed=cfg.train.seed)
    params_full = count_params(model)
    network = _divide(cut(model, image_shape), cfg, image_shape, num_classes)
    started = time.perf_counter()
    layers, flops_full = _describe_layers(network, image_shape)
    units = _profile(network, cfg)
    profile_s = time.perf_counter() - started
    groups = partition(units, cfg.memory.budget_bytes, cfg.memory, unit_names=_unit_names(network))
    logger.info("profiled %d units of %s in %.1f s: %d blocks", len(units), name, profile_s, len(groups))
    return Plan(
        model=name,
        num_classes=num_classes,
        image_shape=image_shape,
        budget_bytes=cfg.memory.budget_bytes,
        layers=layers,
        units=tuple(units),
        blocks=_plan_blocks(groups, network, units, cfg, split_rows),
        params_full=params_full,
        flops_full=flops_full,
        profile_s=profile_s,
    )


def verified_batch(
    batch_size: int,
    available_bytes: int,
    bytes_per_sample: int,
    cfg: MemoryConfig,
    peak_at: Callable[[int], int],
) -> tuple[int, int]:
    """Moves a batch from where the fitted lines put it to about the largest whose verified peak fits.

    Lines lie above a convex peak, so most often it grows a little, or stays.

    Args:
        batch_size: what the lines allow.
        available_bytes: the effective budget.
        bytes_per_sample: steepest line of the block.
        cfg: smallest and largest batch.
        peak_at: verified peak bytes by batch size.

    Returns:
        The batch and its peak. The peak is above `available_bytes` only if the smallest batch does not fit.
    """
    peak_bytes = peak_at(batch_size)
    while peak_bytes > available_bytes and batch_size > cfg.min_batch_size:
        proportional = batch_size * available_bytes // peak_bytes
        batch_size = max(cfg.min_batch_size, min(batch_size - 1, proportional))
        peak_bytes = peak_at(batch_size)
    slope = max(1, bytes_per_sample)
    while (growth := min((available_bytes - peak_bytes) // slope, cfg.max_batch_size - batch_size)) > 0:
        larger_peak = peak_at(batch_size + growth)
        if larger_peak > available_bytes:
            # Too steep here. Between two points of a convex peak the line that joins them lies above it.
            slope = max(slope + 1, -((peak_bytes - larger_peak) // growth))
        else:
            batch_size, peak_bytes = batch_size + growth, larger_peak
    return batch_size, peak_bytes


def _divide(cut_model: CutModel, cfg: RunConfig, image_shape: tuple[int, int, int], num_classes: int) -> _Network:
    train = cfg.train
    return _Network(
        cut_model=cut_model,
        units=build_units(cut_model, train.head, train.unit_layers, num_classes, train.seed),
        ranges=unit_ranges(len(cut_model.layers), train.unit_layers),
        in_shapes=[image_shape, *cut_model.out_shapes],
        device=resolve_device(train.device),
    )


def _describe_layers(network: _Network, image_shape: Shape) -> tuple[tuple[LayerSpec, ...], int]:
    """Returns the layers and the flops of the whole uncut model."""
    cut_model = network.cut_model
    flops = forward_flops([*cut_model.layers, cut_model.tail], image_shape)
    layers = tuple(
        LayerSpec(
            layer_idx=layer_idx,
            name=cut_model.names[layer_idx],
            out_shape=tuple(cut_model.out_shapes[layer_idx]),
            params=count_params(layer),
            flops=flops[layer_idx],
        )
        for layer_idx, layer in enumerate(cut_model.layers)
    )
    return layers, sum(flops)


def _profile(network: _Network, cfg: RunConfig) -> list[UnitProfile]:
    return profile_units(
        network.units,
        network.ranges,
        [network.in_shapes[start] for start, _ in network.ranges],
        train=cfg.train,
        device=network.device,
        batch_sizes=probe_batch_sizes(cfg.memory.min_batch_size, cfg.memory.max_batch_size),
    )


def _unit_names(network: _Network) -> list[str]:
    """Names a unit by its layers: "features.0" or "features.0..features.7"."""
    names = network.cut_model.names
    return [
        names[start] if stop - start == 1 else f"{names[start]}..{names[stop - 1]}" for start, stop in network.ranges
    ]


def _plan_blocks(
    groups: Sequence[Group],
    network: _Network,
    units: Sequence[UnitProfile],
    cfg: RunConfig,
    split_rows: dict[str, int],
) -> tuple[BlockPlan, ...]:
    blocks = []
    for block_idx, group in enumerate(groups):
        layers = (units[group.start].start, units[group.stop - 1].stop)
        batch_size, peak_bytes, reason = _verify(group, network, units, cfg)
        is_last = block_idx == len(groups) - 1
        blocks.append(
            BlockPlan(
                block_idx=block_idx,
                units=(group.start, group.stop),
                layers=layers,
                batch_size=batch_size,
                predicted_peak_bytes=peak_bytes,
                shard_bytes=0 if is_last else _stored_bytes(network.in_shapes[layers[1]], cfg, split_rows),
                reason=reason,
            )
        )
    return tuple(blocks)


def _verify(group: Group, network: _Network, units: Sequence[UnitProfile], cfg: RunConfig) -> tuple[int, int, str]:
    """Returns batch, peak and reason of a block, with the peak of the whole block's step at that batch."""
    memory = cfg.memory
    profiles = units[group.start : group.stop]
    available = effective_budget(memory.budget_bytes, memory)
    probe = StepProbe(
        network.units[group.start : group.stop],
        network.in_shapes[profiles[0].start],
        train=cfg.train,
        device=network.device,
    )
    slope = max(unit.bytes_per_sample for unit in profiles)
    batch_size, peak_bytes = verified_batch(group.batch_size, available, slope, memory, probe.peak_bytes)
    if peak_bytes > available:
        name = _unit_names(network)[group.start]
        raise PlanError(name, peak_bytes, memory.budget_bytes, budget_for(peak_bytes, memory))
    if batch_size == group.batch_size:
        return batch_size, peak_bytes, group.reason
    moved = f"batch {batch_size} instead of {group.batch_size} after verifying {format_bytes(peak_bytes)}"
    return batch_size, peak_bytes, f"{group.reason}; {moved}"


def _stored_bytes(out_shape: Shape, cfg: RunConfig, split_rows: dict[str, int]) -> int:
    rows = split_rows["train"] + split_rows.get("val", 0)
    return rows * math.prod(out_shape) * _DTYPE_BYTES[cfg.storage.dtype]
