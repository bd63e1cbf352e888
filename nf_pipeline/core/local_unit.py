"""A unit: consecutive layers that train together by backpropagation, with one head at their end.

Before them there may be a context, which looks at the network's own sample (`nf_pipeline.core.context`).

One layer with a head is the paper's form; all layers with the model's own classifier are plain backpropagation.
Knows nothing of optimisers, batches or blocks. Entry: `build_units`.
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from nf_pipeline.config import TrainConfig
from nf_pipeline.core.context import Context, build_context
from nf_pipeline.core.heads import build_head, head_site
from nf_pipeline.core.layers import CutModel
from nf_pipeline.core.layout import laid_out
from nf_pipeline.core.objectives import CrossEntropy, Objective, UnitEnd, build_objective
from nf_pipeline.plans import UnitSpan
from nf_pipeline.samples import TargetSpec

# Spreads (seed, unit) over seeds so that no two units of neighbouring seeds draw the same head.
_SEED_STEP = 1_000_003
# Apart from the seeds of heads, which would draw the same numbers.
_OBJECTIVE_SEEDS = 2**61
_CONTEXT_SEEDS = 2**60


class LocalUnit(nn.Module):
    """x_NCHW -> (out_NCHW, logits_NK): layers, a head on what they return, and the loss that they train for.

    Names in the state dict: `layers.0. ...` counted from the unit's first layer, `head. ...`, `context. ...` where
    there is one, and `objective. ...` where the loss has weights, which only training uses.

    Args:
        layers: in order.
        head: on the last layer's output.
        segment_layers: while training, keep only what enters each segment of so many layers and compute the rest
            again in the backward pass (Chen et al. 2016, https://arxiv.org/abs/1604.06174); 0 keeps everything.
            Weights, gradients and the running statistics of batch norms are the same either way; other layers that
            count batches count theirs twice.
        is_last: the head is the model's own classifier, whose code may count on contiguous tensors.
        objective: the loss; None is plain cross-entropy.
        context: makes of the network's own sample what is added to the input; None adds nothing.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        head: nn.Module,
        segment_layers: int = 0,
        *,
        is_last: bool = False,
        objective: Objective | None = None,
        context: Context | None = None,
    ) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.head = head
        self.objective = objective or CrossEntropy()
        self.context = context
        self.segment_layers = segment_layers
        self.is_last = is_last

    def forward(
        self, x_NCHW: torch.Tensor, sample_N: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the next unit's input (still attached to the graph) and the head's logits.

        Args:
            x_NCHW: what the unit before returns.
            sample_N: the network's input for the same samples, as its first layer takes it, for the context.
        """
        return self.run(self.entered(x_NCHW, sample_N))

    def entered(self, x_NCHW: torch.Tensor, sample_N: torch.Tensor | None = None) -> torch.Tensor:
        """Returns what the first layer takes: the input itself, or with the context added."""
        return x_NCHW if self.context is None else self.context.added_to(x_NCHW, sample_N)

    def run(self, x_NCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Does `forward` from what `entered` has returned: who lets go of the input in between saves its memory."""
        if self.segment_layers and self.training and torch.is_grad_enabled():
            out_NCHW = self._by_segments(x_NCHW)
        else:
            out_NCHW = _chain(self.layers, x_NCHW)
        return out_NCHW, self.head(out_NCHW.contiguous() if self.is_last else laid_out(out_NCHW))

    def features(self, x_NCHW: torch.Tensor, sample_N: torch.Tensor | None = None) -> torch.Tensor:
        """Returns what the layers make of the input, without the head."""
        return _chain(self.layers, self.entered(x_NCHW, sample_N))

    def trained(self) -> "LocalUnit":
        """Returns a unit of the same layers, head and context, not copied, without what only training needs."""
        return LocalUnit(self.layers, self.head, self.segment_layers, is_last=self.is_last, context=self.context)

    def _by_segments(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        *starts, last = range(0, len(self.layers), self.segment_layers)
        for start in starts:
            segment = self.layers[start : start + self.segment_layers]
            x_NCHW = checkpoint(
                _chain,
                segment,
                x_NCHW,
                use_reentrant=False,
                # Default arguments: each recomputation must find its own segment.
                context_fn=lambda again=segment: (contextlib.nullcontext(), _statistics_kept(again)),
            )
        # The backward pass begins with the last segment, which would be computed again at once.
        return _chain(self.layers[last:], x_NCHW)


def _chain(layers: nn.Sequential, x_NCHW: torch.Tensor) -> torch.Tensor:
    for layer in layers:
        x_NCHW = layer(laid_out(x_NCHW))
    return x_NCHW


@contextlib.contextmanager
def _statistics_kept(module: nn.Module) -> Iterator[None]:
    """Runs a training forward pass again: batch norms normalise as before and do not count the batch twice."""
    norms = [part for part in module.modules() if isinstance(part, _BatchNorm)]
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, num_batches) in zip(norms, kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, num_batches


def even_spans(num_layers: int, unit_layers: int, segment_layers: int = 0) -> list[UnitSpan]:
    """Splits layers into units of `unit_layers`; the last may be shorter.

    Example: even_spans(8, 3) == [UnitSpan(0, 3), UnitSpan(3, 6), UnitSpan(6, 8)].
    """
    starts = range(0, num_layers, unit_layers)
    return [UnitSpan(start, min(start + unit_layers, num_layers), segment_layers) for start in starts]


def build_units(
    cut_model: CutModel,
    head_name: str,
    spans: Sequence[UnitSpan],
    target: TargetSpec,
    seed: int,
    units: range | None = None,
    *,
    train: TrainConfig | None = None,
) -> list[LocalUnit]:
    """Wraps a cut model's layers into units; the layers are shared with the model, not copied.

    The unit that ends with the last layer has the model's own classifier, and trains for cross-entropy. The other
    heads' weights, and those of losses, depend on (seed, position) only: a worker that builds one block gets what a
    worker that builds all gets.

    Args:
        head_name: of every unit that names no other.
        spans: all units of the plan, in order.
        target: what they predict.
        units: positions to build; None builds all.
        train: what units train for, and whether they have contexts; None for units without, that only run. Where
            units have contexts, ask for these and take `LocalUnit.trained` of those that only run.

    Raises:
        ConfigError: unknown head or loss, or a layer whose output is no map of features.
    """
    built = []
    for unit_idx in units if units is not None else range(len(spans)):
        span, unit_seed = spans[unit_idx], seed * _SEED_STEP + unit_idx
        is_last = span.stop == len(cut_model.layers)
        if is_last:
            head = cut_model.tail
        else:
            site = head_site(cut_model.out_shapes, span.stop - 1, target.size)
            head = build_head(span.head or head_name, site, unit_seed)
        objective = context = None
        if train is not None:
            end = UnitEnd(
                out_shape=cut_model.out_shapes[span.stop - 1],
                target=target,
                label_smoothing=train.label_smoothing,
                is_last=is_last,
                inputs=cut_model.inputs,
                depth=min(1.0, unit_idx / max(1, len(spans) - 2)),
            )
            objective = build_objective(train.loss, end, _OBJECTIVE_SEEDS + unit_seed)
            context = _context(train, cut_model, span, unit_seed)
        layers = cut_model.layers[span.start : span.stop]
        unit = LocalUnit(layers, head, span.segment_layers, is_last=is_last, objective=objective, context=context)
        built.append(unit)
    return built


def _context(train: TrainConfig, cut_model: CutModel, span: UnitSpan, unit_seed: int) -> Context | None:
    if train.context == "none" or span.start == 0:
        return None
    return build_context(cut_model.inputs, cut_model.out_shapes[span.start - 1], _CONTEXT_SEEDS + unit_seed)
