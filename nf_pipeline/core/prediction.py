"""Predicts the seconds that a plan takes, from the measured seconds of its layers and heads.

    block = epochs * (train steps + validation + reading its input) + caching pass (forward and writing)

A run's time is the sum over its blocks, or that of the slowest one where all train at the same time. Checkpointing
adds a forward pass of every segment but the last. What reading and writing cost `nf_pipeline.core.cache_policy` says.
Entry: `TimeModel`.
"""

import math
from collections.abc import Sequence

from nf_pipeline.config import RunConfig
from nf_pipeline.core.objectives import looks_at_output
from nf_pipeline.core.timing import PartKey, Seconds, StepTimer
from nf_pipeline.plans import UnitSpan


class TimeModel:
    """Seconds of units and blocks.

    Args:
        cfg: loss, epochs and workers are read.
        timer: of layers, heads, the model's own on the last layer, losses and contexts.
        num_layers: of the cut model.
        split_rows: samples per split.
    """

    def __init__(self, cfg: RunConfig, timer: StepTimer, num_layers: int, split_rows: dict[str, int]) -> None:
        self._cfg = cfg
        self._timer = timer
        self._num_layers = num_layers
        self._times_loss = looks_at_output(cfg.train.loss)
        self._has_contexts = cfg.train.context != "none"
        self._train_rows = split_rows["train"]
        self._val_rows = split_rows.get("val", 0)

    def step_s(self, span: UnitSpan, batch_size: int) -> float:
        """Returns the seconds of one training step of a unit."""
        parts = self._layers(span, batch_size)
        again = 0.0
        if span.segment_layers:
            last = (len(parts) - 1) // span.segment_layers * span.segment_layers
            again = sum(part.forward for part in parts[:last])
        ends = self._context(span, batch_size).step + self._head(span, batch_size).step
        return sum(part.step for part in parts) + again + ends + self._loss_s(span, batch_size)

    def forward_s(self, span: UnitSpan, batch_size: int, *, with_head: bool) -> float:
        """Returns the seconds of one batch through a unit without gradients."""
        forward = sum(part.forward for part in (self._context(span, batch_size), *self._layers(span, batch_size)))
        return forward + (self._head(span, batch_size).forward if with_head else 0.0)

    def train_s(self, spans: Sequence[UnitSpan], batch_size: int) -> float:
        """Returns the seconds of all epochs of a block, validation included, storage not."""
        steps = math.ceil(self._train_rows / (batch_size * self._cfg.train.workers_per_block))
        validation = self._val_rows / (batch_size * self._cfg.train.workers_per_block)
        step_s = sum(self.step_s(span, batch_size) for span in spans)
        forward_s = sum(self.forward_s(span, batch_size, with_head=True) for span in spans)
        return self._cfg.train.epochs * (steps * step_s + validation * forward_s)

    def forward_s_per_sample(self, spans: Sequence[UnitSpan], batch_size: int) -> float:
        """Returns the seconds that a sample takes through a block's layers, heads left out."""
        return sum(self.forward_s(span, batch_size, with_head=False) for span in spans) / batch_size

    def _layers(self, span: UnitSpan, batch_size: int) -> list[Seconds]:
        return [self._timer.seconds(PartKey("layer", layer), batch_size) for layer in range(span.start, span.stop)]

    def _context(self, span: UnitSpan, batch_size: int) -> Seconds:
        """Returns what the unit's look at the network's own sample takes."""
        if not self._has_contexts or span.start == 0:
            return Seconds(step=0.0, forward=0.0)
        return self._timer.seconds(PartKey("context", span.start), batch_size)

    def _head(self, span: UnitSpan, batch_size: int) -> Seconds:
        return self._timer.seconds(PartKey("head", span.stop - 1, span.head), batch_size)

    def _loss_s(self, span: UnitSpan, batch_size: int) -> float:
        """Returns what the loss takes beside the head; the last unit's is cross-entropy alone."""
        if not self._times_loss or span.stop == self._num_layers:
            return 0.0
        return self._timer.seconds(PartKey("loss", span.stop - 1), batch_size).step
