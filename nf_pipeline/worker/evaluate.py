"""Accuracy of a block's units on a split, in inference mode."""

from collections.abc import Generator, Sequence

from nf_pipeline.core.local_unit import LocalUnit
from nf_pipeline.core.memory import PeakMeter
from nf_pipeline.core.train_step import Precision, forward_block
from nf_pipeline.worker.feed import Feed


def count_correct(
    units: Sequence[LocalUnit], feed: Feed, precision: Precision, meter: PeakMeter
) -> Generator[int, None, list[int]]:
    """Counts the samples that each unit's head classifies correctly.

    Batch norm uses its running statistics, as in the final model. The units come back in training mode.

    Yields:
        Samples done so far, after every batch.

    Returns:
        Correct samples per unit.
    """
    correct, done = [0] * len(units), 0
    set_training(units, False)
    for batch in feed.batches():
        with meter:
            batch.track(meter)
            all_logits = forward_block(units, batch.take_x(), precision, with_heads=True)[1]
            for position, logits_NK in enumerate(all_logits):
                correct[position] += int((logits_NK.argmax(dim=1) == batch.y_N).sum())
        done += len(batch.y_N)
        yield done
    set_training(units, True)
    return correct


def set_training(units: Sequence[LocalUnit], mode: bool) -> None:
    """Puts every unit into training (True) or inference mode."""
    for unit in units:
        unit.train(mode)
