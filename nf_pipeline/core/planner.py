"""Makes the plan: build the model, cut it, profile its units, partition them, verify every block.

Reads and writes nothing and trains nothing; needs the shape and the size of the data, not the data. Entry
function: `make_plan`.
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from nf_pipeline.config import AUTO, MemoryConfig, RunConfig, TrainConfig
from nf_pipeline.core.layers import CutModel, cut
from nf_pipeline.core.local_unit import LocalUnit, build_units, unit_ranges
from nf_pipeline.core.memory import free_bytes, total_bytes
from nf_pipeline.core.models import build_model, suggest_model
from nf_pipeline.core.partition import (
    Group,
    assign_budgets,
    budget_for,
    effective_budget,
    limit_batch,
    partition,
    smallest_budget,
)
from nf_pipeline.core.profiler import (
    Shape,
    StepProbe,
    count_params,
    forward_flops,
    free_probes,
    probe_batch_sizes,
    profile_units,
)
from nf_pipeline.core.train_step import resolve_device
from nf_pipeline.dtypes import ITEM_BYTES
from nf_pipeline.errors import ConfigError, PlanError
from nf_pipeline.plans import BlockPlan, LayerSpec, Plan, UnitProfile
from nf_pipeline.units import format_bytes

logger = logging.getLogger(__name__)


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

    @property
    def unit_names(self) -> list[str]:
        """Names a unit by its layers: "features.0" or "features.0..features.7"."""
        names = self.cut_model.names
        return [
            names[start] if stop - start == 1 else f"{names[start]}..{names[stop - 1]}" for start, stop in self.ranges
        ]


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What every block of a plan is decided from.

    `memory` is what the run really has: its batches end at the train split. `budgets` are bytes per class of workers,
    ascending, none above the device's memory; a budget that the user gave is the only class.
    """

    cfg: RunConfig
    memory: MemoryConfig
    budgets: tuple[int, ...]
    cap_name: str
    network: _Network
    units: list[UnitProfile]


