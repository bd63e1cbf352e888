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
from nf_pipeline.core.context import Context
from nf_pipeline.core.layout import laid_out
from nf_pipeline.core.memory import LiveBytes
from nf_pipeline.core.probe import fake_copy
from nf_pipeline.core.profiler import Shape, context_costs, count_params, fit_line, forward_flops
from nf_pipeline.core.train_step import Precision, autocast
from nf_pipeline.core.user_code import user_code
from nf_pipeline.plans import UnitProfile, UnitSpan
from nf_pipeline.samples import InputSpec

_CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class PartBytes:
    """Bytes that a layer, a head or a context holds in a training step with some batch.

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


NOTHING = PartBytes(weights=0, buffers=0, out=0, kept=0, forward=0, backward=0)
"""What a part that is not there holds."""


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
class _Entrance:
    """What stands before a unit's layers, looked at: bytes per batch size, and the fields of its profile."""

    context: list[PartBytes]
    costs: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What enters a unit.

    Attributes:
        batch: bytes of the unit's input, as the loader makes it.
        sample: of the network's own samples beside it.
        context: what adds an encoding of these; `NOTHING` where there is none.
        is_mixed: whether both are mixed first.
    """

    batch: int
    sample: int
    context: PartBytes
    is_mixed: bool


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a part is looked at with.

    Attributes:
        shape: of one sample.
        batch_sizes: each is looked at.
        dtype: bfloat16 where the layer before ran under autocast; int64 of tokens, which get no gradient.
        is_contiguous: made so, rather than laid out for their size.
        has_gradient: gets one in the backward pass, where it is no token; the network's own sample gets none.
    """

    shape: Shape
    batch_sizes: Sequence[int]
    dtype: torch.dtype = torch.float32
    is_contiguous: bool = False
    has_gradient: bool = True


class UnitEstimator:
    """Profiles of units, added up from parts; each is looked at when it is first asked for.

    Args:
        layers: of the cut model, on the CPU; left as they are.
        make_head: makes a head by the layer that it is on and its name.
        ends: one sample at the input of every layer, and at the output of the last.
        train: precision and mixup of the training step.
        batch_sizes: smallest and largest, between which estimates are lines.
        sample: the network's own, where units look at it.
        make_context: makes the context of a unit that begins with a layer, None where it has none.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        make_head: Callable[[int, str], Head],
        ends: Sequence[InputSpec],
        *,
        train: TrainConfig,
        batch_sizes: Sequence[int],
        sample: InputSpec | None = None,
        make_context: Callable[[int], Context | None] = lambda _: None,
    ) -> None:
        self._layers = layers
        self._make_head = make_head
        self._between = ends
        self._precision = train.precision
        self._is_mixed = train.mixup > 0.0
        self._batch_sizes = batch_sizes
        self._sample = sample
        self._make_context = make_context
        self._looked_at: dict[int, list[PartBytes]] = {}
        self._entrances: dict[int, _Entrance] = {}
        self._ends: dict[tuple[int, str], _End] = {}

    def profile(self, span: UnitSpan) -> UnitProfile:
        """Returns about the profile of a unit.

        Raises:
            ConfigError: a layer or the head cannot be built, or fails on fake tensors.
        """
        end = self._end(span.stop - 1, span.head)
        layers = [self._layer(layer_idx) for layer_idx in range(span.start, span.stop)]
        entrance = self._entrance(span.start)
        entries = [
            Entry(
                batch=size * self._in_bytes(span.start, entrance),
                sample=size * self._sample_bytes(span.start),
                context=entrance.context[which],
                is_mixed=self._is_mixed,
            )
            for which, size in enumerate(self._batch_sizes)
        ]
        steps = [
            _Step(entry, [layer[which] for layer in layers], (end.head[which], end.loss[which]), span.segment_layers)
            for which, entry in enumerate(entries)
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
            **entrance.costs,
        )

    def _in_bytes(self, layer_idx: int, entrance: _Entrance) -> int:
        """Returns what a sample takes at a unit's input, where it is as the loader makes it."""
        inputs = self._inputs(layer_idx)
        if inputs.dtype != torch.bfloat16:
            return inputs.dtype.itemsize * math.prod(inputs.shape)
        # Stored activations come as float32 and are copied, unless what the context adds makes the copy.
        itemsize = torch.float32.itemsize + (0 if entrance.costs else torch.bfloat16.itemsize)
        return itemsize * math.prod(inputs.shape)

    def _sample_bytes(self, layer_idx: int) -> int:
        """Returns what the network's own sample takes beside a unit's input; 0 where it is the input."""
        if self._sample is None:
            return 0
        itemsize = (torch.int64 if self._sample.num_tokens else torch.float32).itemsize
        copies = self._is_mixed + (layer_idx > 0)
        return copies * itemsize * math.prod(self._sample.shape)

    def _entrance(self, layer_idx: int) -> _Entrance:
        """Returns what the context of a unit that begins with a layer holds."""
        if layer_idx not in self._entrances:
            context = self._make_context(layer_idx)
            self._entrances[layer_idx] = _Entrance(context=[NOTHING] * len(self._batch_sizes), costs={})
            if context is not None:
                sample = self._inputs(0, has_gradient=False)
                entering = _Entering(context, self._between[layer_idx].shape)
                self._entrances[layer_idx] = _Entrance(
                    context=look_at(entering, sample, self._precision), costs=context_costs(context, self._sample)
                )
        return self._entrances[layer_idx]

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

    def _inputs(self, position: int, *, is_contiguous: bool = False, has_gradient: bool = True) -> Inputs:
        dtype = torch.bfloat16 if position and self._precision == "bf16" else torch.float32
        return Inputs(
            shape=self._between[position].shape,
            batch_sizes=self._batch_sizes,
            dtype=torch.int64 if self._between[position].num_tokens else dtype,
            is_contiguous=is_contiguous,
            has_gradient=has_gradient,
        )


