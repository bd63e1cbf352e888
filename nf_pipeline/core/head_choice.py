"""Names the head of every unit, where the user leaves it to the planner (`train.head` auto).

Every unit begins with the strongest head of `STRENGTH`. Those give way with which a unit alone reaches no good batch,
then, in blocks whose batch is below that, one after the other those whose block saves the most. What gave way in vain
is taken back: no head is weaker than its block's batch needs. Which ways to form units are compared, and which is
taken, is for the search. Entries: `choose_heads`, `relieve`.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from nf_pipeline.core.drafts import Draft, PlanJob, added_up, draft_plan
from nf_pipeline.core.heads import STRENGTH
from nf_pipeline.core.partition import effective_budget
from nf_pipeline.core.proposals import Proposal
from nf_pipeline.errors import PlanError
from nf_pipeline.plans import BlockPlan, UnitProfile, UnitSpan

Survey = Callable[[Sequence[UnitSpan]], tuple[UnitProfile, ...]]


def choose_heads(job: PlanJob, proposal: Proposal, survey: Survey) -> Proposal:
    """Returns a proposal with a named head for every unit but the last, which has the model's own.

    Args:
        job: memory and budgets are read; units are to fit the smallest class of workers.
        proposal: its units name no heads.
        survey: `job.estimate` or `job.profile`.

    Raises:
        ConfigError: a unit cannot be built or predicted.
    """
    *inner, last = proposal.spans
    spans = (*(span._replace(head=STRENGTH[0]) for span in inner), last)
    name = f"{proposal.name}, heads as they fit" if inner else proposal.name
    return relieve(job, Proposal(name=name, spans=spans), survey)


def relieve(job: PlanJob, proposal: Proposal, survey: Survey) -> Proposal:
    """Weakens heads until all blocks have good batches, or nothing more helps; takes back what was not needed.

    What fits no worker even so is returned as it is: it is for whoever takes it to say so.

    Raises:
        ConfigError: as `choose_heads`.
    """
    while changed := _all_too_large(job, proposal, survey) or _most_saving(job, proposal, survey):
        proposal = changed
    while changed := _strengthened(job, proposal, survey):
        proposal = changed
    return proposal


def name_heads(draft: Draft) -> Draft:
    """Returns a draft whose blocks say which heads they train with."""
    blocks = []
    for block in draft.blocks:
        names = [unit.head or "the model's own" for unit in draft.units[slice(*block.units)]]
        runs = [(name, len(list(run))) for name, run in itertools.groupby(names)]
        heads = ", ".join(name if count == 1 else f"{count} x {name}" for name, count in runs)
        blocks.append(replace(block, reason=f"{block.reason}; heads: {heads}"))
    return replace(draft, blocks=tuple(blocks))


def _all_too_large(job: PlanJob, proposal: Proposal, survey: Survey) -> Proposal | None:
    """Gives all units that reach no good batch alone the next weaker head; None where none could have one."""
    available, good = effective_budget(job.budgets[0], job.memory), _good_batch(job)
    changed = proposal
    for unit in survey(proposal.spans):
        if unit.peak_bytes(good) > available and (heads := _weaker(unit)):
            changed = _with_head(changed, unit.unit_idx, heads[0])
    return changed if changed != proposal else None


def _most_saving(job: PlanJob, proposal: Proposal, survey: Survey) -> Proposal | None:
    """Weakens the head that saves its block, which has no good batch, the most bytes; None where none saves any."""
    if (draft := _drafted(job, proposal, survey)) is None:
        return None
    savings = dict(_savings(job, draft, survey))
    if not savings:
        return None
    position, head = max(savings, key=lambda change: savings[change])
    return _with_head(proposal, position, head)


def _savings(job: PlanJob, draft: Draft, survey: Survey) -> Iterator[tuple[tuple[int, str], int]]:
    """Yields units of blocks without a good batch, each with the next weaker head that saves its block bytes."""
    for block in draft.blocks:
        for unit in draft.units[slice(*block.units)] if block.batch_size < _good_batch(job) else ():
            for head in _weaker(unit):
                if (saved := _saved(job, draft, block, (unit, head), survey)) > 0:
                    yield (unit.unit_idx, head), saved
                    break


def _saved(job: PlanJob, draft: Draft, block: BlockPlan, change: tuple[UnitProfile, str], survey: Survey) -> int:
    """Returns the bytes that a block's step at a good batch takes less if one of its units had another head."""
    (old, head), good = change, _good_batch(job)
    (new,) = survey([old.span._replace(head=head)])
    units = draft.units[slice(*block.units)]
    return added_up(units, good) - added_up([new if unit is old else unit for unit in units], good)


def _strengthened(job: PlanJob, proposal: Proposal, survey: Survey) -> Proposal | None:
    """Gives every unit in turn the strongest head that lowers no batch below a good one; None where none could."""
    if (before := _drafted(job, proposal, survey)) is None:
        return None
    changed = proposal
    for unit in before.units:
        for head in STRENGTH[: STRENGTH.index(unit.head)] if unit.head in STRENGTH else ():
            stronger = _with_head(changed, unit.unit_idx, head)
            if (after := _drafted(job, stronger, survey)) and _is_no_worse(job, before, after):
                changed, before = stronger, after
                break
    return changed if changed != proposal else None


def _is_no_worse(job: PlanJob, before: Draft, after: Draft) -> bool:
    """Whether every unit keeps its class of workers and its block's batch, or as much of it as is good."""
    good = _good_batch(job)
    pairs = zip(_blocks_of_units(before), _blocks_of_units(after), strict=True)
    return all(
        new.batch_size >= min(good, old.batch_size) and new.budget_bytes <= old.budget_bytes for old, new in pairs
    )


def _blocks_of_units(draft: Draft) -> list[BlockPlan]:
    return [block for block in draft.blocks for _ in range(*block.units)]


def _drafted(job: PlanJob, proposal: Proposal, survey: Survey) -> Draft | None:
    try:
        return draft_plan(job, proposal, survey(proposal.spans))
    except PlanError:
        return None


def _weaker(unit: UnitProfile) -> tuple[str, ...]:
    return STRENGTH[STRENGTH.index(unit.head) + 1 :] if unit.head in STRENGTH else ()


def _with_head(proposal: Proposal, position: int, head: str) -> Proposal:
    spans = list(proposal.spans)
    spans[position] = spans[position]._replace(head=head)
    return replace(proposal, spans=tuple(spans))


def _good_batch(job: PlanJob) -> int:
    return min(job.memory.good_batch_size, job.memory.max_batch_size)