def make_plan(
    cfg: RunConfig,
    *,
    image_shape: tuple[int, int, int],
    num_classes: int,
    split_rows: dict[str, int],
    worker_memory_bytes: Sequence[int] = (),
    on_progress: Callable[[int, int], None] | None = None,
) -> Plan:
    """Decides blocks and batch sizes for a model, a data set and a budget.

    Args:
        cfg: the run's configuration.
        image_shape: (C, H, W) of the stored images.
        num_classes: K.
        split_rows: samples per split; needs "train", and "val" where it is stored. No batch is larger than the
            train split.
        worker_memory_bytes: what each class of workers may hold; read where the budget is "auto", when blocks are
            made for the smallest class, and layers that it cannot train for the next.
        on_progress: called after each profiled unit with the number of units done and of all.

    Raises:
        PlanError: the budget is too small; names the layer and the smallest budget.
        ConfigError: the model cannot be built, cut or predicted, the train split is smaller than the smallest
            batch, or the budget is "auto" and no worker says what it has.
    """
    _check_train_rows(split_rows["train"], cfg.memory)
    name = cfg.model.name or suggest_model(image_shape, split_rows["train"])
    model = build_model(name, image_shape=image_shape, num_classes=num_classes, seed=cfg.train.seed)
    params_full = count_params(model)
    network = _divide(cut(model, image_shape), cfg, image_shape, num_classes)
    started = time.perf_counter()
    layers, flops_full = _describe_layers(network, image_shape)
    budgets = _budgets(cfg.memory, worker_memory_bytes, network.device)
    memory, cap_name = _limit_batches(cfg.memory, split_rows["train"])
    units = _profile(network, cfg.train, memory, on_progress)
    profile_s = time.perf_counter() - started
    job = _Job(cfg=cfg, memory=memory, budgets=budgets, cap_name=cap_name, network=network, units=units)
    blocks = _plan_blocks(job, split_rows)
    free_probes(network.device)
    logger.info("profiled %d units of %s in %.1f s: %d blocks", len(units), name, profile_s, len(blocks))
    return Plan(
        model=name,
        num_classes=num_classes,
        image_shape=image_shape,
        budget_bytes=budgets[0] if cfg.memory.budget_bytes == AUTO else cfg.memory.budget_bytes,
        layers=layers,
        units=tuple(units),
        blocks=blocks,
        params_full=params_full,
        flops_full=flops_full,
        profile_s=profile_s,
        device=network.device.type,
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


def _check_train_rows(train_rows: int, cfg: MemoryConfig) -> None:
    if train_rows < cfg.min_batch_size:
        raise ConfigError(
            f"train split: got {train_rows} images, want at least memory.min_batch_size ({cfg.min_batch_size})",
            "add training images, or lower memory.min_batch_size (2 or more)",
        )


def _limit_batches(cfg: MemoryConfig, train_rows: int) -> tuple[MemoryConfig, str]:
    """Returns limits no larger than the train split, and the name of the largest batch."""
    cap_name = "the whole train split" if train_rows < cfg.max_batch_size else "memory.max_batch_size"
    return cfg.model_copy(update={"max_batch_size": min(cfg.max_batch_size, train_rows)}), cap_name


def _budgets(cfg: MemoryConfig, worker_memory_bytes: Sequence[int], device: torch.device) -> tuple[int, ...]:
    """Returns the classes of workers, ascending: what the user gave, what workers say, or what this device has."""
    device_bytes = total_bytes(device)
    if cfg.budget_bytes != AUTO:
        return (min(cfg.budget_bytes, device_bytes or cfg.budget_bytes),)
    if worker_memory_bytes:
        return tuple(sorted(set(worker_memory_bytes)))
    if device_bytes:
        return (free_bytes(device),)
    raise ConfigError(
        "memory.budget_bytes is auto, but no worker says how much memory training may hold",
        "--memory-budget 300MiB, or start workers with: ray start ... $(nf-pipeline worker-resources)",
    )


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


def _profile(
    network: _Network,
    train: TrainConfig,
    memory: MemoryConfig,
    on_progress: Callable[[int, int], None] | None,
) -> list[UnitProfile]:
    return profile_units(
        network.units,
        network.ranges,
        [network.in_shapes[start] for start, _ in network.ranges],
        train=train,
        device=network.device,
        batch_sizes=probe_batch_sizes(memory.min_batch_size, memory.max_batch_size),
        on_progress=on_progress,
    )


def _plan_blocks(job: _Job, split_rows: dict[str, int]) -> tuple[BlockPlan, ...]:
    groups = [
        (*verified, budget)
        for start, stop, budget in assign_budgets(job.units, job.network.unit_names, job.budgets, job.memory)
        for verified in _verified_groups(job, start, stop, budget)
    ]
    blocks = []
    for block_idx, (group, peak_bytes, budget) in enumerate(groups):
        layers = (job.units[group.start].start, job.units[group.stop - 1].stop)
        stored_bytes = _stored_bytes(job.network.in_shapes[layers[1]], job.cfg, split_rows)
        blocks.append(
            BlockPlan(
                block_idx=block_idx,
                units=(group.start, group.stop),
                layers=layers,
                batch_size=group.batch_size,
                budget_bytes=budget,
                predicted_peak_bytes=peak_bytes,
                shard_bytes=0 if block_idx == len(groups) - 1 else stored_bytes,
                reason=group.reason,
            )
        )
    return tuple(blocks)


def _verified_groups(job: _Job, start: int, stop: int, budget: int) -> list[tuple[Group, int]]:
    """Partitions a range of units under one budget and returns the blocks with their verified peaks.

    A block that takes more than its units' profiles add up to, even with the smallest batch, is taken apart
    from its end. Every unit alone was found to fit, so the budget suffices.
    """
    names = job.network.unit_names
    groups = partition(job.units[start:stop], budget, job.memory, unit_names=names[start:stop], cap_name=job.cap_name)
    available = effective_budget(budget, job.memory)
    pending = [replace(group, start=start + group.start, stop=start + group.stop) for group in reversed(groups)]
    verified = []
    while pending:
        group = pending.pop()
        moved, peak_bytes = _verify(group, available, job)
        if peak_bytes <= available:
            verified.append((moved, peak_bytes))
        elif group.stop - group.start > 1:
            reason = (
                f"with {names[group.stop - 1]} it takes {format_bytes(peak_bytes)} even at batch {moved.batch_size}"
            )
            pending.append(_regroup(group.stop - 1, group.stop, group.reason, available, job))
            pending.append(_regroup(group.start, group.stop - 1, reason, available, job))
        else:
            # Only measurements on a GPU can differ from the profile of the same unit.
            smallest = max(budget_for(peak_bytes, job.memory), smallest_budget(job.units, job.memory))
            raise PlanError(names[group.start], peak_bytes, budget, smallest)
    return verified


def _regroup(start: int, stop: int, reason: str, available: int, job: _Job) -> Group:
    """Makes a block of part of another one's units."""
    units, names = job.units[start:stop], job.network.unit_names[start:stop]
    batch_size, limit = limit_batch(units, names, available, job.memory, job.cap_name)
    return Group(start=start, stop=stop, batch_size=batch_size, reason=f"{reason.partition('; ')[0]}; {limit}")


def _verify(group: Group, available: int, job: _Job) -> tuple[Group, int]:
    """Returns a block with its batch moved, and the peak of the whole block's step at that batch."""
    profiles = job.units[group.start : group.stop]
    probe = StepProbe(
        job.network.units[group.start : group.stop],
        job.network.in_shapes[profiles[0].start],
        train=job.cfg.train,
        device=job.network.device,
    )
    slope = max(unit.bytes_per_sample for unit in profiles)
    batch_size, peak_bytes = verified_batch(group.batch_size, available, slope, job.memory, probe.peak_bytes)
    if batch_size == group.batch_size:
        return group, peak_bytes
    moved = f"batch {batch_size} instead of {group.batch_size} after verifying {format_bytes(peak_bytes)}"
    return replace(group, batch_size=batch_size, reason=f"{group.reason}; {moved}"), peak_bytes


def _stored_bytes(out_shape: Shape, cfg: RunConfig, split_rows: dict[str, int]) -> int:
    rows = split_rows["train"] + split_rows.get("val", 0)
    return rows * math.prod(out_shape) * ITEM_BYTES[cfg.storage.dtype]
