"""Reads a model's forward pass into a graph of its operations (torch.fx), or says why that is impossible.

The graph must stand for the model in training and in evaluation alike: what depends on the data, on tensors
made on the way, or on `self.training` outside of an `nn` module would be frozen into it, so it is refused.
Knows nothing of layers. Entry: `trace_model`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import fx, nn

from nf_pipeline.core.user_code import user_code
from nf_pipeline.errors import ConfigError

BY_HAND = (
    "change the module, or give the model a method nf_layers(self) that returns its modules in order, "
    "the last one being the classifier"
)


def trace_model(model: nn.Module) -> fx.Graph:
    """Records the operations of `model.forward(x)` in the order in which they run.

    Modules of `torch.nn` stay single nodes, all others are entered; of the forward pass's arguments only the
    first is a variable, the others keep their defaults. The model is not changed.

    Raises:
        ConfigError: the forward pass depends on data or on the mode, or returns anything but one tensor.
    """
    with mode_of(model, training=True):
        graph = _trace(model)
    with mode_of(model, training=False):
        _check_modes_agree(model, graph, _trace(model))
    _check_no_functional_dropout(model, graph)
    _check_output(model, graph)
    return graph


@contextmanager
def mode_of(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Puts every module into one mode and restores each one's own afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def module_path(node: fx.Node) -> str:
    """Names the innermost module whose forward pass holds the node; "" for the model itself."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return stack[-1][0] if stack else ""


def operation_name(node: fx.Node) -> str:
    """Names what a function or method node calls, such as "conv2d"; "" for other nodes."""
    if node.op == "call_function":
        return getattr(node.target, "__name__", "")
    return str(node.target) if node.op == "call_method" else ""


class _Tracer(fx.Tracer):
    # Without it, what forward computes from a buffer would be a constant.
    proxy_buffer_attributes = True

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        # One variable only: an optional second argument as a variable would hide its default from the model.
        return root_fn, [self.root, self.create_proxy("placeholder", "x", (), {})]

    def get_fresh_qualname(self, prefix: str) -> str:
        # Called for tensors that are no parameters or buffers; fx would keep their values of this one run.
        raise ValueError("a tensor is created inside forward; register it as a buffer instead")


def _trace(model: nn.Module) -> fx.Graph:
    tracer = _Tracer()
    try:
        with user_code("", BY_HAND):
            return tracer.trace(model)
    except ConfigError as error:
        where = _describe(model, next(reversed(tracer.module_stack.values()), ("",))[0])
        raise ConfigError(f"{where} cannot be cut{error.what}", BY_HAND) from error.__cause__


def _check_modes_agree(model: nn.Module, training: fx.Graph, evaluation: fx.Graph) -> None:
    nodes, others = list(training.nodes), list(evaluation.nodes)
    # Both end with the output: the shorter list differs from the other there, if not before.
    pairs = zip(nodes, others, strict=False)
    different = next(((node, other) for node, other in pairs if _key(node) != _key(other)), None)
    if different is None:
        return
    node = different[0] if different[0].op != "output" else different[1]
    raise ConfigError(
        f"{_describe(model, module_path(node))} cannot be cut: its operations differ between training "
        f"and evaluation, first at {node.name} (functional dropout, `if self.training`, or state that "
        f"calls change)",
        f"use nn.Dropout and other nn modules, which know the mode, or {BY_HAND}",
    )


def _key(node: fx.Node) -> tuple[str, str, str, str]:
    return node.op, str(node.target), repr(node.args), repr(node.kwargs)


def _check_no_functional_dropout(model: nn.Module, graph: fx.Graph) -> None:
    for node in graph.nodes:
        if node.op == "call_function" and "dropout" in operation_name(node):
            raise ConfigError(
                f"{_describe(model, module_path(node))} cannot be cut: {operation_name(node)} is called "
                f"with a constant mode, so it would act in evaluation too",
                f"use nn.Dropout, or {BY_HAND}",
            )


def _check_output(model: nn.Module, graph: fx.Graph) -> None:
    output = next(node for node in graph.nodes if node.op == "output").args[0]
    if not isinstance(output, fx.Node):
        raise ConfigError(
            f"{_describe(model, '')} returns {type(output).__name__}, want one tensor of logits",
            "return the logits only",
        )


def _describe(model: nn.Module, path: str) -> str:
    module = model.get_submodule(path)
    return f"module {path} ({type(module).__name__})" if path else f"model {type(model).__name__}"
