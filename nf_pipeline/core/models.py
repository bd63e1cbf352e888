"""Builds networks by name: the registry, or the user's own `package.module:factory`.

Registry models come from torchvision's constructors, with stems that suit small images and without the huge
classifier of VGG. Knows nothing of layers or training. Entry: `build_model`.
"""

import difflib
import importlib
import inspect
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torchvision.models import mobilenet_v2, resnet18, resnet34, resnet50
from torchvision.models.vgg import cfgs as vgg_configs
from torchvision.models.vgg import make_layers as make_vgg_layers

from nf_pipeline.core.probe import has_values, probe_input, run_probe
from nf_pipeline.core.trace import mode_of
from nf_pipeline.core.user_code import HostLimit, user_code
from nf_pipeline.errors import ConfigError

# Up to this many pixels a stem that quarters the image at once would throw most of it away.
_SMALL_IMAGE = 64

_Build = Callable[[tuple[int, int, int], int], nn.Module]


@dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """One name of the registry.

    Attributes:
        build: (image_shape, num_classes) -> model with fresh weights.
        min_size: smallest height and width in pixels.
    """

    build: _Build
    min_size: int


def build_model(name: str, *, image_shape: tuple[int, int, int], num_classes: int, seed: int) -> nn.Module:
    """Builds a network with float32 weights on the CPU; the same seed gives the same weights.

    torch's global generator is left as it was. Under FakeTensorMode the weights are fake.

    Args:
        name: of the registry, or `package.module:factory`; the factory is called with those of `num_classes`
            and `image_shape` that it accepts.
        image_shape: (C, H, W).
        num_classes: number of outputs.

    Raises:
        ConfigError: unknown name, image too small, or a factory that cannot be imported, fails, or returns
            something else than a module with `num_classes` outputs.
    """
    # devices=[]: weights are made on the CPU, whatever accelerators there are.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if ":" in name:
            with user_code(f"--model {name}", "change the model"):
                return _build_by_factory(name, image_shape, num_classes)
        entry = _find_entry(name)
        _check_size(name, entry, image_shape)
        with HostLimit():
            return entry.build(image_shape, num_classes)


def suggest_model(image_shape: tuple[int, int, int], num_train: int) -> str:
    """Names the default network: `convnet` for images below 32 pixels or few of them, else `vgg11_bn`.

    Args:
        image_shape: (C, H, W).
        num_train: training images; fewer than 1,000 are too few for millions of weights. [ours]
    """
    return "convnet" if min(image_shape[1:]) < 32 or num_train < 1000 else "vgg11_bn"


