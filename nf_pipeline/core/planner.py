"""Makes the plan: build the model, cut it, and search for the fastest way to train it under the budget.

Reads and writes nothing and trains nothing; needs the shape and the size of the data, not the data. How plans are
compared is for `nf_pipeline.core.search`. Entry: `make_plan`.
"""

import logging
import time
from collections.abc import Callable, Sequence

import torch

from nf_pipeline.config import AUTO, MemoryConfig, RunConfig
from nf_pipeline.core.context import check_context, check_sample_stays, needs_samples
from nf_pipeline.core.drafts import PlanJob
from nf_pipeline.core.early_exits import check_exits
from nf_pipeline.core.heads import AUTO_HEAD, check_head_name
from nf_pipeline.core.layers import CutModel, cut
from nf_pipeline.core.memory import free_bytes, total_bytes
from nf_pipeline.core.models import build_model, suggest_model
from nf_pipeline.core.objectives import check_objective
from nf_pipeline.core.profiler import count_params, forward_flops, free_probes
from nf_pipeline.core.sample_changes import check_changes
from nf_pipeline.core.search import search_plan
from nf_pipeline.core.train_step import resolve_device
from nf_pipeline.errors import ConfigError
from nf_pipeline.plans import LayerSpec, Plan, StoreRates
from nf_pipeline.samples import InputSpec, TargetSpec

logger = logging.getLogger(__name__)


def make_plan(
    cfg: RunConfig,
    *,
    inputs: InputSpec,
    target: TargetSpec,
    split_rows: dict[str, int],
    worker_memory_bytes: Sequence[int] = (),
    rates: StoreRates | None = None,
    change_s: float = 0.0,
    is_exhaustive: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Plan:
    """Decides units, blocks and batch sizes for a model, a data set and a budget.

    Args:
        cfg: the run's configuration.
        inputs: what a stored sample is.
        target: what is to be predicted.
        split_rows: samples per split; needs "train", and "val" where it is stored. No batch is larger than the
            train split.
        worker_memory_bytes: what each class of workers may hold; read where the budget is "auto", when blocks are
            made for the smallest class, and layers that it cannot train for the next.
        rates: of the run's store; without them nothing is computed again unless `storage.cache` says so.
        change_s: seconds that a sample's random changes take one thread.
        is_exhaustive: compare all plans even where backpropagation has the largest batch, which none can beat.
        on_progress: called after each step of profiling with the number of steps done and of all.

    Raises:
        PlanError: the budget is too small; names the layer and the smallest budget.
        ConfigError: the model cannot be built, cut or predicted, samples cannot be changed or trained for as the
            configuration says, the train split is smaller than the smallest batch, or the budget is "auto" and no
            worker says what it has.
    """
    _check_train_rows(split_rows["train"], cfg.memory)
    check_objective(cfg.train, target, inputs)
    check_changes(cfg.train, inputs)
    check_context(cfg.train, inputs)
    check_exits(cfg.exits, target)
    if cfg.train.head != AUTO_HEAD:
        check_head_name(cfg.train.head)
    name = cfg.model.name or suggest_model(inputs, split_rows["train"])
    model = build_model(name, inputs=inputs, num_outputs=target.size, seed=cfg.train.seed)
    params_full = count_params(model)
    cut_model, device = cut(model, inputs), resolve_device(cfg.train.device)
    if needs_samples(cfg.train):
        check_sample_stays(cut_model)
    started = time.perf_counter()
    layers, flops_full = _describe_layers(cut_model, inputs)
    memory, cap_name = _limit_batches(cfg.memory, split_rows["train"])
    job = PlanJob(
        cfg=cfg,
        memory=memory,
        budgets=_budgets(cfg.memory, worker_memory_bytes, device),
        cap_name=cap_name,
        cut_model=cut_model,
        inputs=inputs,
        target=target,
        split_rows=split_rows,
        device=device,
        is_exhaustive=is_exhaustive,
        change_s=change_s,
    )
    chosen, candidates = search_plan(job, rates, on_progress)
    free_probes(device)
    profile_s = time.perf_counter() - started
    logger.info("%s in %.1f s: %s, %d blocks", name, profile_s, chosen.proposal.name, len(chosen.blocks))
    return Plan(
        model=name,
        inputs=inputs,
        target=target,
        budget_bytes=job.budgets[0] if cfg.memory.budget_bytes == AUTO else cfg.memory.budget_bytes,
        layers=layers,
        units=chosen.units,
        blocks=chosen.blocks,
        params_full=params_full,
        flops_full=flops_full,
        profile_s=profile_s,
        device=device.type,
        predicted_s=chosen.predicted_s if candidates else None,
        candidates=candidates,
    )


def _check_train_rows(train_rows: int, cfg: MemoryConfig) -> None:
    if train_rows < cfg.min_batch_size:
        raise ConfigError(
            f"train split: got {train_rows} samples, want at least memory.min_batch_size ({cfg.min_batch_size})",
            "add training samples, or lower memory.min_batch_size (2 or more)",
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


def _describe_layers(cut_model: CutModel, inputs: InputSpec) -> tuple[tuple[LayerSpec, ...], int]:
    """Returns the layers and the flops of the whole uncut model."""
    flops = forward_flops([*cut_model.layers, cut_model.tail], inputs)
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
