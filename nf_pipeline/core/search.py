"""Searches the ways to form units for the fastest one whose batches train well.

Every way (`nf_pipeline.core.proposals`) is partitioned under the budget on estimated bytes and priced with measured
seconds. The best is drafted anew from whole steps and verified, until the best is one that has been; where none of
the estimates holds all are drafted from whole steps. Where the user fixed the units nothing is estimated
or timed. Knows nothing of models and data. Entry: `search_plan`.
"""

import contextlib
import math
from collections.abc import Callable, Sequence

import torch

from nf_pipeline.core.caching import with_sources
from nf_pipeline.core.drafts import Draft, PlanJob, draft_plan, verify_draft
from nf_pipeline.core.head_choice import choose_heads, name_heads, relieve
from nf_pipeline.core.heads import AUTO_HEAD
from nf_pipeline.core.local_unit import even_spans
from nf_pipeline.core.objectives import looks_at_output
from nf_pipeline.core.partition import effective_budget, feasible_batch
from nf_pipeline.core.prediction import TimeModel
from nf_pipeline.core.proposals import WIDE_HEAD, Proposal, propose, propose_narrow, whole_network
from nf_pipeline.core.timing import Part, PartKey, StepTimer
from nf_pipeline.core.unused_settings import name_unused
from nf_pipeline.errors import ConfigError, PlanError
from nf_pipeline.plans import Candidate, StoreRates, UnitProfile, UnitSpan
from nf_pipeline.samples import InputSpec

ABOUT_EQUAL = 0.05
"""Plans whose predicted times differ by less are equally fast: the one with the fewest units is taken."""

ABOUT_LARGEST = 0.1
"""Batches that are smaller than the largest one by at most this part are as fast."""

LARGE_ENOUGH = 0.75
"""Where no plan reaches good batches, those train well whose smallest is this part of the largest smallest one."""

ESTIMATE_ERROR = 0.2
"""Part by which an estimated batch may be off, about."""

Progress = Callable[[int, int], None]
Survey = Callable[[Sequence[UnitSpan]], tuple[UnitProfile, ...]]


def search_plan(
    job: PlanJob, rates: StoreRates | None, on_progress: Progress | None
) -> tuple[Draft, tuple[Candidate, ...]]:
    """Returns the draft to go by, and all that were compared; nothing is compared where the user fixed the units.

    Args:
        rates: of the run's store; without them nothing is computed again unless `storage.cache` says so.
        on_progress: called after each draft with the number of drafts done and of all, or of units where they are
            fixed.

    Raises:
        PlanError: none fits; of all errors the one that is content with the smallest budget.
        ConfigError: none can be built or predicted.
    """
    draft, candidates = _search(job, rates, on_progress)
    if _chooses_heads(job):
        draft = name_heads(draft)
    return name_unused(job.cfg.train, draft), candidates


def _search(
    job: PlanJob, rates: StoreRates | None, on_progress: Progress | None
) -> tuple[Draft, tuple[Candidate, ...]]:
    train = job.cfg.train
    if train.unit_layers is not None:
        (fixed,) = propose(train, job.num_layers, job.memory.max_batch_size, _fitting(job))
        if _chooses_heads(job):
            fixed = relieve(job, choose_heads(job, fixed, job.estimate), job.profile)
        draft = draft_plan(job, fixed, job.profile(fixed.spans, on_progress))
        return with_sources(job, verify_draft(job, draft), None, None), ()
    times = _time_model(job)
    if not job.is_exhaustive and (unbeaten := _unbeaten(job)):
        with contextlib.suppress(PlanError):
            return _settle(job, [unbeaten], times, rates)
    proposals = _proposals(job)
    # Estimates are not what a budget is refused for.
    with contextlib.suppress(PlanError):
        if estimated := _estimated(job, proposals, on_progress):
            return _settle(job, estimated, times, rates)
    return _settle(job, _draft_all(job, proposals, job.profile, on_progress), times, rates)


def _chooses_heads(job: PlanJob) -> bool:
    return job.cfg.train.head == AUTO_HEAD


def _proposals(job: PlanJob) -> list[Proposal]:
    train, fits = job.cfg.train, _fitting(job)
    proposals = propose(train, job.num_layers, job.memory.max_batch_size, fits)
    if train.local != "block" and train.head == WIDE_HEAD:
        good = min(job.memory.good_batch_size, job.memory.max_batch_size)
        proposals += propose_narrow(job.num_layers, lambda span: fits(span, good))
    return proposals


def _estimated(job: PlanJob, proposals: Sequence[Proposal], on_progress: Progress | None) -> list[Draft]:
    """Returns drafts from estimates; none where the model cannot be looked at."""
    try:
        return _draft_all(job, proposals, job.estimate, on_progress)
    except ConfigError:
        return []


