"""Auxiliary heads: small networks that predict the target from a layer's output.

One table, name -> constructor; a new head is one more function. What a head is built from (`HeadSite`) follows from
the model and the unit's last layer: whoever loads a trained head builds the same one. Their parts follow from how
many sides the layer's maps have (`nf_pipeline.core.spatial`); on a vector, linear layers stand for convolutions, and
nothing is pooled. Knows nothing of the layers below but their shapes. Entry: `build_head`.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from nf_pipeline.core.spatial import PARTS, SpatialParts, parts_for
from nf_pipeline.errors import ConfigError
from nf_pipeline.near_names import did_you_mean

_MIN_WIDTH = 8
_MAX_WIDTH = 256
_AUGLOCAL_DEPTH = 5


@dataclass(frozen=True, kw_only=True)
class HeadSite:
    """Where a head stands.

    Attributes:
        in_shape: of one sample of the layer's output: (C, *sides) of a map, (F,) of a vector.
        num_outputs: logits or values per sample.
        num_upstream: layers up to here, the one it stands on included.
        downstream: channels of what the layers after it return, in order; layers that return something with another
            number of sides are left out.
    """

    in_shape: tuple[int, ...]
    num_outputs: int
    num_upstream: int = 1
    downstream: tuple[int, ...] = ()

    @property
    def parts(self) -> SpatialParts | None:
        """What heads on such maps are made of; None on a vector."""
        return parts_for(self.in_shape)


def head_site(out_shapes: Sequence[tuple[int, ...]], layer_idx: int, num_outputs: int) -> HeadSite:
    """Describes where a head on a layer stands.

    Args:
        out_shapes: of one sample after each layer of the whole model.
        layer_idx: the layer, 0-based.
        num_outputs: logits or values per sample.

    Raises:
        ConfigError: the layer's output has more sides than heads know.
    """
    in_shape = tuple(out_shapes[layer_idx])
    if len(in_shape) - 1 not in (0, *PARTS):
        raise ConfigError(
            f"train.head: a layer's output has shape {in_shape} per sample, want at most {max(PARTS)} sides",
            "let the model's nf_layers() end its layers where there are fewer",
        )
    widths = tuple(shape[0] for shape in out_shapes[layer_idx + 1 :] if len(shape) == len(in_shape))
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
        raise ConfigError(f"train.head: got {name!r}, unknown head", did_you_mean(name, HEADS))


def build_adaptive(site: HeadSite) -> nn.Module:
    """3x3 convolution C -> F, BN, ReLU, average pool to 2x2, linear; F = C within 8 to 256. [ours]

    Few filters where maps are large, many where they are small: 9*C*F + 4*F*K weights, F*H*W activations. On series
    a filter has 3 weights, and four cells stay; on volumes it is 27, and 2x2x2.
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
    channels, *sides = site.in_shape
    parts: list[tuple[str, nn.Module]] = []
    for idx, filters in enumerate(widths):
        stride = tuple(min(2, side) for side in sides)
        parts += _conv_bn_relu(site, str(idx), (channels, filters), kernel_size=3, stride=stride)
        channels, sides = filters, [(side + 1) // 2 for side in sides]
    parts += _pooled_linear(site, channels, tuple(1 for _ in sides))
    return nn.Sequential(OrderedDict(parts))


def build_classic(site: HeadSite) -> nn.Module:
    """The adaptive head with F = 256 everywhere, as local learning had it before; costly on large maps."""
    return _conv_head(site, _MAX_WIDTH)


def build_linear(site: HeadSite) -> nn.Module:
    """Average pool to 2x2, linear: what most classifiers are, 4*C*K weights and next to no activations. [ours]

    The planner falls back on it where a layer's own weights leave no room for another convolution.
    """
    channels, *sides = site.in_shape
    return nn.Sequential(OrderedDict(_pooled_linear(site, channels, _cells(site, sides))))


def build_mlp_sr(site: HeadSite) -> nn.Module:
    """DGL's MLP-SR: pool to a quarter, three 1x1 convolutions, pool to 2x2, three linear layers, linear.

    After Belilovsky et al., "Decoupled Greedy Learning of CNNs" (ICML 2020, arXiv 1901.08164). The width of
    all hidden parts, C within 8 to 256, is our choice: four times C would be 12 M weights at C = 512.
    """
    channels, *sides = site.in_shape
    hidden = min(max(channels, _MIN_WIDTH), _MAX_WIDTH)
    quarters = [math.ceil(side / 4) for side in sides]
    parts: list[tuple[str, nn.Module]] = []
    if site.parts is not None:
        parts.append(("reduce", site.parts.avg_pool(tuple(quarters))))
    for idx in range(3):
        parts += _conv_bn_relu(site, str(idx), (channels if idx == 0 else hidden, hidden), kernel_size=1)
    cells = _cells(site, quarters)
    parts += _pooled(site, cells)
    for idx in range(3):
        parts += _linear_bn_relu(f"_mlp{idx}", hidden * math.prod(cells) if idx == 0 else hidden, hidden)
    return nn.Sequential(OrderedDict([*parts, ("linear", nn.Linear(hidden, site.num_outputs))]))


def _conv_head(site: HeadSite, filters: int) -> nn.Module:
    channels, *sides = site.in_shape
    parts = [
        *_conv_bn_relu(site, "", (channels, filters), kernel_size=3),
        *_pooled_linear(site, filters, _cells(site, sides)),
    ]
    return nn.Sequential(OrderedDict(parts))


def _cells(site: HeadSite, sides: Sequence[int]) -> tuple[int, ...]:
    """Returns what a head averages a map of these sides to."""
    return site.parts.cells(sides) if site.parts is not None else ()


def _pooled_linear(site: HeadSite, channels: int, cells: tuple[int, ...]) -> Iterator[tuple[str, nn.Module]]:
    yield from _pooled(site, cells)
    yield "linear", nn.Linear(channels * math.prod(cells), site.num_outputs)


def _pooled(site: HeadSite, cells: tuple[int, ...]) -> Iterator[tuple[str, nn.Module]]:
    if site.parts is not None:
        yield "pool", site.parts.avg_pool(cells)
        yield "flatten", nn.Flatten()


def _pyramid_depth(site: HeadSite) -> int:
    """Returns the number of convolutions of an auglocal head: falling from 5 in equal steps as layers pass by."""
    num_layers = site.num_upstream + len(site.downstream)
    depth = (_AUGLOCAL_DEPTH * len(site.downstream) * 2 + num_layers - 1) // (2 * max(1, num_layers - 1))
    return min(max(1, depth), len(site.downstream))


def _taken_uniformly(widths: Sequence[int], count: int) -> tuple[int, ...]:
    """Returns so many of them, in order, as evenly spaced as can be; the last is always one."""
    return tuple(widths[-(-len(widths) * (idx + 1) // count) - 1] for idx in range(count))


def _conv_bn_relu(
    site: HeadSite, suffix: str, channels: tuple[int, int], kernel_size: int, stride: tuple[int, ...] = ()
) -> Iterator[tuple[str, nn.Module]]:
    """Yields the parts of one step from so many channels to so many; a vector takes a linear layer."""
    parts = site.parts
    if parts is None:
        yield from _linear_bn_relu(f"_hidden{suffix}", *channels)
        return
    # The padding keeps a map's size at stride 1, and halves it, rounded up, at 2; no bias, BN has one.
    conv = parts.conv(*channels, kernel_size, stride=stride or 1, padding=kernel_size // 2, bias=False)
    yield f"conv{suffix}", conv
    yield f"bn{suffix}", parts.norm(channels[1])
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
