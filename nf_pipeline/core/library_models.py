"""Builds networks of torchvision and timm by the names that these libraries list, with fresh weights.

Only their own lists of classifiers are looked in, nothing is downloaded and nothing else can be called, so a stored
run may name one without being confirmed. The networks are as published: made for large images, with their own stems
and classifiers. What can be cut of them is for `nf_pipeline.core.layers`. Entry: `build_from_library`.
"""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torchvision
from torch import nn

from nf_pipeline.core.model_checks import check_outputs, smallest_image
from nf_pipeline.core.user_code import HostLimit, user_code
from nf_pipeline.errors import ConfigError
from nf_pipeline.near_names import did_you_mean
from nf_pipeline.samples import InputSpec

# Training them as published takes two more classifiers on the way, whose losses no single tensor of logits holds.
_WITHOUT_AUXILIARY = {"aux_logits": False, "init_weights": True}
_TORCHVISION_OPTIONS: dict[str, dict[str, Any]] = {
    "googlenet": _WITHOUT_AUXILIARY,
    "inception_v3": _WITHOUT_AUXILIARY,
}


@dataclass(frozen=True, kw_only=True)
class Library:
    """Where networks come from.

    Attributes:
        names: lists what can be built; loads the library.
        build: (name, channels of the images, num_classes) -> model with fresh weights.
        why_not: (name) -> why the library has it and this program does not, or "".
    """

    names: Callable[[], Sequence[str]]
    build: Callable[[str, int, int], nn.Module]
    why_not: Callable[[str], str]


def build_from_library(name: str, inputs: InputSpec, num_outputs: int) -> nn.Module:
    """Builds a network that a library lists.

    Args:
        name: `torchvision:NAME` or `timm:NAME`.
        inputs: images that it takes.
        num_outputs: numbers that it returns for an image.

    Raises:
        ConfigError: the library is not installed, lists no such classifier, or the network does not take the samples.
    """
    source, _, architecture = name.partition(":")
    library = LIBRARIES[source]
    if importlib.util.find_spec(source) is None:
        raise ConfigError(f"--model {name}: {source} is not installed", f"pip install 'nf_pipeline[{source}]'")
    _check_name(source, library, architecture)
    if not inputs.is_image:
        what = f"got samples of shape {inputs.shape}, want pictures (C, H, W)"
        raise ConfigError(f"--model {name}: {what}", "--model package.module:factory for your own")
    with user_code(f"--model {name}: {source} cannot build it", "take another model"), HostLimit():
        model = library.build(architecture, inputs.shape[0], num_outputs)
    _check_size(name, model, inputs, num_outputs)
    return model


def _check_name(source: str, library: Library, architecture: str) -> None:
    names = library.names()
    if architecture in names:
        return
    reason = library.why_not(architecture) or "unknown model"
    listed = f"one of the {len(names)} names that {source} lists"
    hint = did_you_mean(architecture, names, prefix=f"{source}:", otherwise=listed)
    raise ConfigError(f"--model {source}:{architecture}: {reason}", hint)


def _check_size(name: str, model: nn.Module, inputs: InputSpec, num_outputs: int) -> None:
    try:
        check_outputs(name, model, inputs, num_outputs)
    except ConfigError as error:
        size = smallest_image(model, inputs.shape) if error.__cause__ is not None else None
        if size is None:
            raise
        raise ConfigError(error.what, f"--image-size {size}, or another model") from error.__cause__


def _torchvision_names() -> Sequence[str]:
    return torchvision.models.list_models(module=torchvision.models)


def _build_torchvision(architecture: str, channels: int, num_classes: int) -> nn.Module:
    options = _TORCHVISION_OPTIONS.get(architecture, {})
    model = torchvision.models.get_model(architecture, weights=None, num_classes=num_classes, **options)
    if channels != 3:
        _replace_stem(model, channels)
    return model


def _why_not_torchvision(architecture: str) -> str:
    """Names the task of a model that is no classifier of images."""
    if architecture not in torchvision.models.list_models():
        return ""
    task = torchvision.models.get_model_builder(architecture).__module__.split(".")[2]
    if task == "quantization":
        return "its weights are to be quantised, which is for inference; want a model with float32 weights"
    return f"it is a model for {task.replace('_', ' ')}, want one that classifies images"


def _replace_stem(model: nn.Module, channels: int) -> None:
    """Gives the first convolution another number of input channels; its weights are drawn as wide as they were."""
    path, conv = next((path, m) for path, m in model.named_modules() if isinstance(m, nn.Conv2d))
    stem = nn.Conv2d(
        channels,
        conv.out_channels,
        conv.kernel_size,
        stride=conv.stride,
        padding=conv.padding,
        bias=conv.bias is not None,
    )
    with torch.no_grad():
        stem.weight.copy_(torch.randn_like(stem.weight) * conv.weight.std())
        if conv.bias is not None:
            stem.bias.copy_(conv.bias)
    model.set_submodule(path, stem)


def _timm_names() -> Sequence[str]:
    import timm

    return timm.list_models()


def _build_timm(architecture: str, channels: int, num_classes: int) -> nn.Module:
    import timm

    return timm.create_model(architecture, pretrained=False, num_classes=num_classes, in_chans=channels)


def _why_not_timm(architecture: str) -> str:
    if ":" in architecture or "/" in architecture:
        return "models of a hub are code and weights to be downloaded; want a name that timm itself lists"
    if "." in architecture:
        return "the part after the dot names trained weights; weights start fresh here"
    return ""


LIBRARIES = {
    "torchvision": Library(names=_torchvision_names, build=_build_torchvision, why_not=_why_not_torchvision),
    "timm": Library(names=_timm_names, build=_build_timm, why_not=_why_not_timm),
}