def _draft_all(
    job: PlanJob, proposals: Sequence[Proposal], survey: Survey, on_progress: Progress | None
) -> list[Draft]:
    """Puts every proposal under the budget and returns those that fit; the errors are `search_plan`'s."""
    drafts, errors = [], []
    for number, proposal in enumerate(proposals):
        try:
            if _chooses_heads(job):
                proposal = choose_heads(job, proposal, survey)
            drafts.append(draft_plan(job, proposal, survey(proposal.spans)))
        except (PlanError, ConfigError) as error:
            errors.append(error)
        if on_progress is not None:
            on_progress(number + 1, len(proposals))
    too_small = [error for error in errors if isinstance(error, PlanError)]
    if drafts:
        return drafts
    raise min(too_small, key=lambda error: error.smallest_budget_bytes) if too_small else errors[0]


def _settle(
    job: PlanJob, drafts: list[Draft], times: TimeModel, rates: StoreRates | None
) -> tuple[Draft, tuple[Candidate, ...]]:
    """Takes the draft that is still the best when its bytes are counted in whole steps.

    Raises:
        PlanError: none fits; of all errors the one that is content with the smallest budget.
        ConfigError: the best cannot be predicted or timed.
    """
    priced = [with_sources(job, draft, times, rates, is_final=False) for draft in drafts]
    verified: dict[Proposal, Draft] = {}
    errors = []
    while priced:
        chosen = _choose(priced, job)
        if chosen.proposal in verified:
            final = with_sources(job, verified[chosen.proposal], times, rates)
            return final, _candidates([final, *(draft for draft in priced if draft is not chosen)], job)
        position = priced.index(chosen)
        try:
            proposal = relieve(job, chosen.proposal, job.profile) if _chooses_heads(job) else chosen.proposal
            exact = verify_draft(job, draft_plan(job, proposal, job.profile(proposal.spans)))
        except PlanError as error:
            # Estimates leave out what holds for a moment only, and a GPU needs more than any profile says.
            errors.append(error)
            del priced[position]
        else:
            verified[proposal] = exact
            priced[position] = with_sources(job, exact, times, rates, is_final=False)
    raise min(errors, key=lambda error: error.smallest_budget_bytes)


def _unbeaten(job: PlanJob) -> Draft | None:
    """Returns plain backpropagation where it has about the largest batch; None where it has not, or is not wanted.

    Any other plan runs the same layers with a batch that is hardly larger, and heads, passes or shards on top.
    """
    if job.cfg.train.local == "layer" or job.cfg.train.mode == "pipelined":
        return None
    whole, enough = whole_network(job.num_layers), (1 - ABOUT_LARGEST) * job.memory.max_batch_size
    try:
        if draft_plan(job, whole, job.estimate(whole.spans)).smallest_batch < (1 - ESTIMATE_ERROR) * enough:
            return None
        draft = draft_plan(job, whole, job.profile(whole.spans))
    except (PlanError, ConfigError):
        return None
    return draft if draft.smallest_batch >= enough else None


def _fitting(job: PlanJob) -> Callable[[UnitSpan, int], bool]:
    """Returns a function that tells whether a unit alone trains with a batch on the smallest class of workers."""
    available = effective_budget(job.budgets[0], job.memory)

    def fits(span: UnitSpan, batch_size: int) -> bool:
        try:
            (profile,) = job.estimate([span])
        except ConfigError:
            return False  # no head goes on that layer
        return profile.peak_bytes(batch_size) <= available

    return fits


def _time_model(job: PlanJob) -> TimeModel:
    """Returns the times of this job's layers and heads, measured as they are asked for."""

    def make_part(key: PartKey) -> Part:
        return Part(
            module=_module(job, key),
            inputs=_inputs(job, key),
            largest_batch=_largest_batch(job, key.layer),
            is_first=key.kind == "context" or key == PartKey("layer", 0),
        )

    # Layers, the run's heads and narrow ones; what else there may be.
    train = job.cfg.train
    num_kinds = 3 + looks_at_output(train.loss) + _chooses_heads(job) + (train.context != "none")
    timer = StepTimer(make_part, num_kinds * job.num_layers, train=train, device=job.device)
    return TimeModel(job.cfg, timer, job.num_layers, job.split_rows)


def _module(job: PlanJob, key: PartKey) -> torch.nn.Module:
    if key.kind == "layer":
        return job.cut_model.layers[key.layer]
    if key.kind == "context":
        return job.context(key.layer)
    (unit,) = job.units([UnitSpan(key.layer, key.layer + 1, head=key.head)])
    return unit.head if key.kind == "head" else unit.objective.on_output


def _inputs(job: PlanJob, key: PartKey) -> InputSpec:
    if key.kind == "context":
        return job.inputs
    return job.ends[key.layer if key.kind == "layer" else key.layer + 1]


def _largest_batch(job: PlanJob, layer: int) -> int:
    """Returns the batch with which a layer alone fits; the largest where no head goes on it: it is no map."""
    try:
        alone = job.estimate(even_spans(job.num_layers, 1)[layer : layer + 1])
    except ConfigError:
        return job.memory.max_batch_size
    return feasible_batch(alone, effective_budget(job.budgets[0], job.memory), job.memory.max_batch_size)


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
        name=draft.proposal.name,
        num_units=len(draft.units),
        batch_sizes=tuple(block.batch_size for block in draft.blocks),
        predicted_peak_bytes=max(block.predicted_peak_bytes for block in draft.blocks),
        predicted_s=draft.predicted_s,
        verdict=verdict,
    )
