"""One mini-batch through a block: unit after unit, each with its own loss, backward pass and optimiser step.

The profiler runs this very code on fake tensors and the worker on real ones, so the predicted bytes are those
of the code that trains. What a unit is trained for is its own (`nf_pipeline.core.objectives`). Knows nothing of
data, schedules, checkpoints or what a loss should look like: losses stay tensors, because reading one (`.item()`)
would wait for the GPU at every step. Entry function: `train_step`.

Shapes: N batch, C channels, H, W, K outputs; samples of other ranks than pictures have other sides.
"""

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from torch import nn

from nf_pipeline.config import TrainConfig
from nf_pipeline.core.layout import laid_out
from nf_pipeline.core.local_unit import LocalUnit
from nf_pipeline.core.mixup import Mix
from nf_pipeline.core.objectives import Labels
from nf_pipeline.errors import ConfigError

Precision = Literal["fp32", "bf16"]

# One kernel per optimiser step and no temporary the size of the weights, which `foreach` would make.
_FUSED_DEVICES = frozenset({"cpu", "cuda"})


def resolve_device(name: str) -> torch.device:
    """Turns `train.device` into a device of this process; auto takes the GPU when there is one.

    Raises:
        ConfigError: cuda is asked for and torch sees no GPU.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device: got cuda, but torch sees no GPU here", "--set train.device=cpu or auto")
    # With its index: `set_per_process_memory_fraction` refuses a device without one.
    return torch.device(name, torch.cuda.current_device()) if name == "cuda" else torch.device(name)


def make_optimizer(unit: nn.Module, cfg: TrainConfig, lr: float) -> torch.optim.SGD:
    """Makes SGD with momentum for one unit.

    Args:
        unit: on its final device; every parameter that requires a gradient is taken.
        cfg: momentum and weight decay are read.
        lr: learning rate of the first step; schedules write `param_groups[0]["lr"]`.
    """
    parameters = [parameter for parameter in unit.parameters() if parameter.requires_grad]
    if all(parameter.device.type in _FUSED_DEVICES for parameter in parameters):
        kernel = {"fused": True}
    else:
        kernel = {"foreach": False}
    return torch.optim.SGD(parameters, lr=lr, momentum=cfg.momentum, weight_decay=cfg.weight_decay, **kernel)


def train_step(
    units: Sequence[LocalUnit],
    optimizers: Sequence[torch.optim.Optimizer],
    x_NCHW: torch.Tensor,
    y_N: torch.Tensor,
    precision: Precision,
    reduce: Callable[[LocalUnit], None] | None = None,
    mix: Mix | None = None,
    sample_N: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """Trains every unit of a block on one mini-batch; gradients stop at each unit's input.

    A unit's activations are free before the next unit starts. So is the batch, if the caller keeps no name
    for it: `train_step(units, optimizers, to_device(batch), ...)`.

    Args:
        units: in order, in train mode.
        optimizers: one per unit, from `make_optimizer`.
        x_NCHW: the block's input, float32, or int64 tokens, on the units' device.
        y_N: int64 class indices, or float32 standardised values [N, K], same device.
        precision: bf16 runs forward passes and losses under autocast.
        reduce: called with each unit between its backward pass and its optimiser step, to change the gradients
            in place: workers that share a batch average theirs.
        mix: how the block's input is mixed first, and the samples alike; None leaves them as they are.
        sample_N: the network's own input for the batch, as its first layer takes it, same device; the very tensor of
            `x_NCHW` where that is it. None where no unit looks at it.

    Returns:
        One detached scalar loss per unit, still on the device.
    """
    labels, losses = Labels(y_N=y_N), []
    if mix is not None:
        is_sample = sample_N is x_NCHW
        x_NCHW, labels = mix.inputs(x_NCHW), mix.labels(y_N)
        if sample_N is not None:
            sample_N = x_NCHW if is_sample else mix.inputs(sample_N)
    for unit, optimizer in zip(units, optimizers, strict=True):
        with autocast(x_NCHW.device, precision):
            # No name here keeps the input without its context.
            x_NCHW = unit.entered(x_NCHW, sample_N)
        loss_of = partial(unit.objective.loss, labels=labels, sample_N=sample_N)
        x_NCHW, loss = _train_unit(unit, optimizer, x_NCHW, loss_of, precision, reduce)
        losses.append(loss)
    return losses


def forward_block(
    units: Sequence[LocalUnit],
    x_NCHW: torch.Tensor,
    precision: Precision,
    *,
    with_heads: bool,
    sample_N: torch.Tensor | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Runs a block without gradients, to validate it or to store its output.

    Args:
        units: in order, in eval mode.
        x_NCHW: the block's input, float32, on the units' device.
        precision: as in training.
        with_heads: False skips the heads.
        sample_N: the network's own input for the batch; None where no unit looks at it.

    Returns:
        The last unit's output, and logits_NK per unit (none without heads).
    """
    all_logits = []
    with torch.no_grad(), autocast(x_NCHW.device, precision):
        for unit in units:
            if with_heads:
                x_NCHW, logits_NK = unit(x_NCHW, sample_N)
                all_logits.append(logits_NK)
            else:
                x_NCHW = unit.entered(x_NCHW, sample_N)
                for layer in unit.layers:
                    x_NCHW = layer(laid_out(x_NCHW))
    return x_NCHW, all_logits


def _train_unit(
    unit: LocalUnit,
    optimizer: torch.optim.Optimizer,
    entered_NCHW: torch.Tensor,
    loss_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    precision: Precision,
    reduce: Callable[[LocalUnit], None] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    with autocast(entered_NCHW.device, precision):
        out_NCHW, logits_NK = unit.run(entered_NCHW)
        loss = loss_of(out_NCHW, logits_NK)
    loss.backward()
    unit.objective.restore_head(unit.head)
    if reduce is not None:
        reduce(unit)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return out_NCHW.detach(), loss.detach()


def autocast(device: torch.device, precision: Precision) -> contextlib.AbstractContextManager[object]:
    """Returns what forward passes and losses run under."""
    if precision == "fp32":
        return contextlib.nullcontext()
    # The cache would keep bf16 copies of all weights: `forward_block` would hold more than training does.
    return torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=False)
