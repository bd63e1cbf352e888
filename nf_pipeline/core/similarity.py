"""How alike the samples of a batch are in what layers return, for losses that want those of a class to be alike.

After A. Nokland and L. H. Eidnes, "Training Neural Networks with Local Error Signals" (ICML 2019,
https://arxiv.org/abs/1901.06656). Knows nothing of labels and of weights of losses. Entries: `Similarities`,
`similarities`.

Shapes: N batch, C channels, F features; "..." stands for the sides of a map, from none of a vector to three of a
volume.
"""

import math

import torch
from torch import nn
from torch.nn import functional

from nf_pipeline.core.dtypes import precise
from nf_pipeline.core.layout import laid_out
from nf_pipeline.core.spatial import parts_for

LARGEST_MAP_PIXELS = 256
"""Maps of more pixels, most often the first layers', are averaged to at most so many before similarities. [ours]"""

SMALLEST_NORM = 1e-4
"""Centred samples of a smaller norm are divided by this one: the gradient of a cosine goes with the inverse of the
norm, and a sample that is nearly dead would outweigh its whole batch. Untrained layers' are 0.2 to 3. [ours]"""

# Authors' code, too: of fewer channels spreads alone say next to nothing.
_FEWEST_SPREADS = 4


class Similarities(nn.Module):
    """out -> similarities_NN of all pairs of samples, after a convolution 3 wide, C -> C, that only training has.

    A map becomes its channels' spreads over its places, as in the authors' code for pictures, however many sides it
    has. Maps of more than `LARGEST_MAP_PIXELS` are pooled first: halved until they are no larger, which follows
    from the shape alone, so that every worker builds the same. [ours] Under autocast only the convolution is of less
    than float32.

    Args:
        out_shape: (C, *sides) with one to three sides, or (F,) where the layers return a vector, which is compared as
            it is.
    """

    def __init__(self, out_shape: tuple[int, ...]) -> None:
        super().__init__()
        channels, *sides = out_shape
        parts = parts_for(out_shape)
        self.pool = parts.avg_pool(_pooled(*sides)) if parts else nn.Identity()
        self.conv = parts.conv(channels, channels, 3, padding=1, bias=False) if parts else nn.Identity()

    def forward(self, out: torch.Tensor) -> torch.Tensor:
        """Returns cosines, between -1 and 1."""
        features = self.conv(laid_out(self.pool(out)))
        return similarities(_spreads(precise(features)))


def similarities(x_NF: torch.Tensor) -> torch.Tensor:
    """Returns the cosine of every pair of samples, each centred at its own mean, in float32 at least.

    Under bf16 cosines would be off by 0.02. Samples nearly all of whose numbers are alike have smaller ones
    (`SMALLEST_NORM`).
    """
    with torch.autocast(x_NF.device.type, enabled=False):
        x_NF = precise(x_NF)
        centred_NF = functional.normalize(x_NF - x_NF.mean(dim=1, keepdim=True), dim=1, eps=SMALLEST_NORM)
        return centred_NF @ centred_NF.T


def _spreads(x: torch.Tensor) -> torch.Tensor:
    """Returns one number per channel where a map has places to spread over, all numbers elsewhere."""
    if x.dim() > 2 and x.shape[1] >= _FEWEST_SPREADS and x[0, 0].numel() > 1:
        return x.flatten(2).std(dim=2)
    return x.flatten(1)


def _pooled(*sides: int) -> tuple[int, ...]:
    while math.prod(sides) > LARGEST_MAP_PIXELS:
        sides = tuple((side + 1) // 2 for side in sides)
    return sides
