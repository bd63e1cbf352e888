"""Adds up what units take from one look at every layer, head and loss: quick, most often a few per cent off.

Ways to form units are compared by these sums; the bytes of the one that is taken are counted in whole steps
(`nf_pipeline.core.profiler`). A part is looked at once, on fake tensors: what it keeps for its backward pass, and
what either pass holds on top. A unit's step is then walked through on paper, part after part, forth and back. However
many units a layer is tried in, it is looked at once. Under bf16, units that begin with a residual block were found up
to a fifth off.

Knows nothing of budgets, blocks and devices: workspaces of kernels are not in it. Entry class: `UnitEstimator`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from nf_pipeline.config import TrainConfig
from nf_pipeline.core.layout import laid_out
from nf_pipeline.core.memory import LiveBytes
from nf_pipeline.core.probe import fake_copy
from nf_pipeline.core.profiler import Shape, count_params, fit_line, forward_flops
from nf_pipeline.core.train_step import Precision, autocast
from nf_pipeline.core.user_code import user_code
from nf_pipeline.plans import UnitProfile, UnitSpan
from nf_pipeline.samples import InputSpec

_CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class PartBytes:
    """Bytes that a layer or a head holds in a training step with some batch.

    Attributes:
        weights: all weights that get a gradient.
        buffers: all other weights, and buffers.
        out: what it returns.
        kept: from its forward to its backward pass, `out` included.
        forward: the most that its forward pass holds, `kept` included.
        backward: the most that its backward pass holds on top of `kept`, with the gradient of its output and
            without those of its weights.
    """

    weights: int
    buffers: int
    out: int
    kept: int
    forward: int
    backward: int


@dataclass(frozen=True, kw_only=True)
class Head:
    """A head to look at.

    Attributes:
        module: on the CPU; left as it is.
        is_contiguous: its input is made so: it is the model's own classifier.
        loss: what the unit's loss computes of the same input beside the head; None, nothing.
    """

    module: nn.Module
    is_contiguous: bool
    loss: nn.Module | None = None


@dataclass(frozen=True, kw_only=True)
class _End:
    """What stands at a unit's end, looked at: bytes per batch size, and what a head says of itself."""

    head: list[PartBytes]
    loss: list[PartBytes | None]
    head_params: int
    head_flops: int


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a part is looked at with.

    Attributes:
        shape: of one sample.
        batch_sizes: each is looked at.
        dtype: bfloat16 where the layer before ran under autocast; int64 of tokens, which get no gradient.
        is_contiguous: made so, rather than laid out for their size.
    """

    shape: Shape
    batch_sizes: Sequence[int]
    dtype: torch.dtype = torch.float32
    is_contiguous: bool = False


class UnitEstimator:
    """Profiles of units, added up from parts; each is looked at when it is first asked for.

    Args:
        layers: of the cut model, on the CPU; left as they are.
        make_head: makes a head by the layer that it is on and its name.
        ends: one sample at the input of every layer, and at the output of the last.
        train: precision and mixup of the training step.
        batch_sizes: smallest and largest, between which estimates are lines.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        make_head: Callable[[int, str], Head],
        ends: Sequence[InputSpec],
        *,
        train: TrainConfig,
        batch_sizes: Sequence[int],
    ) -> None:
        self._layers = layers
        self._make_head = make_head
        self._between = ends
        self._precision = train.precision
        self._is_mixed = train.mixup > 0.0
        self._batch_sizes = batch_sizes
        self._looked_at: dict[int, list[PartBytes]] = {}
        self._ends: dict[tuple[int, str], _End] = {}

    def profile(self, span: UnitSpan) -> UnitProfile:
        """Returns about the profile of a unit.

        Raises:
            ConfigError: a layer or the head cannot be built, or fails on fake tensors.
        """
        end = self._end(span.stop - 1, span.head)
        layers = [self._layer(layer_idx) for layer_idx in range(span.start, span.stop)]
        in_bytes = self._in_bytes(span.start)
        steps = [
            _Step(
                [layer[which] for layer in layers],
                (end.head[which], end.loss[which]),
                size * in_bytes,
                span.segment_layers,
                is_mixed=self._is_mixed,
            )
            for which, size in enumerate(self._batch_sizes)
        ]
        peaks = [step.peak_bytes for step in steps]
        slope, constant = fit_line(dict(zip(self._batch_sizes, peaks, strict=True)))
        return UnitProfile(
            unit_idx=0,
            start=span.start,
            stop=span.stop,
            segment_layers=span.segment_layers,
            head=span.head,
            bytes_per_sample=slope,
            constant_bytes=constant,
            resident_bytes=steps[0].resident_bytes,
            head_params=end.head_params,
            head_flops=end.head_flops,
        )

    def _in_bytes(self, layer_idx: int) -> int:
        """Returns what a sample takes at a unit's input, where it is as the loader makes it."""
        inputs = self._inputs(layer_idx)
        if inputs.dtype != torch.bfloat16:
            return inputs.dtype.itemsize * math.prod(inputs.shape)
        # Stored activations come as float32 and are copied.
        return (torch.float32.itemsize + torch.bfloat16.itemsize) * math.prod(inputs.shape)

    def _layer(self, layer_idx: int) -> list[PartBytes]:
        if layer_idx not in self._looked_at:
            inputs = self._inputs(layer_idx)
            self._looked_at[layer_idx] = look_at(self._layers[layer_idx], inputs, self._precision)
        return self._looked_at[layer_idx]

    def _end(self, layer_idx: int, name: str) -> _End:
        """Returns what the head on a layer and the loss there hold."""
        if (layer_idx, name) not in self._ends:
            head = self._make_head(layer_idx, name)
            inputs = self._inputs(layer_idx + 1, is_contiguous=head.is_contiguous)
            nothing: list[PartBytes | None] = [None] * len(self._batch_sizes)
            self._ends[layer_idx, name] = _End(
                head=look_at(head.module, inputs, self._precision),
                loss=nothing if head.loss is None else [*look_at(head.loss, inputs, self._precision)],
                head_params=count_params(head.module),
                head_flops=forward_flops([head.module], self._between[layer_idx + 1])[0],
            )
        return self._ends[layer_idx, name]

    def _inputs(self, position: int, *, is_contiguous: bool = False) -> Inputs:
        dtype = torch.bfloat16 if position and self._precision == "bf16" else torch.float32
        return Inputs(
            shape=self._between[position].shape,
            batch_sizes=self._batch_sizes,
            dtype=torch.int64 if self._between[position].num_tokens else dtype,
            is_contiguous=is_contiguous,
        )