class _Entering(nn.Module):
    """The network's own samples -> a unit's input with the context added, which is made here and freed."""

    def __init__(self, context: Context, in_shape: Shape) -> None:
        super().__init__()
        self.context = context
        self._in_shape = in_shape

    def forward(self, sample_N: torch.Tensor) -> torch.Tensor:
        x_N = torch.zeros(len(sample_N), *self._in_shape)
        return self.context.added_to(x_N, sample_N)


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
        if inputs.has_gradient and x_N.is_floating_point():
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
        entry: what the layers are given.
        layers: of the unit.
        end: the head on the last, and what the loss computes beside it.
        segment_layers: see `UnitSpan`.
    """

    def __init__(
        self,
        entry: Entry,
        layers: Sequence[PartBytes],
        end: tuple[PartBytes, PartBytes | None],
        segment_layers: int,
    ) -> None:
        self._entry = entry
        self._layers = layers
        self._head, self._loss = end
        size = segment_layers or len(layers)
        self._segments = [layers[start : start + size] for start in range(0, len(layers), size)]

    @property
    def resident_bytes(self) -> int:
        """Weights, momentum and buffers."""
        loss = [] if self._loss is None else [self._loss]
        parts = (self._entry.context, *self._layers, self._head, *loss)
        return sum(2 * part.weights + part.buffers for part in parts)

    @property
    def peak_bytes(self) -> int:
        """The most that the step holds at any moment."""
        moments = [*self._enter(), *(self._entered + held for held in (*self._forth(), *self._back()))]
        return self.resident_bytes + self._entry.sample + max(moments)

    @property
    def _entered(self) -> int:
        """What the layers begin with, held until the end of the step: the batch, or with the context what it made."""
        return self._entry.context.kept or self._entry.batch

    def _enter(self) -> Iterator[int]:
        """Yields what is held before the layers run, beside weights and samples."""
        if self._entry.is_mixed:
            yield 2 * self._entry.batch
        # The look at a context made a batch of its own, of float32 as this one.
        yield self._entry.context.forward

    def _forth(self) -> Iterator[int]:
        """Yields what each forward pass holds beside weights and what has entered."""
        held = 0
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
        gradients += self._entry.context.weights
        yield gradients + self._entry.context.backward + last_out


def _start(meter: LiveBytes) -> int:
    meter.reset_peak()
    return meter.current_bytes


def _bytes(tensors: Iterator[torch.Tensor] | Sequence[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
