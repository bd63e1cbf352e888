"""Builds networks by the user's own `package.module:factory`.

Importing one runs its code; whether it may be imported is for `nf_pipeline.trust`. Knows nothing of layers or
training. Entry: `build_by_factory`.
"""

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from nf_pipeline.core.model_checks import check_outputs, check_weights
from nf_pipeline.core.user_code import HostLimit, user_code
from nf_pipeline.errors import ConfigError


def build_by_factory(name: str, image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """Imports a factory and calls it with those of `num_classes` and `image_shape` that it accepts.

    Args:
        name: `package.module:factory`.
        image_shape: (C, H, W).
        num_classes: number of outputs.

    Raises:
        ConfigError: it cannot be imported, fails, or returns something else than a module with `num_classes` outputs.
    """
    with user_code(f"--model {name}", "change the model"):
        factory = _import_factory(name)
        model = _call_factory(name, factory, {"num_classes": num_classes, "image_shape": image_shape})
        if not isinstance(model, nn.Module):
            raise ConfigError(
                f"--model {name}: the factory returns {type(model).__name__}, want a torch.nn.Module",
                "return the model itself",
            )
        check_weights(name, model)
        check_outputs(name, model, image_shape, num_classes)
        return model


def _import_factory(name: str) -> Callable[..., Any]:
    module_name, _, attribute = name.partition(":")
    fix = f"check the name; {module_name} must be installed or found along PYTHONPATH"
    with user_code(f"--model {name}: cannot be imported", fix):
        factory = getattr(importlib.import_module(module_name), attribute)
    # No built-in function makes a model, and some do harm without any argument: os:abort, os:fork, builtins:input.
    if not callable(factory) or inspect.isbuiltin(factory):
        kind = "a built-in function" if callable(factory) else type(factory).__name__
        raise ConfigError(
            f"--model {name}: got {kind}, want a function or class of yours that returns a torch.nn.Module",
            "give the name of a factory",
        )
    return factory


def _call_factory(name: str, factory: Callable[..., Any], offered: dict[str, Any]) -> Any:
    fix = f"it is called with those of {', '.join(offered)} that it accepts"
    with user_code(f"--model {name}: the factory fails", fix), HostLimit():
        return factory(**_accepted(factory, offered))


def _accepted(factory: Callable[..., Any], offered: dict[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(factory).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return offered
    return {p.name: offered[p.name] for p in parameters if p.name in offered and p.kind is not p.POSITIONAL_ONLY}
