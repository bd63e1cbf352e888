"""Decides where a traced model is cut into layers and where its own classifier begins.

A model may be cut where exactly one value crosses, its channels first. Not every such place is used: what follows
a convolution (normalisation, activation, pooling) stays with it, and residual blocks stay whole. Looks only at the
graph; builds no modules. Entry: `find_cuts`.
"""

import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import fx, nn

from nf_pipeline.core.trace import BY_HAND, operation_name
from nf_pipeline.errors import ConfigError

CONVOLUTIONS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
_CONV_FUNCTIONS = {
    *("conv1d", "conv2d", "conv3d"),
    *("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
}
_TAIL_MODULES = (
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.Flatten, nn.Linear),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout),
    *(nn.RNNBase,),
)
_TAIL_FUNCTIONS = {
    *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"),
    *("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d"),
    *("avg_pool1d", "avg_pool2d", "avg_pool3d", "mean", "amax", "max", "linear"),
    *("flatten", "view", "reshape", "squeeze"),
}
_RESHAPES = {"view", "reshape", "flatten", "unflatten", "unfold"}
_CHANNELS_TO_THE_END = {(0, 2, 3, 1), (0, 2, 3, 4, 1)}
_CHANNELS_BACK = {(0, 3, 1, 2), (0, 4, 1, 2, 3)}
# Of series and texts the same permutation does both. Pictures and volumes have other uses for it.
_CHANNELS_SWAPPED = (0, 2, 1)
_SWAPS = {"transpose", "swapaxes", "swapdims"}


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Consecutive nodes of the graph.

    Attributes:
        name: path of the block, or of the first module with weights.
        nodes: in order.
        source: the one value from before that the nodes use.
        result: the one value that is used after them.
    """

    name: str
    nodes: tuple[fx.Node, ...]
    source: fx.Node
    result: fx.Node


@dataclass(frozen=True)
class _Span:
    """Half-open range of positions in the list of nodes."""

    start: int
    stop: int


def find_cuts(model: nn.Module, graph: fx.Graph, *, is_series: bool = False) -> list[Piece]:
    """Splits the graph into layers, in order, and the classifier, the last piece.

    - A layer begins with an operation that has weights; operations without weights, and normalisation, join
      the layer before them.
    - A class with several instances, one of which has a skip connection inside, is a block; each of its
      instances is one layer, also those without a skip (the strided ones of MobileNetV2).
    - Between a permutation to (N, H, W, C) and the one back no layer ends: heads take (N, C, H, W). What an
      embedding returns is channels last from the start; what a convolution returns is channels first.
    - The classifier begins with the first pooling, flattening, dropout or linear operation after the last
      convolution.

    Args:
        model: as it was recorded.
        graph: its operations.
        is_series: whether a sample is (C, L), or (L,) tokens: transposing it turns channels first into channels last.

    Raises:
        ConfigError: no convolution, no classifier, no place where a single value crosses, or most of the model's
            blocks follow its last convolution.
    """
    return _Cutter(model, graph, is_series=is_series).pieces()


class _Cutter:
    """The nodes of one graph by position; place i lies before operation i."""

    def __init__(self, model: nn.Module, graph: fx.Graph, *, is_series: bool) -> None:
        self.model = model
        self.modules = dict(model.named_modules())
        self.placeholder = next(node for node in graph.nodes if node.op == "placeholder")
        self.output = next(node for node in graph.nodes if node.op == "output")
        self.nodes = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
        self.crossing = _crossing_values([self.placeholder, *self.nodes, self.output])
        self.channels_last = self._channels_last_values(is_series=is_series)
        self.blocks = self._find_blocks()

    def pieces(self) -> list[Piece]:
        if not self.placeholder.users:
            raise self._error("it does not use its input")
        segments = self._segments()
        last_conv = max((i for i, s in enumerate(segments) if self._has(s, self._is_conv)), default=None)
        if last_conv is None:
            raise self._error("it has no convolution")
        after = range(last_conv + 1, len(segments))
        tail = next((i for i in after if self._has(segments[i], self._is_tail_op)), None)
        if tail is None:
            raise self._error(self._why_no_tail(segments[last_conv]))
        layers, classifier = self._join(segments[:tail]), _Span(segments[tail].start, len(self.nodes))
        self._check_classifier(classifier, len(layers))
        return [self._piece(span) for span in [*layers, classifier]]

    def _check_classifier(self, classifier: _Span, num_layers: int) -> None:
        """Refuses what is no CNN: vision transformers and mixers have one convolution, then blocks without any."""
        blocks = [path for path, span in self.blocks.items() if span.start >= classifier.start]
        blocks += [path for node in self.nodes[classifier.start :] for path in self._attentions(node)]
        if len(blocks) > num_layers:
            raise self._error(
                f"{len(blocks)} blocks ({blocks[0]}, ...) follow its last convolution, and {num_layers} layers come "
                f"before; heads take channels first"
            )

    def _attentions(self, node: fx.Node) -> list[str]:
        """Lists the attention layers of a module that was not entered."""
        if node.op != "call_module":
            return []
        parts = self.modules[node.target].named_modules(prefix=str(node.target))
        return [path for path, part in parts if isinstance(part, nn.MultiheadAttention)]

    def _channels_last_values(self, *, is_series: bool) -> set[fx.Node]:
        """Finds what is computed after channels became the last axis, and before they are the first again."""
        found: set[fx.Node] = set()
        for node in self.nodes:
            axes = _permutation(node, is_series=is_series)
            # What comes out of these is no map, or one that is not known.
            is_reshaped = operation_name(node) in _RESHAPES
            is_turned = not is_reshaped and any(source in found for source in node.all_input_nodes)
            if axes == _CHANNELS_SWAPPED and is_series:
                is_last = not is_turned
            elif self._is_embedding(node) or axes in _CHANNELS_TO_THE_END:
                is_last = True
            else:
                is_last = is_turned and axes not in _CHANNELS_BACK and not self._convolves(node)
            if is_last:
                found.add(node)
        return found

    def _is_embedding(self, node: fx.Node) -> bool:
        return self._calls_one_of(node, (nn.Embedding,)) or operation_name(node) == "embedding"

    def _convolves(self, node: fx.Node) -> bool:
        """Whether a node is a convolution itself: unlike a module that holds one, it returns channels first."""
        is_conv_module = node.op == "call_module" and isinstance(self.modules[node.target], CONVOLUTIONS)
        return is_conv_module or operation_name(node) in _CONV_FUNCTIONS

    def _segments(self) -> list[_Span]:
        """Ranges between neighbouring places at which the graph may be cut."""
        inside = {i for span in self.blocks.values() for i in range(span.start + 1, span.stop)}
        places = [i for i in range(1, len(self.nodes)) if self._is_single_map(i) and i not in inside]
        bounds = [0, *places, len(self.nodes)]
        return [_Span(start, stop) for start, stop in pairwise(bounds)]

    def _is_single_map(self, place: int) -> bool:
        crossing = self.crossing[place]
        return len(crossing) == 1 and crossing[0] not in self.channels_last and not _is_taken_apart(crossing[0])

    def _join(self, segments: list[_Span]) -> list[_Span]:
        """Begins a layer at each segment with weights; what comes before the first one joins it."""
        starts = [segment.start for segment in segments if self._has(segment, self._is_weighted)]
        bounds = [0, *starts[1:], segments[-1].stop]
        return [_Span(start, stop) for start, stop in pairwise(bounds)]

    def _piece(self, span: _Span) -> Piece:
        (source,) = self.crossing[span.start]
        (result,) = self.crossing[span.stop]
        return Piece(
            name=self._name(span),
            nodes=tuple(self.nodes[span.start : span.stop]),
            source=source,
            result=result,
        )

    def _name(self, span: _Span) -> str:
        for i in range(span.start, span.stop):
            if self._is_weighted(self.nodes[i]):
                block = next((path for path, b in self.blocks.items() if b.start <= i < b.stop), None)
                return (block or _weighted_path(self.nodes[i])).partition("@")[0]
        return str(self.nodes[span.start].name)

    def _has(self, span: _Span, test: Callable[[fx.Node], bool]) -> bool:
        return any(test(node) for node in self.nodes[span.start : span.stop])

    def _is_weighted(self, node: fx.Node) -> bool:
        """Whether the node has a weight matrix or kernel of its own; normalisation has only vectors."""
        if node.op == "call_module":
            module = self.modules[node.target]
            return not isinstance(module, nn.LayerNorm) and any(p.dim() > 1 for p in module.parameters())
        if node.op == "get_attr":
            value = _attribute(self.model, node.target)
            return isinstance(value, nn.Parameter) and value.dim() > 1
        return False

    def _is_conv(self, node: fx.Node) -> bool:
        return self._calls_one_of(node, CONVOLUTIONS) or operation_name(node) in _CONV_FUNCTIONS

    def _is_tail_op(self, node: fx.Node) -> bool:
        return self._calls_one_of(node, _TAIL_MODULES) or operation_name(node) in _TAIL_FUNCTIONS

    def _calls_one_of(self, node: fx.Node, classes: tuple[type[nn.Module], ...]) -> bool:
        """Whether the node calls such a module, or one that holds one and was not entered."""
        return node.op == "call_module" and any(isinstance(m, classes) for m in self.modules[node.target].modules())

    def _find_blocks(self) -> dict[str, _Span]:
        """Finds the calls of block classes: path -> range of nodes."""
        calls = self._calls()
        counts = Counter(cls for cls, _ in calls.values())
        skipping = {cls for cls, span in calls.values() if counts[cls] > 1 and self._has_skip(span)}
        stages = {
            cls for path, (cls, _) in calls.items() if cls in skipping and _holds_two(path, cls, calls, skipping)
        }
        blocks = skipping - stages
        inner = {path: span for path, (cls, span) in calls.items() if cls in blocks}
        return {p: s for p, s in inner.items() if not any(_is_below(p, other) for other in inner)}

    def _calls(self) -> dict[str, tuple[type, _Span]]:
        """Lists every call of a module that was entered, with the range of its nodes."""
        calls: dict[str, tuple[type, _Span]] = {}
        for i, node in enumerate(self.nodes):
            for path, (_, cls) in node.meta.get("nn_module_stack", {}).items():
                if isinstance(cls, type) and not issubclass(cls, nn.Sequential):
                    start = calls[path][1].start if path in calls else i
                    calls[path] = (cls, _Span(start, i + 1))
        return calls

    def _has_skip(self, span: _Span) -> bool:
        """Whether a value by-passes operations inside the range, apart from those that by-pass all of it.

        Weights that wait for the operation that takes them by-pass nothing.
        """
        outer = set(self.crossing[span.start]) & set(self.crossing[span.stop])
        inside = (set(self.crossing[i]) - outer for i in range(span.start + 1, span.stop))
        return any(sum(node.op != "get_attr" for node in values) > 1 for values in inside)

    def _why_no_tail(self, segment: _Span) -> str:
        turned = next((node for node in self.nodes[segment.start : segment.stop] if node in self.channels_last), None)
        if turned is not None:
            return f"its channels are the last axis from {turned.name} on, and heads take them first: (N, C, ...)"
        places = range(segment.start + 1, segment.stop)
        widest = max(places, key=lambda i: len(self.crossing[i]), default=None)
        if widest is None or len(self.crossing[widest]) < 2:
            return "no pooling, flattening, dropout or linear operation follows its last convolution"
        names = ", ".join(str(node.name) for node in self.crossing[widest][:3])
        return f"the values {names} are all used after {self.nodes[widest - 1].name}, up to the classifier"

    def _error(self, reason: str) -> ConfigError:
        return ConfigError(f"model {type(self.model).__name__} cannot be cut into layers: {reason}", BY_HAND)


def _crossing_values(nodes: list[fx.Node]) -> list[list[fx.Node]]:
    """Lists for each place i the values made before operation i and used by it or later.

    Place 0 is before the first operation (nodes[0] is the input), the last place before the output.
    """
    index = {node: i for i, node in enumerate(nodes)}
    last_use = [max((index[user] for user in node.users), default=i) for i, node in enumerate(nodes)]
    return [[nodes[i] for i in range(place) if last_use[i] >= place] for place in range(1, len(nodes))]


def _is_taken_apart(node: fx.Node) -> bool:
    """Whether a value is several tensors, such as what `chunk` and `max` return."""
    return any(
        (user.target is operator.getitem and isinstance(user.args[1], int))
        or (user.target is getattr and user.args[1] in ("values", "indices"))
        for user in node.users
    )


def _permutation(node: fx.Node, *, is_series: bool) -> tuple[int, ...] | None:
    """Returns the order of axes that a node permutes to; None where it does not, or it cannot be told."""
    if is_series and (_swaps_last_axes(node) or (node.target is getattr and node.args[1] in ("mT", "mH"))):
        return _CHANNELS_SWAPPED
    if operation_name(node) != "permute":
        return None
    axes = node.args[1:] or (node.kwargs.get("dims"),)
    axes = axes[0] if len(axes) == 1 else axes
    if not isinstance(axes, tuple | list) or not all(isinstance(axis, int) for axis in axes):
        return None
    return tuple(axis % len(axes) for axis in axes)


def _swaps_last_axes(node: fx.Node) -> bool:
    if operation_name(node) not in _SWAPS:
        return False
    axes = (*node.args[1:], *node.kwargs.values())
    return len(axes) == 2 and all(isinstance(axis, int) for axis in axes) and {axis % 3 for axis in axes} == {1, 2}


def _holds_two(path: str, cls: type, calls: dict[str, tuple[type, _Span]], classes: set[type]) -> bool:
    """Whether a call holds several calls of one of the classes: a stage of blocks, not a block."""
    below = Counter(other for p, (other, _) in calls.items() if _is_below(p, path) and other is not cls)
    return any(below[other] > 1 for other in classes)


def _is_below(path: str, ancestor: str) -> bool:
    return path.startswith(ancestor + ".")


def _weighted_path(node: fx.Node) -> str:
    target = str(node.target)
    return target if node.op == "call_module" else target.rpartition(".")[0] or target


def _attribute(model: nn.Module, target: str) -> torch.Tensor | None:
    path, _, name = target.rpartition(".")
    return getattr(model.get_submodule(path), name, None)
