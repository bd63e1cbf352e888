"""Whether a run ends before all of its blocks are trained, from what finished blocks reported and nothing else.

So a driver that goes on where another was killed decides the same. Reads no store. Entry: `find_early_end`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nf_pipeline.config import RunConfig
from nf_pipeline.core.early_stop import reason_to_stop


@dataclass(frozen=True, kw_only=True)
class EarlyEnd:
    """The decision to train no further block.

    Attributes:
        num_blocks: that are trained.
        reason: one line for people.
    """

    num_blocks: int
    reason: str


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
    if config.train.mode != "sequential" or not 0 < len(facts) < num_planned:
        return None
    counts = [block["val_correct"] for block in facts]
    reason = reason_to_stop(counts, facts[0]["num_val"], config.exits.patience)
    return None if reason is None else EarlyEnd(num_blocks=len(facts), reason=reason)
