"""Which samples of a split a block's units classify correctly, in inference mode."""

from collections.abc import Generator, Sequence

import numpy as np
import torch

from nf_pipeline.core.hits import hits_of
from nf_pipeline.core.local_unit import LocalUnit
from nf_pipeline.core.memory import PeakMeter
from nf_pipeline.core.train_step import Precision, forward_block
from nf_pipeline.data.held_out import HeldOutLabels
from nf_pipeline.worker.feed import Feed


def count_correct(
    units: Sequence[LocalUnit], feed: Feed, precision: Precision, meter: PeakMeter
) -> Generator[int, None, list[int]]:
    """Counts the samples that each unit's head classifies correctly.

    See `find_hits`, which it counts.
    """
    hits = yield from find_hits(units, feed, precision, meter)
    return [one.bit_count() for one in hits]


def find_hits(
    units: Sequence[LocalUnit],
    feed: Feed,
    precision: Precision,
    meter: PeakMeter,
    held_out: HeldOutLabels | None = None,
) -> Generator[int, None, list[int]]:
    """Finds the samples that each unit's head classifies correctly.

    Batch norm uses its running statistics, as in the final model. The units come back in training mode.

    Args:
        held_out: labels of a split whose shards have none.

    Yields:
        Samples done so far, after every batch.

    Returns:
        Per unit, bit i for the i-th sample of the feed: see `nf_pipeline.core.hits`.
    """
    right, done = [np.zeros((len(units), 0), bool)], 0
    set_training(units, False)
    for batch in feed.batches():
        y_N = batch.y_N
        if held_out is not None:
            y_N = torch.from_numpy(held_out.of(batch.sample_ids)).to(y_N.device)
        with meter:
            batch.track(meter)
            all_logits = forward_block(units, batch.take_x(), precision, with_heads=True)[1]
            right_UN = torch.stack([logits_NK.argmax(dim=1) == y_N for logits_NK in all_logits])
            right.append(right_UN.cpu().numpy().copy())  # no tensor may stay that the meter would count
            del all_logits, right_UN
        done += len(batch.y_N)
        yield done
    set_training(units, True)
    return [hits_of(right_N) for right_N in np.concatenate(right, axis=1)]


def set_training(units: Sequence[LocalUnit], mode: bool) -> None:
    """Puts every unit into training (True) or inference mode."""
    for unit in units:
        unit.train(mode)
