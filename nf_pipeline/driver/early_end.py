"""Whether a run ends before all of its blocks are trained, from what finished blocks reported and nothing else.

So a driver that goes on where another was killed decides the same. Reads no store. What blocks reported is compared
with the plan first: a decision on results that cannot be would look like any other. Entries: `find_early_end`,
`read_results`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from nf_pipeline.config import RunConfig
from nf_pipeline.core.early_stop import reason_to_stop
from nf_pipeline.core.metrics import results_kind
from nf_pipeline.core.results import Results
from nf_pipeline.errors import ObjectCorrupt
from nf_pipeline.plans import BlockPlan, Plan
from nf_pipeline.storage.manifest import StageManifest
from nf_pipeline.storage.sealed import repair_fix
from nf_pipeline.storage.store import Store


@dataclass(frozen=True, kw_only=True)
class EarlyEnd:
    """The decision to train no further block.

    Attributes:
        num_blocks: that are trained.
        reason: one line for people.
    """

    num_blocks: int
    reason: str


def may_end_early(config: RunConfig) -> bool:
    """Whether a run of this configuration may leave blocks out at all."""
    return config.train.mode == "sequential" and config.exits.patience is not None


def find_early_end(config: RunConfig, num_planned: int, blocks: Sequence[Sequence[Results]]) -> EarlyEnd | None:
    """Decides after the first blocks of a run whether they are all that it needs.

    Args:
        config: of the run.
        num_planned: blocks of its plan.
        blocks: what the exits of the blocks that are finished found, from the first block without a gap.

    Returns:
        None if more blocks are to be trained, or none are left; always for a pipelined run, which trains all blocks
        at the same time.
    """
    if not may_end_early(config) or not 0 < len(blocks) < num_planned:
        return None
    reason = reason_to_stop(blocks, config.exits.patience)
    return None if reason is None else EarlyEnd(num_blocks=len(blocks), reason=reason)


def read_results(
    store: Store, key: str, block: StageManifest, plan: Plan, planned: BlockPlan, num_val: int
) -> list[Results]:
    """Reads what a block's exits found on the validation split, and compares it with what they had to find.

    Args:
        store, key: where its manifest is, for the error.
        block: its manifest.
        plan, planned: the run's plan, and what it says of the block.
        num_val: samples of the validation split.

    Raises:
        ObjectCorrupt: it has not one result per exit, they are of another number of samples, or they are not those of
            the samples that it names.
    """
    kind, num_exits = results_kind(plan.target), len(plan.units_of(planned))
    totals = block.facts.get(kind.total_fact, ())
    if (len(totals), block.facts.get("num_val")) != (num_exits, num_val):
        got = f"{len(totals)} results of {block.facts.get('num_val')} samples"
        what = f"{key} is damaged: facts.{kind.total_fact}, num_val: got {got}, want {num_exits} of {num_val}"
        raise ObjectCorrupt(what, store.uri, repair_fix(store, key))
    try:
        results = [kind.from_text(text, num_val) for text in block.facts.get(kind.sample_fact, ())]
    except ValueError as error:
        what = f"{key} is damaged: facts.{kind.sample_fact}: {error}"
        raise ObjectCorrupt(what, store.uri, repair_fix(store, key)) from None
    found = [one.total for one in results]
    if found != totals:
        what = f"{key} is damaged: facts.{kind.sample_fact}: got {found}, facts.{kind.total_fact} says {totals}"
        raise ObjectCorrupt(what, store.uri, repair_fix(store, key))
    return results
