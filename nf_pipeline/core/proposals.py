"""Ways to form units of a network's layers: the space that the planner searches.

From a head on every layer (the paper's form) over a head every few layers to all layers with the model's own
classifier, which is plain backpropagation; each with or without activation checkpointing inside. Between them lie
units grown for a batch: as many layers as fit the budget with it, so that few heads are paid for where memory is
loose and many where it is tight. Which is fastest is for the search to find out. Entry: `propose`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from nf_pipeline.config import TrainConfig
from nf_pipeline.core.local_unit import even_spans
from nf_pipeline.plans import UnitSpan

EVEN_LENGTHS = (1, 2, 3)
GROWN = ((64, 0), (32, 0), (32, 1))
"""Batches to grow units for, and segments of layers between kept activations."""
SEGMENT_LENGTHS = (1, 2)

WIDE_HEAD = "adaptive"
NARROW_HEAD = "linear"


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """One way to form units.

    Attributes:
        name: for people.
        spans: all units, in order.
    """

    name: str
    spans: tuple[UnitSpan, ...]


def propose(
    train: TrainConfig, num_layers: int, max_batch_size: int, fits: Callable[[UnitSpan, int], bool]
) -> list[Proposal]:
    """Lists ways to form units, each once.

    Args:
        train: `unit_layers` and `local` are read.
        num_layers: of the cut model.
        max_batch_size: batches to grow units for are no larger.
        fits: whether a unit alone trains with a batch within the budget, about.
    """
    if train.unit_layers is not None:
        return [_even(num_layers, train.unit_layers)]
    if train.local == "layer":
        return [_even(num_layers, 1)]
    proposals = list(_whole(num_layers))
    if train.local == "auto":
        proposals += [_even(num_layers, length) for length in EVEN_LENGTHS if length < num_layers]
    proposals += _grown(num_layers, max_batch_size, fits)
    different: dict[tuple[UnitSpan, ...], Proposal] = {}
    for proposal in proposals:
        different.setdefault(proposal.spans, proposal)
    return list(different.values())


def propose_narrow(num_layers: int, fits: Callable[[UnitSpan], bool]) -> list[Proposal]:
    """Gives every layer a head, the narrowest one where a wide one does not fit; nothing where all do.

    Late layers are bound by their weights: next to 512 x 512 filters there is no room for 256 more.
    """
    wide = even_spans(num_layers, 1)
    narrow = tuple(span if fits(span) else span._replace(head=NARROW_HEAD) for span in wide[:-1])
    if narrow == tuple(wide[:-1]):
        return []
    return [
        Proposal(
            name=f"a head on every layer, {NARROW_HEAD} where {WIDE_HEAD} does not fit", spans=(*narrow, wide[-1])
        )
    ]


def grow_spans(num_layers: int, segment_layers: int, fits: Callable[[UnitSpan], bool]) -> tuple[UnitSpan, ...]:
    """Forms units from the front, each as long as it fits; a layer that fits nowhere is a unit of its own.

    Longer units take more memory, as a rule: the longest is searched by bisection.
    """
    spans: list[UnitSpan] = []
    while not spans or spans[-1].stop < num_layers:
        start = spans[-1].stop if spans else 0
        fitting, beyond = start + 1, num_layers + 1
        while beyond - fitting > 1:
            middle = (fitting + beyond) // 2
            if fits(_span(start, middle, segment_layers)):
                fitting = middle
            else:
                beyond = middle
        spans.append(_span(start, fitting, segment_layers))
    return tuple(spans)


def whole_network(num_layers: int) -> Proposal:
    """Returns plain backpropagation: one unit of all layers."""
    return Proposal(name="backpropagation", spans=(_span(0, num_layers),))


def _whole(num_layers: int) -> Iterator[Proposal]:
    yield whole_network(num_layers)
    for length in SEGMENT_LENGTHS:
        yield Proposal(name=f"backpropagation, {_checkpoints(length)}", spans=(_span(0, num_layers, length),))


def _even(num_layers: int, unit_layers: int) -> Proposal:
    name = "a head on every layer" if unit_layers == 1 else f"a head every {unit_layers} layers"
    return Proposal(name=name, spans=tuple(even_spans(num_layers, unit_layers)))


def _grown(num_layers: int, max_batch_size: int, fits: Callable[[UnitSpan, int], bool]) -> Iterator[Proposal]:
    for batch_size, length in GROWN:
        size = min(batch_size, max_batch_size)
        spans = grow_spans(num_layers, length, lambda span, size=size: fits(span, size))
        checkpoints = f", {_checkpoints(length)}" if length else ""
        yield Proposal(name=f"units for batch {size}{checkpoints}", spans=spans)


def _span(start: int, stop: int, segment_layers: int = 0) -> UnitSpan:
    # One segment only is none: the last one is never computed again.
    return UnitSpan(start, stop, segment_layers if segment_layers < stop - start else 0)


def _checkpoints(segment_layers: int) -> str:
    return "checkpoint every layer" if segment_layers == 1 else f"checkpoint every {segment_layers} layers"
