"""Learning rate over a block's training: linear warm-up, then a cosine down to zero."""

import math
from collections.abc import Iterable

from torch.optim import Optimizer

from nf_pipeline.config import TrainConfig

BASE_BATCH_SIZE = 128
MAX_WARMUP_PART = 0.5


def peak_learning_rate(lr: float, batch_size: int) -> float:
    """Scales the configured rate, meant for batch 128, linearly with the batch size.

    Source: linear scaling rule, Goyal et al. 2017, https://arxiv.org/abs/1706.02677, section 2.1.
    """
    return lr * batch_size / BASE_BATCH_SIZE


def warmup_steps(warmup_epochs: float, steps_per_epoch: int, total_steps: int) -> int:
    """Returns the steps of the warm-up: at most half of all, so that short runs still anneal."""
    return min(round(warmup_epochs * steps_per_epoch), int(total_steps * MAX_WARMUP_PART))


def learning_rate(step: int, *, total_steps: int, num_warmup_steps: int, peak_lr: float) -> float:
    """Returns the rate for a 0-based step in [0, total_steps).

    Source of the cosine: Loshchilov and Hutter 2017, https://arxiv.org/abs/1608.03983.
    """
    if step < num_warmup_steps:
        return peak_lr * (step + 1) / num_warmup_steps
    progress = (step - num_warmup_steps) / max(1, total_steps - num_warmup_steps)
    return peak_lr * 0.5 * (1.0 + math.cos(math.pi * progress))


def set_learning_rate(
    optimizers: Iterable[Optimizer], config: TrainConfig, step: int, steps_per_epoch: int, peak_lr: float
) -> None:
    """Gives optimisers the rate of a step, counted over all epochs.

    Args:
        optimizers: all of their parameter groups train with the same rate.
        config: has the epochs and the warm-up.
        step: 0-based.
        steps_per_epoch: at least 1.
        peak_lr: see `peak_learning_rate`.
    """
    total = steps_per_epoch * config.epochs
    lr = learning_rate(
        step,
        total_steps=total,
        num_warmup_steps=warmup_steps(config.warmup_epochs, steps_per_epoch, total),
        peak_lr=peak_lr,
    )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
