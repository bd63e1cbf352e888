"""Makes the plan: build the model, cut it, price the ways to form units, partition into blocks, verify every block.

Every way (`nf_pipeline.core.proposals`) is partitioned under the budget on predicted bytes and priced with measured
seconds; the fastest whose batches train well is taken. Where the user fixes the units nothing is timed. Reads and
writes nothing and trains nothing; needs the shape and the size of the data, not the data. Entry: `make_plan`.
"""

import logging
import math
import time
from collections.abc import Callable, Sequence

import torch

from nf_pipeline.config import AUTO, MemoryConfig, RunConfig
from nf_pipeline.core.caching import with_sources
from nf_pipeline.core.drafts import Draft, PlanJob, draft_plan, verify_draft
from nf_pipeline.core.heads import check_head_name
from nf_pipeline.core.layers import CutModel, cut
from nf_pipeline.core.local_unit import even_spans
from nf_pipeline.core.memory import free_bytes, total_bytes
from nf_pipeline.core.models import build_model, suggest_model
from nf_pipeline.core.partition import effective_budget, feasible_batch
from nf_pipeline.core.prediction import TimeModel
from nf_pipeline.core.profiler import Shape, count_params, forward_flops, free_probes
from nf_pipeline.core.proposals import NARROW_HEAD, WIDE_HEAD, propose, propose_narrow, whole_network
from nf_pipeline.core.timing import Part, StepTimer
from nf_pipeline.core.train_step import resolve_device
from nf_pipeline.errors import ConfigError, PlanError
from nf_pipeline.plans import Candidate, LayerSpec, Plan, StoreRates, UnitSpan

logger = logging.getLogger(__name__)

ABOUT_EQUAL = 0.05
"""Plans whose predicted times differ by less are equally fast: the one with the fewest units is taken."""

ABOUT_LARGEST = 0.1
"""Batches that are smaller than the largest one by at most this part are as fast."""

LARGE_ENOUGH = 0.75
"""Where no plan reaches good batches, those train well whose smallest is this part of the largest smallest one."""

_CPU = torch.device("cpu")


