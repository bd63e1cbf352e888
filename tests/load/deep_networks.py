"""Networks that a user might bring: `deep_networks:chain`, `deep_networks:residual` and `deep_networks:shallow`."""

from itertools import pairwise

import torch
from torch import nn

NUM_LAYERS = 200
WIDTH = 4


def chain(num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """Two hundred convolutions, one after the other."""
    channels = [image_shape[0], *[WIDTH] * NUM_LAYERS]
    convs = [_conv(before, after) for before, after in pairwise(channels)]
    return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, num_classes))


def residual(num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """A hundred residual blocks of two convolutions."""
    blocks = [Residual() for _ in range(NUM_LAYERS // 2)]
    stem = _conv(image_shape[0], WIDTH)
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, num_classes))


class Residual(nn.Module):
    """Two convolutions beside a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.Sequential(_conv(WIDTH, WIDTH), _conv(WIDTH, WIDTH))

    def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        """Returns the sum of both ways."""
        return x_NCHW + self.convs(x_NCHW)


def _conv(before: int, after: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU())


def shallow(num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """Two convolutions."""
    convs = [_conv(image_shape[0], 8), _conv(8, 8)]
    return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))
