"""The registry: networks that suit small images, by short names; one of them also takes series and volumes.

They come from torchvision's constructors, with stems that keep small images whole and without the huge classifier of
VGG. Knows nothing of layers or training. Entry: `build_registered`.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from torchvision.models import mobilenet_v2, resnet18, resnet34, resnet50
from torchvision.models.vgg import cfgs as vgg_configs
from torchvision.models.vgg import make_layers as make_vgg_layers

from nf_pipeline.core.spatial import PARTS
from nf_pipeline.core.user_code import HostLimit
from nf_pipeline.errors import ConfigError
from nf_pipeline.near_names import did_you_mean
from nf_pipeline.samples import InputSpec

# Up to this many pixels a stem that quarters the image at once would throw most of it away.
_SMALL_IMAGE = 64

_Build = Callable[[tuple[int, ...], int], nn.Module]
_PICTURES = (2,)


@dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """One name of the registry.

    Attributes:
        build: (shape of a sample, num_outputs) -> model with fresh weights.
        min_size: smallest side, in pixels of images.
        num_sides: how many a sample may have, beside its channels.
    """

    build: _Build
    min_size: int
    num_sides: tuple[int, ...] = _PICTURES


def build_registered(name: str, inputs: InputSpec, num_outputs: int) -> nn.Module:
    """Builds a network of the registry.

    Args:
        name: a key of `REGISTRY`.
        inputs: what it takes.
        num_outputs: numbers that it returns for a sample.

    Raises:
        ConfigError: unknown name, or samples that it does not take, or that are too small.
    """
    entry = _find_entry(name)
    _check_sides(name, entry, inputs)
    _check_size(name, entry, inputs)
    with HostLimit():
        return entry.build(inputs.shape, num_outputs)


def _convnet(shape: tuple[int, ...], num_outputs: int) -> nn.Module:
    """Six 3x3 convolutions for digits and other small images; of 3 or 3x3x3 for series and volumes. [ours]"""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels, size, parts = shape[0], min(shape[1:]), PARTS[len(shape) - 1]
    for idx, width in enumerate((32, 32, 64, 64, 128, 128)):
        layers[f"conv{idx}"] = parts.conv(channels, width, 3, padding=1, bias=False)
        layers[f"bn{idx}"] = parts.norm(width)
        layers[f"relu{idx}"] = nn.ReLU(inplace=True)
        if idx in (1, 3) and size >= 4:
            layers[f"pool{idx}"] = parts.max_pool(2)
            size //= 2
        channels = width
    model = _with_classifier(nn.Sequential(layers), (channels, *shape[1:]), num_outputs)
    _init_weights(model)
    return model


def _vgg(config: str) -> _Build:
    def build(image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
        features = make_vgg_layers(vgg_configs[config], batch_norm=True)
        if image_shape[0] != 3:
            features[0] = nn.Conv2d(image_shape[0], features[0].out_channels, kernel_size=3, padding=1)
        # torchvision's own classifier has 102 M weights made for 224 pixels.
        model = _with_classifier(features, (512, *image_shape[1:]), num_classes)
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


def _with_classifier(features: nn.Sequential, shape: tuple[int, ...], num_outputs: int) -> nn.Sequential:
    """Ends a network whose maps have such channels and so many sides."""
    parts = {
        "features": features,
        "avgpool": PARTS[len(shape) - 1].avg_pool(1),
        "flatten": nn.Flatten(),
        "classifier": nn.Linear(shape[0], num_outputs),
    }
    return nn.Sequential(OrderedDict(parts))


def _init_weights(model: nn.Module) -> None:
    """Initialises as torchvision's VGG does (torchvision/models/vgg.py)."""
    for module in model.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            _init_conv(module)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.01)
            nn.init.zeros_(module.bias)


def _init_conv(conv: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> None:
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)


# Minimum sizes: VGG halves five times. The others would run on less, with maps of 1x1 in many layers. [ours]
REGISTRY: dict[str, ModelEntry] = {
    "convnet": ModelEntry(build=_convnet, min_size=4, num_sides=tuple(PARTS)),
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
    others = "torchvision:NAME or timm:NAME as these libraries have it, package.module:factory for your own"
    raise ConfigError(f"--model {name}: unknown model", f"{did_you_mean(name, REGISTRY)} Or {others}")


def _check_sides(name: str, entry: ModelEntry, inputs: InputSpec) -> None:
    num_sides = 0 if inputs.num_tokens else len(inputs.shape) - 1
    if num_sides not in entry.num_sides:
        kind = "tokens" if inputs.num_tokens else "numbers"
        wanted = "pictures (C, H, W)" if entry.num_sides == _PICTURES else "(C, L), (C, H, W) or (C, D, H, W)"
        others = "--model convnet, or " if num_sides in PARTS else ""
        raise ConfigError(
            f"--model {name}: got samples of shape {inputs.shape}, {kind}; want {wanted}",
            f"{others}--model package.module:factory for your own",
        )


def _check_size(name: str, entry: ModelEntry, inputs: InputSpec) -> None:
    sides, smallest = inputs.shape[1:], entry.min_size
    if min(sides) >= smallest:
        return
    got, want = ("x".join(map(str, some)) for some in (sides, (smallest,) * len(sides)))
    if inputs.is_image:
        what, fix = f"images of {got} pixels", f"--image-size {smallest}, or --model convnet"
    else:
        what, fix = f"samples of {got}", "--model package.module:factory for your own"
    raise ConfigError(f"--model {name}: got {what}, want {want} or more", fix)