def make_plan(
    cfg: RunConfig,
    *,
    image_shape: tuple[int, int, int],
    num_classes: int,
    split_rows: dict[str, int],
    worker_memory_bytes: Sequence[int] = (),
    rates: StoreRates | None = None,
    is_exhaustive: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Plan:
    """Decides units, blocks and batch sizes for a model, a data set and a budget.

    Args:
        cfg: the run's configuration.
        image_shape: (C, H, W) of the stored images.
        num_classes: K.
        split_rows: samples per split; needs "train", and "val" where it is stored. No batch is larger than the
            train split.
        worker_memory_bytes: what each class of workers may hold; read where the budget is "auto", when blocks are
            made for the smallest class, and layers that it cannot train for the next.
        rates: of the run's store; without them nothing is computed again unless `storage.cache` says so.
        is_exhaustive: compare all plans even where backpropagation has the largest batch, which none can beat.
        on_progress: called after each step of profiling with the number of steps done and of all.

    Raises:
        PlanError: the budget is too small; names the layer and the smallest budget.
        ConfigError: the model cannot be built, cut or predicted, the train split is smaller than the smallest
            batch, or the budget is "auto" and no worker says what it has.
    """
    _check_train_rows(split_rows["train"], cfg.memory)
    check_head_name(cfg.train.head)
    name = cfg.model.name or suggest_model(image_shape, split_rows["train"])
    model = build_model(name, image_shape=image_shape, num_classes=num_classes, seed=cfg.train.seed)
    params_full = count_params(model)
    cut_model, device = cut(model, image_shape), resolve_device(cfg.train.device)
    started = time.perf_counter()
    layers, flops_full = _describe_layers(cut_model, image_shape)
    memory, cap_name = _limit_batches(cfg.memory, split_rows["train"])
    job = PlanJob(
        cfg=cfg,
        memory=memory,
        budgets=_budgets(cfg.memory, worker_memory_bytes, device),
        cap_name=cap_name,
        cut_model=cut_model,
        in_shapes=(image_shape, *cut_model.out_shapes),
        num_classes=num_classes,
        split_rows=split_rows,
        device=device,
        is_exhaustive=is_exhaustive,
    )
    chosen, candidates = _search(job, rates, on_progress)
    free_probes(device)
    profile_s = time.perf_counter() - started
    logger.info("%s in %.1f s: %s, %d blocks", name, profile_s, chosen.name, len(chosen.blocks))
    return Plan(
        model=name,
        num_classes=num_classes,
        image_shape=image_shape,
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


def _describe_layers(cut_model: CutModel, image_shape: Shape) -> tuple[tuple[LayerSpec, ...], int]:
    """Returns the layers and the flops of the whole uncut model."""
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


def _search(
    job: PlanJob, rates: StoreRates | None, on_progress: Callable[[int, int], None] | None
) -> tuple[Draft, tuple[Candidate, ...]]:
    """Returns the draft to go by, and all that were compared. Where the user fixed the units nothing is timed."""
    drafts = _draft_all(job, on_progress)
    if job.cfg.train.unit_layers is not None:
        return with_sources(job, verify_draft(job, drafts[0]), None, None), ()
    times = _time_model(job)
    priced = [with_sources(job, draft, times, rates, is_final=False) for draft in drafts]
    while True:
        chosen = _choose(priced, job)
        try:
            verified = verify_draft(job, drafts[priced.index(chosen)])
        except PlanError:
            if len(priced) == 1:
                raise
            # A GPU needs more than the profiles say.
            drafts.pop(priced.index(chosen))
            priced.remove(chosen)
        else:
            final = with_sources(job, verified, times, rates)
            return final, _candidates([final, *(draft for draft in priced if draft is not chosen)], job)


def _draft_all(job: PlanJob, on_progress: Callable[[int, int], None] | None) -> list[Draft]:
    """Puts every proposal under the budget and returns those that fit.

    Raises:
        PlanError: none fits; of all errors the one that is content with the smallest budget.
        ConfigError: none can be built.
    """
    if not job.is_exhaustive and (unbeaten := _unbeaten(job)):
        return [unbeaten]
    fits = _fitting(job)
    proposals = propose(job.cfg.train, job.num_layers, job.memory.max_batch_size, fits)
    train, good = job.cfg.train, min(job.memory.good_batch_size, job.memory.max_batch_size)
    if train.unit_layers is None and train.local != "block" and train.head == WIDE_HEAD:
        proposals += propose_narrow(job.num_layers, lambda span: fits(span, good))
    drafts, errors = [], []
    for number, proposal in enumerate(proposals):
        try:
            # Where there is one proposal only, its units are the steps that are worth telling.
            drafts.append(draft_plan(job, proposal, on_progress if len(proposals) == 1 else None))
        except (PlanError, ConfigError) as error:
            errors.append(error)
        if on_progress is not None and len(proposals) > 1:
            on_progress(number + 1, len(proposals))
    too_small = [error for error in errors if isinstance(error, PlanError)]
    if drafts:
        return drafts
    raise min(too_small, key=lambda error: error.smallest_budget_bytes) if too_small else errors[0]


def _unbeaten(job: PlanJob) -> Draft | None:
    """Returns plain backpropagation where it has about the largest batch; None where it has not, or is not wanted.

    Any other plan runs the same layers with a batch that is hardly larger, and heads, passes or shards on top.
    """
    train = job.cfg.train
    if train.unit_layers is not None or train.local == "layer" or train.mode == "pipelined":
        return None
    try:
        draft = draft_plan(job, whole_network(job.num_layers))
    except PlanError:
        return None
    return draft if draft.smallest_batch >= (1 - ABOUT_LARGEST) * job.memory.max_batch_size else None


def _fitting(job: PlanJob) -> Callable[[UnitSpan, int], bool]:
    """Returns a function that tells whether a unit alone trains with a batch on the smallest class of workers.

    Asked on fake tensors on every device: what is proposed is verified on the real one.
    """
    available = effective_budget(job.budgets[0], job.memory)

    def fits(span: UnitSpan, batch_size: int) -> bool:
        try:
            (profile,) = job.profile([span], _CPU)
        except ConfigError:
            return False  # no head goes on that layer
        return profile.peak_bytes(batch_size) <= available

    return fits


def _time_model(job: PlanJob) -> TimeModel:
    """Returns the times of this job's layers and heads, measured as they are asked for."""
    single = even_spans(job.num_layers, 1)
    available = effective_budget(job.budgets[0], job.memory)
    largest = _largest_batches(job, single, available)

    def make_part(part_idx: int) -> Part:
        kind, layer = divmod(part_idx, job.num_layers)
        alone = UnitSpan(layer, layer + 1, head=NARROW_HEAD if kind == 2 else "")
        return Part(
            module=job.units([alone])[0].head if kind else job.cut_model.layers[layer],
            in_shape=job.in_shapes[layer + (kind > 0)],
            largest_batch=largest[layer],
            is_first=part_idx == 0,
        )

    timer = StepTimer(make_part, 3 * job.num_layers, train=job.cfg.train, device=job.device)
    return TimeModel(job.cfg, timer, job.num_layers, job.split_rows)


def _largest_batches(job: PlanJob, spans: Sequence[UnitSpan], available: int) -> list[int]:
    """Returns the batch with which each unit alone fits; the largest where no head goes on a layer: it is no map."""
    sizes = []
    for span in spans:
        try:
            sizes.append(feasible_batch(job.profile([span], _CPU), available, job.memory.max_batch_size))
        except ConfigError:
            sizes.append(job.memory.max_batch_size)
    return sizes


def _choose(drafts: Sequence[Draft], job: PlanJob) -> Draft:
    """Returns the fastest draft whose batches train well; of about equally fast ones that with the fewest units."""
    good = _good_batch(drafts, job)
    trained_well = [draft for draft in drafts if draft.smallest_batch >= good]
    fastest_s = min(draft.predicted_s for draft in trained_well)
    near = [draft for draft in trained_well if draft.predicted_s <= (1 + ABOUT_EQUAL) * fastest_s]
    return min(near, key=lambda draft: (len(draft.units), draft.predicted_s))


def _good_batch(drafts: Sequence[Draft], job: PlanJob) -> int:
    return min(job.memory.good_batch_size, math.ceil(LARGE_ENOUGH * max(draft.smallest_batch for draft in drafts)))


def _candidates(drafts: Sequence[Draft], job: PlanJob) -> tuple[Candidate, ...]:
    """Describes what was compared, the taken one first among the drafts, fastest first in the result."""
    good = _good_batch(drafts, job)
    ordered = sorted(drafts, key=lambda draft: draft.predicted_s)
    return tuple(_candidate(draft, drafts[0], good) for draft in ordered)


def _candidate(draft: Draft, chosen: Draft, good: int) -> Candidate:
    if draft is chosen:
        verdict = "taken"
    elif draft.smallest_batch < good:
        verdict = f"batch {draft.smallest_batch} is below {good}"
    else:
        verdict = f"{draft.predicted_s / chosen.predicted_s:.2f} times as long"
    return Candidate(
        name=draft.name,
        num_units=len(draft.units),
        batch_sizes=tuple(block.batch_size for block in draft.blocks),
        predicted_peak_bytes=max(block.predicted_peak_bytes for block in draft.blocks),
        predicted_s=draft.predicted_s,
        verdict=verdict,
    )
