"""One batch of a baseline: the pipeline's own training step, or a part of one whose gradients add up.

Entry: `baseline_step`. Shapes: N batch, C channels, H, W.
"""

from collections.abc import Sequence

import torch
from torch.nn import functional

from nf_pipeline.bench.methods import Precision
from nf_pipeline.core.local_unit import LocalUnit
from nf_pipeline.core.train_step import autocast, train_step


def baseline_step(
    units: Sequence[LocalUnit],
    optimizers: Sequence[torch.optim.Optimizer],
    x_NCHW: torch.Tensor,
    y_N: torch.Tensor,
    precision: Precision,
    *,
    num_parts: int,
    ends_step: bool,
) -> list[torch.Tensor]:
    """Trains on one batch, which is one of `num_parts` micro-batches of an optimiser step.

    Args:
        units: the whole network as one unit, or a unit per layer.
        optimizers: one per unit.
        x_NCHW, y_N: images and labels on the units' device.
        ends_step: whether the optimiser moves now.

    Returns:
        The mean loss of this batch per unit.
    """
    if num_parts == 1:
        return train_step(units, optimizers, x_NCHW, y_N, precision)
    (unit,), (optimizer,) = units, optimizers
    with autocast(x_NCHW.device, precision):
        loss = functional.cross_entropy(unit(x_NCHW)[1], y_N)
    (loss / num_parts).backward()
    if ends_step:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return [loss.detach()]
