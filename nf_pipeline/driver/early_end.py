"""Whether a run ends before all of its blocks are trained, from what finished blocks reported and nothing else.

So a driver that goes on where another was killed decides the same. Reads no store. What blocks reported is compared
with the plan first: a decision on counts that cannot be would look like any other. Entries: `find_early_end`,
`check_counts`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nf_pipeline.config import RunConfig
from nf_pipeline.core.early_stop import reason_to_stop
from nf_pipeline.core.hits import hits_from_text
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


def find_early_end(config: RunConfig, num_planned: int, facts: Sequence[Mapping[str, Any]]) -> EarlyEnd | None:
    """Decides after the first blocks of a run whether they are all that it needs.

    Args:
        config: of the run.
        num_planned: blocks of its plan.
        facts: of the blocks that are finished, from the first one without a gap.

    Returns:
        None if more blocks are to be trained, or none are left; always for a pipelined run, which trains all blocks
        at the same time.
    """
    if not may_end_early(config) or not 0 < len(facts) < num_planned:
        return None
    counts = [block["val_correct"] for block in facts]
    reason = reason_to_stop(counts, facts[0]["num_val"], config.exits.patience)
    return None if reason is None else EarlyEnd(num_blocks=len(facts), reason=reason)


def check_counts(store: Store, key: str, block: StageManifest, plan: Plan, planned: BlockPlan, num_val: int) -> None:
    """Compares what a block found on the validation split with what it had to find.

    Args:
        store, key: where its manifest is, for the error.
        block: its manifest.
        plan, planned: the run's plan, and what it says of the block.
        num_val: samples of the validation split.

    Raises:
        ObjectCorrupt: it has not one count per exit, they are of another number of samples, or they are not those of
            the samples that it names.
    """
    num_exits, counts = len(plan.units_of(planned)), block.facts.get("val_correct", ())
    if (len(counts), block.facts.get("num_val")) != (num_exits, num_val):
        got = f"{len(counts)} counts of {block.facts.get('num_val')} samples"
        what = f"{key} is damaged: facts.val_correct, num_val: got {got}, want {num_exits} of {num_val}"
        raise ObjectCorrupt(what, store.uri, repair_fix(store, key))
    try:
        hits = [hits_from_text(text, num_val).bit_count() for text in block.facts.get("val_hits", ())]
    except ValueError as error:
        what = f"{key} is damaged: facts.val_hits: {error}"
        raise ObjectCorrupt(what, store.uri, repair_fix(store, key)) from None
    if hits != counts:
        what = f"{key} is damaged: facts.val_hits: got {hits} samples, facts.val_correct says {counts}"
        raise ObjectCorrupt(what, store.uri, repair_fix(store, key))
