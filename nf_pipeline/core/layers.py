"""Cuts a model into an ordered list of layers and its classifier, sharing its weights and buffers.

The cut model computes exactly what the uncut one does: each piece replays the recorded operations. Knows
nothing of heads, units or training. Entry: `cut`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn

from nf_pipeline.core.cut_points import CONVOLUTIONS, Piece, find_cuts
from nf_pipeline.core.probe import has_values, probe_input, run_probe
from nf_pipeline.core.trace import BY_HAND, mode_of, trace_model
from nf_pipeline.core.user_code import user_code
from nf_pipeline.errors import ConfigError
from nf_pipeline.samples import InputSpec


@dataclass(frozen=True, kw_only=True)
class CutModel:
    """A model as a chain: layers, then the classifier.

    Invariants: `whole()` equals the uncut model; no parameter or buffer belongs to two pieces.

    Attributes:
        layers: each maps x_N to the next layer's input; from the first one's output on channels are the second axis.
        tail: the model's own classifier, features -> logits_NK.
        names: per layer, the path of its block or first module with weights in the uncut model.
        out_shapes: per layer, one sample's output: (C, *sides), or (F,) where the layer already pools.
        inputs: what the first layer takes.
    """

    layers: tuple[nn.Module, ...]
    tail: nn.Module
    names: tuple[str, ...]
    out_shapes: tuple[tuple[int, ...], ...]
    inputs: InputSpec

    def whole(self) -> nn.Sequential:
        """Returns layers and classifier as one module, as backpropagation would train it."""
        return nn.Sequential(*self.layers, self.tail)


def cut(model: nn.Module, inputs: InputSpec) -> CutModel:
    """Cuts a model into layers (`find_cuts` has the rules) or takes the cut from its `nf_layers()`.

    Costs two forward passes of two samples in evaluation mode: the result is compared with the uncut model
    (shapes only when the model was built under FakeTensorMode).

    Args:
        inputs: what it takes.

    Raises:
        ConfigError: the model cannot be cut, a weight would belong to two layers, or the layers compute
            something else than the model.
    """
    with user_code(f"model {type(model).__name__} cannot be cut into layers", BY_HAND):
        return _cut(model, inputs)


def _cut(model: nn.Module, inputs: InputSpec) -> CutModel:
    names, modules = _layers_by_hand(model) if hasattr(model, "nf_layers") else _layers_by_trace(model, inputs)
    _check_nothing_shared(names, modules)
    out_shapes = _probe(model, names, modules, inputs)
    return CutModel(
        layers=tuple(modules[:-1]),
        tail=modules[-1],
        names=tuple(names[:-1]),
        out_shapes=tuple(out_shapes[:-1]),
        inputs=inputs,
    )


def _layers_by_trace(model: nn.Module, inputs: InputSpec) -> tuple[list[str], list[nn.Module]]:
    recording = trace_model(model)
    reasons = [error for cls, error in recording.kept_whole.items() if _hides_convolutions(model, cls)]
    try:
        is_series = len(inputs.shape) == (1 if inputs.num_tokens else 2)
        pieces = find_cuts(model, recording.graph, is_series=is_series)
    except ConfigError as error:
        if not reasons:
            raise
        raise reasons[0] from error
    if reasons and len(pieces) == 2:
        # What could not be entered is all of the network but its classifier.
        raise reasons[0]
    return [piece.name for piece in pieces], [_build_piece(model, piece) for piece in pieces]


def _hides_convolutions(model: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether a module of the class, if it cannot be entered, hides where the model might be cut."""
    return any(
        type(module) is cls and sum(isinstance(part, CONVOLUTIONS) for part in module.modules()) > 1
        for module in model.modules()
    )


def _build_piece(model: nn.Module, piece: Piece) -> fx.GraphModule:
    """Makes a module of a piece; it holds the model's own submodules under their names in the model."""
    graph = fx.Graph()
    copies = {piece.source: graph.placeholder("x")}
    for node in piece.nodes:
        copies[node] = graph.node_copy(node, lambda value: copies[value])
    graph.output(copies[piece.result])
    return fx.GraphModule(model, graph, class_name="Layer")


def _layers_by_hand(model: nn.Module) -> tuple[list[str], list[nn.Module]]:
    with user_code(f"{type(model).__name__}.nf_layers fails", BY_HAND):
        modules = model.nf_layers()
    if not isinstance(modules, Sequence | nn.Sequential | nn.ModuleList) or not all(
        isinstance(module, nn.Module) for module in modules
    ):
        raise ConfigError(
            f"{type(model).__name__}.nf_layers returns {type(modules).__name__}, want a list of nn.Module",
            "return the layers in order, then the classifier",
        )
    if len(modules) < 2:
        raise ConfigError(
            f"{type(model).__name__}.nf_layers returns {len(modules)} modules, want 2 or more",
            "return at least one layer, then the classifier",
        )
    paths = {module: path for path, module in model.named_modules()}
    return [paths.get(module) or f"nf_layers.{i}" for i, module in enumerate(modules)], list(modules)


def _check_nothing_shared(names: list[str], modules: list[nn.Module]) -> None:
    owners: dict[int, tuple[int, str]] = {}
    for idx, module in enumerate(modules):
        for path, tensor in [*module.named_parameters(), *module.named_buffers()]:
            owner, first_path = owners.setdefault(id(tensor), (idx, path))
            if owner != idx:
                raise ConfigError(
                    f"{first_path} of layer {owner} ({names[owner]}) is also {path} of layer {idx} "
                    f"({names[idx]}): a weight that two layers share cannot be trained locally",
                    BY_HAND + "; whatever shares weights must be in one of them",
                )


def _probe(model: nn.Module, names: list[str], modules: list[nn.Module], inputs: InputSpec) -> list[tuple[int, ...]]:
    """Returns one sample's shape after each piece; compares what the last one gives with the uncut model."""
    x_NCHW = probe_input(model, inputs)
    shapes = []
    with torch.no_grad(), mode_of(nn.ModuleList([model, *modules]), training=False):
        want_NK = run_probe(type(model).__name__, model, x_NCHW)
        got = probe_input(model, inputs)  # made anew: the model may have changed its input in place
        for name, module in zip(names, modules, strict=True):
            got = run_probe(f"layer {name}", module, got)
            shapes.append(tuple(got.shape[1:]))
        _check_equal(model, got, want_NK)
    return shapes


def _check_equal(model: nn.Module, got_NK: torch.Tensor, want_NK: torch.Tensor) -> None:
    same_shape = got_NK.shape == want_NK.shape
    if same_shape and not has_values(got_NK):
        return
    # Not torch.equal: a layer given by hand may compute the same by other operations.
    if not same_shape or not torch.allclose(got_NK, want_NK, rtol=1e-3, atol=1e-5, equal_nan=True):
        raise ConfigError(
            f"the layers of {type(model).__name__} compute something else than the model itself "
            f"({_difference(got_NK, want_NK)}): its forward pass is random, keeps state between calls, or "
            f"depends on what fx cannot see",
            BY_HAND,
        )


def _difference(got_NK: torch.Tensor, want_NK: torch.Tensor) -> str:
    if got_NK.shape != want_NK.shape:
        return f"got shape {tuple(got_NK.shape)}, want {tuple(want_NK.shape)}"
    return f"largest difference {(got_NK - want_NK).abs().max().item():.3g}"