def _convnet(image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """Six 3x3 convolutions for digits and other small images. [ours]"""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels, size = image_shape[0], min(image_shape[1:])
    for idx, width in enumerate((32, 32, 64, 64, 128, 128)):
        layers[f"conv{idx}"] = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        layers[f"bn{idx}"] = nn.BatchNorm2d(width)
        layers[f"relu{idx}"] = nn.ReLU(inplace=True)
        if idx in (1, 3) and size >= 4:
            layers[f"pool{idx}"] = nn.MaxPool2d(2)
            size //= 2
        channels = width
    model = _with_classifier(nn.Sequential(layers), channels, num_classes)
    _init_weights(model)
    return model


def _vgg(config: str) -> _Build:
    def build(image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
        features = make_vgg_layers(vgg_configs[config], batch_norm=True)
        if image_shape[0] != 3:
            features[0] = nn.Conv2d(image_shape[0], features[0].out_channels, kernel_size=3, padding=1)
        # torchvision's own classifier has 102 M weights made for 224 pixels.
        model = _with_classifier(features, 512, num_classes)
        _init_weights(model)
        return model

    return build


def _resnet(constructor: Callable[..., nn.Module]) -> _Build:
    def build(image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
        model = constructor(weights=None, num_classes=num_classes)
        if _is_small(image_shape):
            model.conv1 = nn.Conv2d(image_shape[0], 64, kernel_size=3, stride=1, padding=1, bias=False)
            model.maxpool = nn.Identity()
        elif image_shape[0] != 3:
            model.conv1 = nn.Conv2d(image_shape[0], 64, kernel_size=7, stride=2, padding=3, bias=False)
        _init_conv(model.conv1)
        return model

    return build


def _mobilenet_v2(image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    model = mobilenet_v2(weights=None, num_classes=num_classes)
    stride = 1 if _is_small(image_shape) else 2
    stem = nn.Conv2d(image_shape[0], 32, kernel_size=3, stride=stride, padding=1, bias=False)
    _init_conv(stem)
    model.features[0][0] = stem
    return model


def _is_small(image_shape: tuple[int, int, int]) -> bool:
    return max(image_shape[1:]) <= _SMALL_IMAGE


def _with_classifier(features: nn.Sequential, width: int, num_classes: int) -> nn.Sequential:
    parts = {
        "features": features,
        "avgpool": nn.AdaptiveAvgPool2d(1),
        "flatten": nn.Flatten(),
        "classifier": nn.Linear(width, num_classes),
    }
    return nn.Sequential(OrderedDict(parts))


def _init_weights(model: nn.Module) -> None:
    """Initialises as torchvision's VGG does (torchvision/models/vgg.py)."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            _init_conv(module)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.01)
            nn.init.zeros_(module.bias)


def _init_conv(conv: nn.Conv2d) -> None:
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)


# Minimum sizes: VGG halves five times. The others would run on less, with maps of 1x1 in many layers. [ours]
REGISTRY: dict[str, ModelEntry] = {
    "convnet": ModelEntry(build=_convnet, min_size=4),
    "vgg11_bn": ModelEntry(build=_vgg("A"), min_size=32),
    "vgg13_bn": ModelEntry(build=_vgg("B"), min_size=32),
    "vgg16_bn": ModelEntry(build=_vgg("D"), min_size=32),
    "vgg19_bn": ModelEntry(build=_vgg("E"), min_size=32),
    "resnet18": ModelEntry(build=_resnet(resnet18), min_size=8),
    "resnet34": ModelEntry(build=_resnet(resnet34), min_size=8),
    "resnet50": ModelEntry(build=_resnet(resnet50), min_size=8),
    "mobilenet_v2": ModelEntry(build=_mobilenet_v2, min_size=16),
}


def _find_entry(name: str) -> ModelEntry:
    if name in REGISTRY:
        return REGISTRY[name]
    near = difflib.get_close_matches(name, REGISTRY, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"one of {', '.join(REGISTRY)}"
    raise ConfigError(f"--model {name}: unknown model", f"{hint} Or package.module:factory for your own")


def _check_size(name: str, entry: ModelEntry, image_shape: tuple[int, int, int]) -> None:
    _, height, width = image_shape
    if min(height, width) < entry.min_size:
        raise ConfigError(
            f"--model {name}: got images of {height}x{width} pixels, want {entry.min_size}x{entry.min_size} or more",
            f"--image-size {entry.min_size}, or --model convnet",
        )


def _build_by_factory(name: str, image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    factory = _import_factory(name)
    model = _call_factory(name, factory, {"num_classes": num_classes, "image_shape": image_shape})
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"--model {name}: the factory returns {type(model).__name__}, want a torch.nn.Module",
            "return the model itself",
        )
    _check_weights(name, model)
    _check_outputs(name, model, image_shape, num_classes)
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


def _check_outputs(name: str, model: nn.Module, image_shape: tuple[int, int, int], num_classes: int) -> None:
    with torch.no_grad(), mode_of(model, training=False):
        logits_NK = run_probe(f"--model {name}: the model", model, probe_input(model, image_shape))
    if tuple(logits_NK.shape[1:]) != (num_classes,):
        raise ConfigError(
            f"--model {name}: got outputs of shape {tuple(logits_NK.shape[1:])}, want ({num_classes},): "
            f"one per class",
            "let the factory take num_classes and use it for the last layer",
        )
    if has_values(logits_NK) and not logits_NK.isfinite().all():
        raise ConfigError(
            f"--model {name}: its outputs for random images are not finite", "give its weights finite values"
        )


def _check_weights(name: str, model: nn.Module) -> None:
    for path, weight in model.named_parameters():
        if weight.dtype != torch.float32 or weight.device.type != "cpu":
            raise ConfigError(
                f"--model {name}: {path} is {weight.dtype} on {weight.device}, want torch.float32 on cpu",
                "return the model as float32 on the CPU; train.precision and train.device decide the rest",
            )
