"""One batch of a baseline: the pipeline's own training step, or a part of one whose gradients add up.

Entry: `baseline_step`. Shapes: N batch, C channels, H, W.
"""

from collections.abc import Callable, Sequence

import torch

from nf_pipeline.bench.methods import Precision
from nf_pipeline.core.local_unit import LocalUnit
from nf_pipeline.core.mixup import Mix
from nf_pipeline.core.objectives import Labels
from nf_pipeline.core.train_step import autocast, train_step


def baseline_step(
    units: Sequence[LocalUnit],
    optimizers: Sequence[torch.optim.Optimizer],
    take_x: Callable[[], torch.Tensor],
    y_N: torch.Tensor,
    precision: Precision,
    *,
    num_parts: int,
    ends_step: bool,
    mix: Mix | None = None,
) -> list[torch.Tensor]:
    """Trains on one batch, which is one of `num_parts` micro-batches of an optimiser step.

    Args:
        units: the whole network as one unit, or a unit per layer.
        optimizers: one per unit.
        take_x: hands the images over, on the units' device: no name anywhere keeps them longer than they are needed.
        y_N: labels, same device.
        ends_step: whether the optimiser moves now.
        mix: how this batch is mixed first: every micro-batch in itself, as members of a gang mix their parts.

    Returns:
        The mean loss of this batch per unit.
    """
    if num_parts == 1:
        return train_step(units, optimizers, take_x(), y_N, precision, mix=mix)
    (unit,), (optimizer,) = units, optimizers
    x_NCHW, labels = take_x(), Labels(y_N=y_N)
    if mix is not None:
        x_NCHW, labels = mix.inputs(x_NCHW), mix.labels(y_N)
    with autocast(x_NCHW.device, precision):
        loss = unit.objective.loss(*unit(x_NCHW), labels)
    (loss / num_parts).backward()
    if ends_step:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return [loss.detach()]
