"""What a block's units make of the samples of a split, in inference mode."""

from collections.abc import Generator, Sequence

import numpy as np
import torch

from nf_pipeline.core.local_unit import LocalUnit
from nf_pipeline.core.memory import PeakMeter
from nf_pipeline.core.results import Results
from nf_pipeline.core.train_step import Precision, forward_block
from nf_pipeline.data.held_out import HeldOutLabels
from nf_pipeline.worker.feed import Feed


def find_results(
    units: Sequence[LocalUnit],
    feed: Feed,
    precision: Precision,
    meter: PeakMeter,
    kind: type[Results],
    held_out: HeldOutLabels | None = None,
) -> Generator[int, None, list[Results]]:
    """Measures every unit's head on every sample.

    Batch norm uses its running statistics, as in the final model. The units come back in training mode.

    Args:
        kind: what is measured.
        held_out: labels of a split whose shards have none, of classes.

    Yields:
        Samples done so far, after every batch.

    Returns:
        Per unit, of the samples of the feed in order.
    """
    measured, done = [np.zeros((len(units), 0), bool)], 0
    set_training(units, False)
    for batch in feed.batches():
        y_N = batch.y_N
        if held_out is not None:
            y_N = torch.from_numpy(held_out.of(batch.sample_ids)).to(y_N.device)
        with meter:
            batch.track(meter)
            sample_N = batch.sample_N
            outputs = forward_block(units, batch.take_x(), precision, with_heads=True, sample_N=sample_N)[1]
            measured_UN = torch.stack([kind.measure(outputs_NK, y_N) for outputs_NK in outputs])
            measured.append(measured_UN.cpu().numpy().copy())  # no tensor may stay that the meter would count
            del outputs, measured_UN, sample_N
        done += len(batch.y_N)
        yield done
    set_training(units, True)
    return [kind.of(measured_N) for measured_N in np.concatenate(measured, axis=1)]


def set_training(units: Sequence[LocalUnit], mode: bool) -> None:
    """Puts every unit into training (True) or inference mode."""
    for unit in units:
        unit.train(mode)
