"""Factories that nobody should write; the tests name them as `odd_models:NAME`."""

import functools
import sys
from typing import Any

import torch
from torch import nn


def small(num_classes: int = 10, channels: int = 1) -> nn.Sequential:
    """A network that can be cut into two layers."""
    return nn.Sequential(
        nn.Conv2d(channels, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, num_classes),
    )


def _fail_on_real_batches(module: nn.Module, inputs: tuple[torch.Tensor], _output: torch.Tensor) -> None:
    if module.training and type(inputs[0]) is torch.Tensor and len(inputs[0]) > 2:  # not while it is planned
        raise ValueError("no luck today")


def fails_late(num_classes: int) -> nn.Sequential:
    model = small(num_classes)
    model[1].register_forward_hook(_fail_on_real_batches)  # a part of torch.nn, which is not traced through
    return model


class _Broken(BaseException):
    def __str__(self) -> str:
        raise RuntimeError("even its text fails")


def raises_value_error(num_classes: int) -> None:
    raise ValueError("no such\nwidth")


def raises_base_exception() -> None:
    raise _Broken


def exits() -> None:
    sys.exit(0)


def exits_with_a_text() -> None:
    sys.exit("leaving")


def recurses() -> None:
    recurses()


def raises_memory_error() -> None:
    raise MemoryError


def raises_generator_exit() -> None:
    raise GeneratorExit


def asks_for_more(num_classes: int, colour: int) -> None:
    """Never called: it takes what nobody offers."""


def returns_none() -> None:
    return None


def returns_a_class() -> type:
    return nn.ReLU


returns_text = lambda: "model"  # noqa: E731
lambda_model = lambda num_classes: small(num_classes)  # noqa: E731
cached_model = functools.cache(small)
not_callable = 5


def huge_linear(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(10**6, 10**7), nn.Linear(10**7, num_classes))


def huge_zeros() -> nn.Module:
    model = small()
    model.table = nn.Parameter(torch.zeros(2**45))
    return model


def many_large() -> nn.Module:
    return nn.ModuleList([nn.Linear(2**11, 2**11, bias=False) for _ in range(1000)])


def wrong_width(num_classes: int) -> nn.Module:
    return small(num_classes + 1)


def one_dimension(num_classes: int) -> nn.Module:
    return nn.Sequential(small(num_classes), nn.Flatten(0))


def half() -> nn.Module:
    return small().half()


def double() -> nn.Module:
    return small().double()


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return small()


def nan_weights(num_classes: int) -> nn.Module:
    model = small(num_classes)
    with torch.no_grad():
        model[0].weight.fill_(float("nan"))
    return model


def no_parameters(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())


def lazy(num_classes: int) -> nn.Module:
    return nn.Sequential(
        nn.LazyConv2d(4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(num_classes)
    )


def lazy_unused(num_classes: int) -> nn.Module:
    model = small(num_classes)
    model.register_module("extra", nn.LazyLinear(3))
    return model


def frozen(num_classes: int) -> nn.Module:
    return small(num_classes).requires_grad_(False)


def shared(num_classes: int) -> nn.Module:
    model = small(num_classes, channels=4)
    model[2].weight = model[0].weight
    return nn.Sequential(nn.Conv2d(1, 4, 1), *model)


def one_by_one(num_classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 8), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(4, num_classes)
    )


class _Forward(nn.Module):
    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.body = small(num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


def _with(**methods: Any) -> Any:
    return lambda num_classes: type("Odd", (_Forward,), methods)(num_classes)


def _fail(error: BaseException) -> Any:
    def forward(self: Any, *args: Any) -> Any:
        raise error

    return forward


class _FailsLater(nn.Module):
    """A layer that works when it is tried and not when it is trained."""

    def __init__(self, error: type[BaseException], training: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.error, self.when = error, training

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training is self.when:
            raise self.error("not in this mode")
        return self.conv(x)


class _ByHand(nn.Module):
    def __init__(self, first: nn.Module, num_classes: int = 10) -> None:
        super().__init__()
        self.first = first
        self.last = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x))

    def nf_layers(self) -> list[nn.Module]:
        return [self.first, self.last]


class _Cast(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.conv, self.dtype = nn.Conv2d(1, 4, 3), dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).to(self.dtype)


class _Uncopyable(nn.Conv2d):
    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("cannot be copied")


forward_raises = _with(forward=_fail(KeyError("x")))
forward_exits = _with(forward=_fail(SystemExit(3)))
forward_returns_none = _with(forward=lambda self, x: None)
forward_returns_two = _with(forward=lambda self, x: (self.body(x), x))
forward_returns_integers = _with(forward=lambda self, x: self.body(x).long())
forward_is_random = _with(forward=lambda self, x: self.body(x) + torch.rand(()).item())
forward_recurses = _with(forward=lambda self, x: self(x))
forward_depends_on_data = _with(forward=lambda self, x: self.body(x) if x.sum() > 0 else self.body(-x))
forward_loops_over_data = _with(forward=lambda self, x: sum(self.body(row) for row in x))
forward_drops_the_batch = _with(forward=lambda self, x: self.body(x)[:1])
train_fails = _with(train=_fail(RuntimeError("no modes")))
parameters_fail = _with(named_parameters=_fail(OSError("disk")))
layers_fail = _with(nf_layers=_fail(ArithmeticError("no layers")))
layers_exit = _with(nf_layers=_fail(SystemExit(0)))
layers_are_none = _with(nf_layers=lambda self: None)
layers_are_numbers = _with(nf_layers=lambda self: [1, 2])
layers_are_few = _with(nf_layers=lambda self: [self.body])
layers_are_others = _with(nf_layers=lambda self: [nn.Conv2d(1, 4, 3), nn.Flatten()])
layers_are_text = _with(nf_layers="x")


def fails_in_training(num_classes: int) -> nn.Module:
    return _ByHand(_FailsLater(ValueError, training=True), num_classes)


def exits_in_training(num_classes: int) -> nn.Module:
    return _ByHand(_FailsLater(SystemExit, training=True), num_classes)


def fails_in_evaluation(num_classes: int) -> nn.Module:
    return _ByHand(_FailsLater(ValueError, training=False), num_classes)


def layer_gives_integers(num_classes: int) -> nn.Module:
    return _ByHand(_Cast(torch.int64), num_classes)


def layer_gives_doubles(num_classes: int) -> nn.Module:
    return _ByHand(_Cast(torch.float64), num_classes)


def layer_gives_complex(num_classes: int) -> nn.Module:
    return _ByHand(_Cast(torch.complex64), num_classes)


def cannot_be_copied(num_classes: int) -> nn.Module:
    return _ByHand(_Uncopyable(1, 4, 3), num_classes)


def holds_a_lock(num_classes: int) -> nn.Module:
    import threading

    model = _ByHand(nn.Conv2d(1, 4, 3), num_classes)
    model.first.lock = threading.Lock()
    return model


def prints(num_classes: int) -> nn.Module:
    print("hello")  # noqa: T201
    return small(num_classes)


def changes_its_mind(num_classes: int, seen: list[int] = []) -> nn.Module:  # noqa: B006
    seen.append(1)
    return small(num_classes) if len(seen) % 2 else nn.Sequential(small(num_classes), nn.Identity())
