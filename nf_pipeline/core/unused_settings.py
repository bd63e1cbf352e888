"""Says which settings of the training a plan leaves without effect: what the user asked for, and no block does.

Only the settings that depend on the plan's form; what contradicts itself is for `nf_pipeline.config`. Entry:
`name_unused`.
"""

from collections.abc import Iterator
from dataclasses import replace

from nf_pipeline.config import TrainConfig
from nf_pipeline.core.cache_policy import IMAGES
from nf_pipeline.core.drafts import Draft
from nf_pipeline.core.heads import AUTO_HEAD
from nf_pipeline.core.objectives import looks_at_output


def name_unused(train: TrainConfig, draft: Draft) -> Draft:
    """Returns a draft whose first block's reason ends with what changes nothing; as it is where all settings count.

    Args:
        train: what the user asked for.
        draft: final, its blocks with their sources.
    """
    unused = [*_of_stored_activations(train, draft), *_of_local_units(train, draft)]
    if not unused:
        return draft
    first, *others = draft.blocks
    return replace(draft, blocks=(replace(first, reason="; ".join([first.reason, *unused])), *others))


def _of_stored_activations(train: TrainConfig, draft: Draft) -> Iterator[str]:
    if any(block.source_block != IMAGES for block in draft.blocks):
        return
    for field in ("views", "feature_augment"):
        if (value := getattr(train, field)) != _default(field):
            yield f"train.{field} {value} without effect: no block reads stored activations"


def _of_local_units(train: TrainConfig, draft: Draft) -> Iterator[str]:
    if len(draft.units) > 1:
        return
    one_unit = "without effect: one unit, which is plain backpropagation"
    if looks_at_output(train.loss):  # any other loss is the one unit's
        yield f"train.loss {train.loss} {one_unit}"
    if train.context != _default("context"):
        yield f"train.context {train.context} {one_unit}"
    if train.head not in (_default("head"), AUTO_HEAD):  # what is left to the planner is named by it
        yield f"train.head {train.head} {one_unit}"


def _default(field: str) -> object:
    return TrainConfig.model_fields[field].default