def look_at(module: nn.Module, inputs: Inputs, precision: Precision) -> list[PartBytes]:
    """Runs both passes of a part on fake tensors, once per batch size, and counts.

    Args:
        module: on the CPU; left as it is.
        inputs: shapes of what goes in.
        precision: of the forward pass.

    Raises:
        ConfigError: it fails on fake tensors.
    """
    failure = user_code("model: a training step on fake tensors fails", "change the model")
    with failure, FakeTensorMode(allow_non_fake_inputs=True) as fakes:
        part = fake_copy(module, fakes).train()
        return [_look(part, inputs, batch_size, precision) for batch_size in inputs.batch_sizes]


def _look(part: nn.Module, inputs: Inputs, batch_size: int, precision: Precision) -> PartBytes:
    part.zero_grad(set_to_none=True)
    meter = LiveBytes(_CPU)
    meter.track(part)
    with meter:
        x_N = torch.zeros(batch_size, *inputs.shape, dtype=inputs.dtype)
        if x_N.is_floating_point():
            # A copy: on a leaf, layers that begin in place fail.
            x_N = x_N.requires_grad_().clone()
        x_N = x_N.contiguous() if inputs.is_contiguous else laid_out(x_N)
        before = _start(meter)
        with autocast(_CPU, precision):
            out_N = part(x_N)
        kept, forward = meter.current_bytes - before, meter.peak_bytes - before
        before = _start(meter)
        if out_N.requires_grad:
            out_N.backward(torch.zeros_like(out_N))
        backward = meter.peak_bytes - before
    weights = _bytes(weight for weight in part.parameters() if weight.requires_grad)
    return PartBytes(
        weights=weights,
        buffers=_bytes([*part.parameters(), *part.buffers()]) - weights,
        out=out_N.nbytes,
        kept=kept,
        forward=forward,
        backward=max(0, backward - weights),
    )


