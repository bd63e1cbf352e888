"""A network that two CPU cores train in minutes. Entry: `narrow_vgg16`, as `--model MODULE:narrow_vgg16`."""

from collections import OrderedDict

from torch import nn

_WIDTHS = (16, 16, "pool", 32, 32, "pool", 64, 64, 64, "pool", 128, 128, 128, "pool", 128, 128, 128, "pool")


def narrow_vgg16(num_classes: int, image_shape: tuple[int, int, int]) -> nn.Sequential:
    """Builds VGG-16 with batch norm at a quarter of its width: 13 convolutions, 0.9 M weights.

    Args:
        num_classes: outputs.
        image_shape: (C, H, W), 32 pixels or more: the maps are halved five times.
    """
    layers: list[nn.Module] = []
    channels = image_shape[0]
    for width in _WIDTHS:
        if isinstance(width, str):
            layers.append(nn.MaxPool2d(2))
            continue
        convolution = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
        layers += [convolution, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        channels = width
    parts = [
        ("features", nn.Sequential(*layers)),
        ("avgpool", nn.AdaptiveAvgPool2d(1)),
        ("flatten", nn.Flatten()),
        ("classifier", nn.Linear(channels, num_classes)),
    ]
    return nn.Sequential(OrderedDict(parts))
