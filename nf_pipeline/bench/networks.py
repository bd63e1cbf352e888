"""Networks that two CPU cores train in minutes, plain and with skip connections, at a quarter of their width.

Entries: `narrow_vgg16` and `narrow_resnet18`, as `--model MODULE:NAME`.
"""

from collections import OrderedDict
from collections.abc import Iterable

from torch import nn
from torchvision.models.resnet import BasicBlock

_VGG_WIDTHS = (16, 16, "pool", 32, 32, "pool", 64, 64, 64, "pool", 128, 128, 128, "pool", 128, 128, 128, "pool")
_RESNET_WIDTHS = (16, 16, 32, 32, 64, 64, 128, 128)


def narrow_vgg16(num_classes: int, image_shape: tuple[int, int, int]) -> nn.Sequential:
    """Builds VGG-16 with batch norm: 13 convolutions, 0.9 M weights.

    Args:
        num_classes: outputs.
        image_shape: (C, H, W), 32 pixels or more: the maps are halved five times.
    """
    layers: list[nn.Module] = []
    channels = image_shape[0]
    for width in _VGG_WIDTHS:
        if isinstance(width, str):
            layers.append(nn.MaxPool2d(2))
            continue
        layers += _conv_bn_relu(channels, width)
        channels = width
    return _with_classifier(layers, channels, num_classes)


def narrow_resnet18(num_classes: int, image_shape: tuple[int, int, int]) -> nn.Sequential:
    """Builds ResNet-18 with the stem for small images: 17 convolutions in a stem and 8 blocks, 0.7 M weights.

    Args:
        num_classes: outputs.
        image_shape: (C, H, W), 8 pixels or more: the maps are halved three times.
    """
    layers: list[nn.Module] = [nn.Sequential(*_conv_bn_relu(image_shape[0], _RESNET_WIDTHS[0]))]
    channels = _RESNET_WIDTHS[0]
    for width in _RESNET_WIDTHS:
        layers.append(_residual_block(channels, width))
        channels = width
    return _with_classifier(layers, channels, num_classes)


def _residual_block(channels: int, width: int) -> BasicBlock:
    skip, stride = None, 1
    if channels != width:
        skip, stride = nn.Sequential(nn.Conv2d(channels, width, 1, stride=2, bias=False), nn.BatchNorm2d(width)), 2
    block = BasicBlock(channels, width, stride=stride, downsample=skip)
    for part in block.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
    return block


def _conv_bn_relu(channels: int, width: int) -> Iterable[nn.Module]:
    convolution = nn.Conv2d(channels, width, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return convolution, nn.BatchNorm2d(width), nn.ReLU(inplace=True)


def _with_classifier(layers: list[nn.Module], channels: int, num_classes: int) -> nn.Sequential:
    parts = [
        ("features", nn.Sequential(*layers)),
        ("avgpool", nn.AdaptiveAvgPool2d(1)),
        ("flatten", nn.Flatten()),
        ("classifier", nn.Linear(channels, num_classes)),
    ]
    return nn.Sequential(OrderedDict(parts))
