"""The network of `early_stop.py`: deep and narrow, every layer as much work as any other."""

from collections import OrderedDict

from torch import nn

DEEP_NETWORK = "deep_network:make_network"

WIDTHS = (16, 16, "pool", 32, 32, 32, "pool", *[64] * 12)


def make_network(num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """Builds seventeen 3x3 convolutions that cost the same: each pool quarters the pixels and doubles the width."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels = image_shape[0]
    for idx, width in enumerate(WIDTHS):
        if isinstance(width, str):
            layers[f"pool{idx}"] = nn.MaxPool2d(2)
            continue
        layers[f"conv{idx}"] = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        layers[f"bn{idx}"] = nn.BatchNorm2d(width)
        layers[f"relu{idx}"] = nn.ReLU(inplace=True)
        channels = width
    layers |= {"avgpool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
    layers["classifier"] = nn.Linear(channels, num_classes)
    return nn.Sequential(layers)
