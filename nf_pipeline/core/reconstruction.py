"""A small network that makes the network's own input again of what layers return, for losses that ask what they kept.

After the decoder in the authors' code of Y. Wang et al., "Revisiting Locally Supervised Learning: an Alternative to
End-to-end Training" (ICLR 2021, https://arxiv.org/abs/2101.10832): two convolutions 3 wide with 12 channels between
them. It is only there while layers train. What goes in and what comes out may have any number of sides. Knows nothing
of labels and of weights of losses. Entries: `Decoder`, `squared_error`.

Shapes: N batch, C channels of a map, F features of a vector; "..." stands for the sides.
"""

import math

import torch
from torch import nn
from torch.nn import functional

from nf_pipeline.core.dtypes import precise
from nf_pipeline.core.layout import laid_out
from nf_pipeline.core.spatial import SpatialParts, parts_for

WIDTH = 12
"""Channels between the two convolutions, as many as the authors'."""


class Decoder(nn.Module):
    """out -> a guess of the samples, float32 [N, *sample_shape].

    Layers' maps with as many sides as the sample's are narrowed to `WIDTH` channels where they are, and those brought
    to the sample's size. The authors bring all channels to the sample's size first: the first convolution sees more
    then, and all of a deep layer's channels are held once for every pixel. [ours] Other outputs are averaged to a
    head's few cells, which a linear layer lays out as the cells of the sample; a sample that is a vector is all that
    this layer returns. [ours]

    Args:
        out_shape: of one sample of the layers' output: (C, *sides), or (F,).
        sample_shape: of one sample, channels first.
    """

    def __init__(self, out_shape: tuple[int, ...], sample_shape: tuple[int, ...]) -> None:
        super().__init__()
        parts = parts_for(sample_shape)
        self._num_pixels = math.prod(sample_shape[1:])
        self.features = _features(out_shape, sample_shape, parts)
        self.guess = _guess(out_shape, sample_shape, parts) if parts else nn.Identity()

    def forward(self, out: torch.Tensor) -> torch.Tensor:
        """Returns the guess; under autocast only the layers are of less than float32."""
        features = self.features(laid_out(out))
        # As the map should lie that is interpolated of it: half the time with small maps, on a CPU.
        return precise(self.guess(laid_out(features, self._num_pixels)))


def squared_error(guess: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
    """Returns the mean over all numbers: of standardised samples 1 for who guesses their mean."""
    with torch.autocast(guess.device.type, enabled=False):
        return functional.mse_loss(guess, sample)


def _features(out_shape: tuple[int, ...], sample_shape: tuple[int, ...], parts: SpatialParts | None) -> nn.Module:
    """Returns what comes before the sample's own size: `WIDTH` channels, or all that a vector has."""
    if parts is None:
        return nn.Sequential(*_linear(out_shape, math.prod(sample_shape)), nn.Unflatten(1, sample_shape))
    if len(out_shape) == len(sample_shape):
        narrow = [parts.conv(out_shape[0], WIDTH, 3, padding=1, bias=False)]
    else:
        cells = parts.cells(sample_shape[1:])
        narrow = [*_linear(out_shape, WIDTH * math.prod(cells), bias=False), nn.Unflatten(1, (WIDTH, *cells))]
    return nn.Sequential(*narrow, parts.norm(WIDTH), nn.ReLU(inplace=True))


def _guess(out_shape: tuple[int, ...], sample_shape: tuple[int, ...], parts: SpatialParts) -> nn.Module:
    channels, *sides = sample_shape
    conv = parts.conv(WIDTH, channels, 3, padding=1)
    if out_shape[1:] == sample_shape[1:]:
        return conv
    return nn.Sequential(nn.Upsample(tuple(sides), mode=parts.interpolation), conv)


def _linear(out_shape: tuple[int, ...], num_outputs: int, *, bias: bool = True) -> list[nn.Module]:
    """Returns the parts from a map, averaged to its cells, or from a vector to so many numbers."""
    channels, *sides = out_shape
    parts = parts_for(out_shape)
    if parts is None:
        return [nn.Linear(channels, num_outputs, bias=bias)]
    cells = parts.cells(sides)
    return [parts.avg_pool(cells), nn.Flatten(), nn.Linear(channels * math.prod(cells), num_outputs, bias=bias)]
