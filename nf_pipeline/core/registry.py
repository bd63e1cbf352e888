"""The registry: networks that suit small images, by short names.

They come from torchvision's constructors, with stems that keep small images whole and without the huge classifier of
VGG. Knows nothing of layers or training. Entry: `build_registered`.
"""

import difflib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from torchvision.models import mobilenet_v2, resnet18, resnet34, resnet50
from torchvision.models.vgg import cfgs as vgg_configs
from torchvision.models.vgg import make_layers as make_vgg_layers

from nf_pipeline.core.user_code import HostLimit
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


def build_registered(name: str, image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """Builds a network of the registry.

    Args:
        name: a key of `REGISTRY`.
        image_shape: (C, H, W).
        num_classes: number of outputs.

    Raises:
        ConfigError: unknown name, or the images are too small.
    """
    entry = _find_entry(name)
    _check_size(name, entry, image_shape)
    with HostLimit():
        return entry.build(image_shape, num_classes)


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
    others = "torchvision:NAME or timm:NAME as these libraries have it, package.module:factory for your own"
    raise ConfigError(f"--model {name}: unknown model", f"{hint} Or {others}")


def _check_size(name: str, entry: ModelEntry, image_shape: tuple[int, int, int]) -> None:
    _, height, width = image_shape
    if min(height, width) < entry.min_size:
        raise ConfigError(
            f"--model {name}: got images of {height}x{width} pixels, want {entry.min_size}x{entry.min_size} or more",
            f"--image-size {entry.min_size}, or --model convnet",
        )