class _Step:
    """A unit's training step on paper: what is held while each part runs, forth and back.

    Args:
        layers: of the unit.
        end: the head on the last, and what the loss computes beside it.
        in_bytes: of the batch.
        segment_layers: see `UnitSpan`.
        is_mixed: whether the batch is mixed first.
    """

    def __init__(
        self,
        layers: Sequence[PartBytes],
        end: tuple[PartBytes, PartBytes | None],
        in_bytes: int,
        segment_layers: int,
        *,
        is_mixed: bool,
    ) -> None:
        self._layers = layers
        self._head, self._loss = end
        self._in_bytes = in_bytes
        self._is_mixed = is_mixed
        size = segment_layers or len(layers)
        self._segments = [layers[start : start + size] for start in range(0, len(layers), size)]

    @property
    def resident_bytes(self) -> int:
        """Weights, momentum and buffers."""
        loss = [] if self._loss is None else [self._loss]
        return sum(2 * part.weights + part.buffers for part in (*self._layers, self._head, *loss))

    @property
    def peak_bytes(self) -> int:
        """The most that the step holds at any moment."""
        return self.resident_bytes + self._in_bytes + max([*self._forth(), *self._back()])

    def _forth(self) -> Iterator[int]:
        """Yields what each forward pass holds beside weights and batch."""
        held = 0
        if self._is_mixed:
            yield self._in_bytes
        for segment in self._segments[:-1]:
            entered = held
            for layer in segment:
                yield entered + layer.forward
                entered = held + layer.out
            held += segment[-1].out
        for layer in self._segments[-1]:
            yield held + layer.forward
            held += layer.kept
        yield held + self._head.forward
        if self._loss is not None:
            yield held + self._head.kept + self._loss.forward

    def _back(self) -> Iterator[int]:
        """Yields the same of each backward pass, and of the optimiser step."""
        last_out = self._layers[-1].out
        ends = sum(segment[-1].out for segment in self._segments[:-1])
        kept = sum(layer.kept for layer in self._segments[-1])
        gradients = waiting = 0
        if self._loss is not None:
            # It ran last, so it is the first to go back; what it gives the output waits for what the head gives it.
            gradients, waiting = self._loss.weights, last_out
            yield gradients + ends + kept + self._head.kept + self._loss.kept + self._loss.backward
        gradients += self._head.weights
        yield gradients + ends + kept + self._head.kept + self._head.backward + waiting
        yield gradients + ends + kept + 3 * waiting
        for segment in reversed(self._segments):
            if segment is not self._segments[-1]:
                # Computed again; what the next segment began with goes.
                kept = sum(layer.kept for layer in segment)
                ends -= segment[-1].out
            for layer in reversed(segment):
                gradients += layer.weights
                # The unit's output waits for the next unit.
                waiting = 0 if layer is self._layers[-1] else last_out
                yield gradients + ends + kept + layer.backward + waiting
                kept -= layer.kept
        yield gradients + last_out


def _start(meter: LiveBytes) -> int:
    meter.reset_peak()
    return meter.current_bytes


def _bytes(tensors: Iterator[torch.Tensor] | Sequence[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
