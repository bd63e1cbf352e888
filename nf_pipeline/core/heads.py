"""Auxiliary heads: small networks that predict the class from a layer's output.

One table, name -> constructor; a new head is one more function. What a head is built from (`HeadSite`) follows from
the model and the unit's last layer: whoever loads a trained head builds the same one. Knows nothing of the layers
below but their shapes. Entry: `build_head`.
"""

import difflib
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from nf_pipeline.errors import ConfigError

_MIN_WIDTH = 8
_MAX_WIDTH = 256
_AUGLOCAL_DEPTH = 5


@dataclass(frozen=True, kw_only=True)
class HeadSite:
    """Where a head stands.

    Attributes:
        in_shape: (C, H, W) of one sample of the layer's output.
        num_outputs: logits per sample.
        num_upstream: layers up to here, the one it stands on included.
        downstream: channels of the maps that the layers after it return, in order; layers that return no maps are
            left out.
    """

    in_shape: tuple[int, int, int]
    num_outputs: int
    num_upstream: int = 1
    downstream: tuple[int, ...] = ()


def head_site(out_shapes: Sequence[tuple[int, ...]], layer_idx: int, num_outputs: int) -> HeadSite:
    """Describes where a head on a layer stands.

    Args:
        out_shapes: of one sample after each layer of the whole model.
        layer_idx: the layer, 0-based.
        num_outputs: logits per sample.

    Raises:
        ConfigError: the layer's output is no map of features.
    """
    in_shape = tuple(out_shapes[layer_idx])
    if len(in_shape) != 3:
        raise ConfigError(
            f"train.head: a layer's output has shape {in_shape} per sample, want (C, H, W)",
            "leave what follows the last convolution to the model's classifier",
        )
    widths = tuple(shape[0] for shape in out_shapes[layer_idx + 1 :] if len(shape) == 3)
    return HeadSite(in_shape=in_shape, num_outputs=num_outputs, num_upstream=layer_idx + 1, downstream=widths)


def build_head(name: str, site: HeadSite, seed: int) -> nn.Module:
    """Builds a head with float32 weights on the CPU; the same seed gives the same weights.

    Args:
        name: a key of `HEADS`.
        site: from `head_site`.
        seed: 0 <= seed < 2**63; torch's global generator is left as it was.

    Raises:
        ConfigError: unknown name.
    """
    check_head_name(name)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return HEADS[name](site)


def check_head_name(name: str) -> None:
    """Checks that there is such a head.

    Raises:
        ConfigError: unknown name.
    """
    if name not in HEADS:
        near = difflib.get_close_matches(name, HEADS, n=3, cutoff=0.5)
        known = f"did you mean {' or '.join(near)}?" if near else f"one of {', '.join(HEADS)}"
        raise ConfigError(f"train.head: got {name!r}, unknown head", known)


def build_adaptive(site: HeadSite) -> nn.Module:
    """3x3 convolution C -> F, BN, ReLU, average pool to 2x2, linear; F = C within 8 to 256. [ours]

    Few filters where maps are large, many where they are small: 9*C*F + 4*F*K weights, F*H*W activations.
    """
    return _conv_head(site, min(max(site.in_shape[0], _MIN_WIDTH), _MAX_WIDTH))


def build_auglocal(site: HeadSite) -> nn.Module:
    """Strided 3x3 convolutions, BN and ReLU with the widths of layers that follow, average pool to 1x1, linear.

    After C. Ma et al., "Scaling Supervised Local Learning with Augmented Auxiliary Networks" (ICLR 2024, arXiv
    2402.17318): the layers are taken uniformly from those downstream, and there are fewer of them the deeper the
    head stands, here 5 on the first layer and 1 on the last but one. Plain convolutions also where residual blocks
    follow, and stride 2 until a map is one pixel wide, are our choice: blocks are not copied. [ours]
    """
    widths = _taken_uniformly(site.downstream, _pyramid_depth(site)) or (site.in_shape[0],)
    channels, height, width = site.in_shape
    parts: list[tuple[str, nn.Module]] = []
    for idx, filters in enumerate(widths):
        stride = (min(2, height), min(2, width))
        parts += _conv_bn_relu(str(idx), channels, filters, kernel_size=3, stride=stride)
        channels, height, width = filters, (height + 1) // 2, (width + 1) // 2
    parts += [("pool", nn.AdaptiveAvgPool2d(1)), ("flatten", nn.Flatten())]
    return nn.Sequential(OrderedDict([*parts, ("linear", nn.Linear(channels, site.num_outputs))]))


