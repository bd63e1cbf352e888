"""Reads a model's forward pass into a graph of its operations (torch.fx), or says why that is impossible.

The graph must stand for the model in training and in evaluation alike. Where operations are the same and only take
`self.training`, the mode becomes a value of the graph. What depends on the data, on tensors made on the way, or runs
other operations in training would be frozen into it: a module inside the model that does so stays one operation,
which runs its own code; if it is the model itself, that is an error.
Knows nothing of layers. Entry: `trace_model`.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from nf_pipeline.core.user_code import user_code
from nf_pipeline.errors import ConfigError

BY_HAND = (
    "change the module, or give the model a method nf_layers(self) that returns its modules in order, "
    "the last one being the classifier; each takes what the one before returns, channels first"
)


@dataclass(frozen=True, kw_only=True)
class Recording:
    """What a model does.

    Attributes:
        graph: its operations in the order in which they run.
        kept_whole: classes of modules that stayed one operation each, and why they could not be entered.
    """

    graph: fx.Graph
    kept_whole: dict[type[nn.Module], ConfigError]


def trace_model(model: nn.Module) -> Recording:
    """Records the operations of `model.forward(x)` in the order in which they run.

    Modules of `torch.nn` stay single nodes, all others are entered; of the forward pass's arguments only the
    first is a variable, the others keep their defaults. The model is not changed. A class whose operations cannot be
    recorded (stochastic depth, padding that is computed from shapes, normalisation written anew) is kept whole, and
    the model is read once more.

    Raises:
        ConfigError: the model's own forward pass depends on data or on the mode, or returns anything but one tensor.
    """
    kept_whole: dict[type[nn.Module], ConfigError] = {}
    while True:
        try:
            graph = _record(model, frozenset(kept_whole))
        except _CannotEnter as refusal:
            cls = type(model.get_submodule(refusal.path))
            if not refusal.path or cls in kept_whole:
                raise refusal.error from refusal.error.__cause__
            kept_whole[cls] = refusal.error
        else:
            return Recording(graph=graph, kept_whole=kept_whole)


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


class _CannotEnter(Exception):
    """The forward pass of the module at `path` cannot be recorded; `error` says why."""

    def __init__(self, path: str, error: ConfigError) -> None:
        super().__init__(path, error)
        self.path = path
        self.error = error


class _Tracer(fx.Tracer):
    # Without it, what forward computes from a buffer would be a constant.
    proxy_buffer_attributes = True

    def __init__(self, kept_whole: frozenset[type[nn.Module]]) -> None:
        super().__init__()
        self._kept_whole = kept_whole

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) in self._kept_whole or super().is_leaf_module(m, module_qualified_name)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        # One variable only: an optional second argument as a variable would hide its default from the model.
        return root_fn, [self.root, self.create_proxy("placeholder", "x", (), {})]

    def get_fresh_qualname(self, prefix: str) -> str:
        # Called for tensors that are no parameters or buffers; fx would keep their values of this one run.
        raise ValueError("a tensor is created inside forward; register it as a buffer instead")


def _record(model: nn.Module, kept_whole: frozenset[type[nn.Module]]) -> fx.Graph:
    with mode_of(model, training=True):
        graph = _trace(model, kept_whole)
    with mode_of(model, training=False):
        evaluation = _trace(model, kept_whole)
    _check_modes_agree(model, graph, evaluation)
    _follow_mode(graph, evaluation)
    _check_no_functional_dropout(model, graph)
    _check_output(model, graph)
    return graph


def _trace(model: nn.Module, kept_whole: frozenset[type[nn.Module]]) -> fx.Graph:
    tracer = _Tracer(kept_whole)
    try:
        with user_code("", BY_HAND):
            return tracer.trace(model)
    except ConfigError as error:
        path = next(reversed(tracer.module_stack.values()), ("",))[0]
        refusal = ConfigError(f"{_describe(model, path)} cannot be cut{error.what}", BY_HAND)
        refusal.__cause__ = error.__cause__
        raise _CannotEnter(path, refusal) from None


def _check_modes_agree(model: nn.Module, training: fx.Graph, evaluation: fx.Graph) -> None:
    nodes, others = list(training.nodes), list(evaluation.nodes)
    # Both end with the output: the shorter list differs from the other there, if not before.
    pairs = zip(nodes, others, strict=False)
    different = next(((node, other) for node, other in pairs if not _is_same(node, other)), None)
    if different is None:
        return
    node = different[0] if different[0].op != "output" else different[1]
    path = _where_modes_differ(training, evaluation)
    error = ConfigError(
        f"{_describe(model, path)} cannot be cut: its operations differ between training "
        f"and evaluation, first at {node.name} (functional dropout, `if self.training`, or state that "
        f"calls change)",
        f"use nn.Dropout and other nn modules, which know the mode, or {BY_HAND}",
    )
    raise _CannotEnter(path, error)


def _is_same(node: fx.Node, other: fx.Node) -> bool:
    """Whether two nodes do the same with the same values, but for constants that are the mode itself."""
    mine, theirs = _taken(node), _taken(other)
    return _operation(node) == _operation(other) and all(
        repr(in_training) == repr(in_evaluation) or _is_mode(in_training, in_evaluation)
        for in_training, in_evaluation in zip(mine, theirs, strict=True)
    )


def _operation(node: fx.Node) -> tuple[str, str, list[str], int]:
    return node.op, str(node.target), list(node.kwargs), len(_taken(node))


def _taken(node: fx.Node) -> list[Any]:
    """Lists what a node takes, values and constants."""
    found: list[Any] = []
    fx.node.map_aggregate((node.args, node.kwargs), found.append)
    return found


def _is_mode(in_training: Any, in_evaluation: Any) -> bool:
    return in_training is True and in_evaluation is False


def _follow_mode(graph: fx.Graph, evaluation: fx.Graph) -> None:
    """Lets operations that took the mode as a constant take the one that their layer has when it runs."""
    for node, other in zip(list(graph.nodes), list(evaluation.nodes), strict=True):
        is_mode = [_is_mode(*pair) for pair in zip(_taken(node), _taken(other), strict=True)]
        if any(is_mode):
            _put_mode(graph, node, is_mode)


def _put_mode(graph: fx.Graph, node: fx.Node, is_mode: Sequence[bool]) -> None:
    with graph.inserting_before(node):
        mode = graph.create_node("get_attr", "training")
    mode.meta = dict(node.meta)
    positions = iter(is_mode)
    node.args, node.kwargs = fx.node.map_aggregate(
        (node.args, node.kwargs), lambda value: mode if next(positions) else value
    )


def _where_modes_differ(training: fx.Graph, evaluation: fx.Graph) -> str:
    """Returns the first module whose own operations differ; "" (the model) where only their order does."""
    mine, others = _own_operations(training), _own_operations(evaluation)
    return next((path for path in {**mine, **others} if mine.get(path) != others.get(path)), "")


def _own_operations(graph: fx.Graph) -> dict[str, list[tuple[str, str, str]]]:
    """Lists by module the operations of its own forward pass, without the values and modes that they take."""
    own: dict[str, list[tuple[str, str, str]]] = defaultdict(list)
    for node in graph.nodes:
        stack = list(node.meta.get("nn_module_stack", {}).values())
        # A module that was not entered belongs to the one that calls it.
        callers = stack[:-1] if node.op == "call_module" else stack
        constants = repr([value for value in _taken(node) if not isinstance(value, fx.Node | bool)])
        own[callers[-1][0] if callers else ""].append((node.op, str(node.target), constants))
    return own


def _check_no_functional_dropout(model: nn.Module, graph: fx.Graph) -> None:
    for node in graph.nodes:
        is_dropout = node.op == "call_function" and "dropout" in operation_name(node)
        if is_dropout and not any(source.target == "training" for source in node.all_input_nodes):
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
