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
from nf_pipeline.samples import InputSpec


def build_by_factory(name: str, inputs: InputSpec, num_outputs: int) -> nn.Module:
    """Imports a factory and calls it with what it accepts of `offered_to`.

    Args:
        name: `package.module:factory`.
        inputs: what the network takes.
        num_outputs: numbers that it returns for a sample.

    Raises:
        ConfigError: it cannot be imported, fails, or returns something else than a module with `num_outputs` outputs.
    """
    with user_code(f"--model {name}", "change the model"):
        factory = _import_factory(name)
        model = _call_factory(name, factory, offered_to(inputs, num_outputs))
        if not isinstance(model, nn.Module):
            raise ConfigError(
                f"--model {name}: the factory returns {type(model).__name__}, want a torch.nn.Module",
                "return the model itself",
            )
        check_weights(name, model)
        check_outputs(name, model, inputs, num_outputs)
        return model


def offered_to(inputs: InputSpec, num_outputs: int) -> dict[str, Any]:
    """Returns what a factory may ask for by name: the number of outputs, and what a sample looks like.

    `num_classes` and `image_shape` are other names of `num_outputs` and `input_shape`.
    """
    return {
        "num_outputs": num_outputs,
        "num_classes": num_outputs,
        "input_shape": inputs.shape,
        "image_shape": inputs.shape,
        "num_tokens": inputs.num_tokens,
    }


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