def build_classic(site: HeadSite) -> nn.Module:
    """The adaptive head with F = 256 everywhere, as local learning had it before; costly on large maps."""
    return _conv_head(site, _MAX_WIDTH)


def build_linear(site: HeadSite) -> nn.Module:
    """Average pool to 2x2, linear: what most classifiers are, 4*C*K weights and next to no activations. [ours]

    The planner falls back on it where a layer's own weights leave no room for another convolution.
    """
    channels, height, width = site.in_shape
    pooled = (min(2, height), min(2, width))
    parts = [
        ("pool", nn.AdaptiveAvgPool2d(pooled)),
        ("flatten", nn.Flatten()),
        ("linear", nn.Linear(channels * math.prod(pooled), site.num_outputs)),
    ]
    return nn.Sequential(OrderedDict(parts))


def build_mlp_sr(site: HeadSite) -> nn.Module:
    """DGL's MLP-SR: pool to a quarter, three 1x1 convolutions, pool to 2x2, three linear layers, linear.

    After Belilovsky et al., "Decoupled Greedy Learning of CNNs" (ICML 2020, arXiv 1901.08164). The width of
    all hidden parts, C within 8 to 256, is our choice: four times C would be 12 M weights at C = 512.
    """
    channels, height, width = site.in_shape
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
    return nn.Sequential(OrderedDict([*parts, ("linear", nn.Linear(hidden, site.num_outputs))]))


def _conv_head(site: HeadSite, filters: int) -> nn.Module:
    channels, height, width = site.in_shape
    pooled = (min(2, height), min(2, width))
    parts = [
        *_conv_bn_relu("", channels, filters, kernel_size=3),
        ("pool", nn.AdaptiveAvgPool2d(pooled)),
        ("flatten", nn.Flatten()),
        ("linear", nn.Linear(filters * math.prod(pooled), site.num_outputs)),
    ]
    return nn.Sequential(OrderedDict(parts))


def _pyramid_depth(site: HeadSite) -> int:
    """Returns the number of convolutions of an auglocal head: falling from 5 in equal steps as layers pass by."""
    num_layers = site.num_upstream + len(site.downstream)
    depth = (_AUGLOCAL_DEPTH * len(site.downstream) * 2 + num_layers - 1) // (2 * max(1, num_layers - 1))
    return min(max(1, depth), len(site.downstream))


def _taken_uniformly(widths: Sequence[int], count: int) -> tuple[int, ...]:
    """Returns so many of them, in order, as evenly spaced as can be; the last is always one."""
    return tuple(widths[-(-len(widths) * (idx + 1) // count) - 1] for idx in range(count))


def _conv_bn_relu(
    suffix: str, channels: int, filters: int, kernel_size: int, stride: tuple[int, int] = (1, 1)
) -> Iterator[tuple[str, nn.Module]]:
    # The padding keeps a map's size at stride 1, and halves it, rounded up, at 2; no bias, BN has one.
    yield (
        f"conv{suffix}",
        nn.Conv2d(channels, filters, kernel_size, stride=stride, padding=kernel_size // 2, bias=False),
    )
    yield f"bn{suffix}", nn.BatchNorm2d(filters)
    yield f"relu{suffix}", nn.ReLU(inplace=True)


def _linear_bn_relu(suffix: str, features: int, hidden: int) -> Iterator[tuple[str, nn.Module]]:
    yield f"linear{suffix}", nn.Linear(features, hidden, bias=False)
    yield f"bn{suffix}", nn.BatchNorm1d(hidden)
    yield f"relu{suffix}", nn.ReLU(inplace=True)


HEADS: dict[str, Callable[[HeadSite], nn.Module]] = {
    "adaptive": build_adaptive,
    "auglocal": build_auglocal,
    "classic": build_classic,
    "linear": build_linear,
    "mlp_sr": build_mlp_sr,
}

AUTO_HEAD = "auto"
"""Value of `train.head` with which the planner names every unit's head: no head itself."""

STAND_IN = "adaptive"
"""Head that the planner reckons with as long as it has not named another: units are grown with it."""

STRENGTH = ("auglocal", "adaptive", "linear")
"""Heads that the planner chooses from where it is left to it, the strongest first. [ours]

By what is published for long schedules; to be revised by measurements. `classic` and `mlp_sr` were measured to be no
better than `adaptive` for what they take.
"""
