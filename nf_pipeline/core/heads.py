"""Auxiliary heads: small networks that predict the class from a layer's output.

One table, name -> constructor; a new head is one more function. Knows nothing of the layers below.
Entry: `build_head`.
"""

import difflib
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator

import torch
from torch import nn

from nf_pipeline.errors import ConfigError

_MIN_WIDTH = 8
_MAX_WIDTH = 256


def build_head(name: str, in_shape: tuple[int, ...], num_classes: int, seed: int) -> nn.Module:
    """Builds a head with float32 weights on the CPU; the same seed gives the same weights.

    Args:
        name: a key of `HEADS`.
        in_shape: (C, H, W) of one sample of the layer's output.
        seed: 0 <= seed < 2**63; torch's global generator is left as it was.

    Raises:
        ConfigError: unknown name, or the layer's output is no map of features.
    """
    check_head_name(name)
    if len(in_shape) != 3:
        raise ConfigError(
            f"train.head: a layer's output has shape {in_shape} per sample, want (C, H, W)",
            "leave what follows the last convolution to the model's classifier",
        )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return HEADS[name](in_shape, num_classes)


def check_head_name(name: str) -> None:
    """Checks that there is such a head.

    Raises:
        ConfigError: unknown name.
    """
    if name not in HEADS:
        near = difflib.get_close_matches(name, HEADS, n=3, cutoff=0.5)
        known = f"did you mean {' or '.join(near)}?" if near else f"one of {', '.join(HEADS)}"
        raise ConfigError(f"train.head: got {name!r}, unknown head", known)


def build_adaptive(in_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """3x3 convolution C -> F, BN, ReLU, average pool to 2x2, linear; F = C within 8 to 256. [ours]

    Few filters where maps are large, many where they are small: 9*C*F + 4*F*K weights, F*H*W activations.
    """
    return _conv_head(in_shape, num_classes, min(max(in_shape[0], _MIN_WIDTH), _MAX_WIDTH))


def build_classic(in_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """The same with F = 256 everywhere, as local learning had it before; costly on large maps."""
    return _conv_head(in_shape, num_classes, _MAX_WIDTH)


def build_linear(in_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """Average pool to 2x2, linear: what most classifiers are, 4*C*K weights and next to no activations. [ours]

    The planner falls back on it where a layer's own weights leave no room for another convolution.
    """
    channels, height, width = in_shape
    pooled = (min(2, height), min(2, width))
    parts = [
        ("pool", nn.AdaptiveAvgPool2d(pooled)),
        ("flatten", nn.Flatten()),
        ("linear", nn.Linear(channels * math.prod(pooled), num_classes)),
    ]
    return nn.Sequential(OrderedDict(parts))


def build_mlp_sr(in_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """DGL's MLP-SR: pool to a quarter, three 1x1 convolutions, pool to 2x2, three linear layers, linear.

    After Belilovsky et al., "Decoupled Greedy Learning of CNNs" (ICML 2020, arXiv 1901.08164). The width of
    all hidden parts, C within 8 to 256, is our choice: four times C would be 12 M weights at C = 512.
    """
    channels, height, width = in_shape
    hidden = min(max(channels, _MIN_WIDTH), _MAX_WIDTH)
    parts: list[tuple[str, nn.Module]] = [
        ("reduce", nn.AdaptiveAvgPool2d((math.ceil(height / 4), math.ceil(width / 4))))
    ]
    for idx in range(3):
        parts += _conv_bn_relu(str(idx), channels if idx == 0 else hidden, hidden, kernel_size=1)
    pooled = (min(2, math.ceil(height / 4)), min(2, math.ceil(width / 4)))
    parts += [("pool", nn.AdaptiveAvgPool2d(pooled)), ("flatten", nn.Flatten())]
    for idx in range(3):
        parts += _linear_bn_relu(f"_mlp{idx}", hidden * math.prod(pooled) if idx == 0 else hidden, hidden)
    return nn.Sequential(OrderedDict([*parts, ("linear", nn.Linear(hidden, num_classes))]))


def _conv_head(in_shape: tuple[int, int, int], num_classes: int, filters: int) -> nn.Module:
    channels, height, width = in_shape
    pooled = (min(2, height), min(2, width))
    parts = [
        *_conv_bn_relu("", channels, filters, kernel_size=3),
        ("pool", nn.AdaptiveAvgPool2d(pooled)),
        ("flatten", nn.Flatten()),
        ("linear", nn.Linear(filters * math.prod(pooled), num_classes)),
    ]
    return nn.Sequential(OrderedDict(parts))


def _conv_bn_relu(suffix: str, channels: int, filters: int, kernel_size: int) -> Iterator[tuple[str, nn.Module]]:
    # Stride 1 keeps the map's size; no bias, BN has one.
    yield f"conv{suffix}", nn.Conv2d(channels, filters, kernel_size, padding=kernel_size // 2, bias=False)
    yield f"bn{suffix}", nn.BatchNorm2d(filters)
    yield f"relu{suffix}", nn.ReLU(inplace=True)


def _linear_bn_relu(suffix: str, features: int, hidden: int) -> Iterator[tuple[str, nn.Module]]:
    yield f"linear{suffix}", nn.Linear(features, hidden, bias=False)
    yield f"bn{suffix}", nn.BatchNorm1d(hidden)
    yield f"relu{suffix}", nn.ReLU(inplace=True)


HEADS: dict[str, Callable[[tuple[int, int, int], int], nn.Module]] = {
    "adaptive": build_adaptive,
    "classic": build_classic,
    "linear": build_linear,
    "mlp_sr": build_mlp_sr,
}
