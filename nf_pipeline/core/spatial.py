"""The parts of networks by how many sides a map has: one of series and texts, two of pictures, three of volumes.

A sample is (C, *sides), channels first. Vectors (F,) have no sides and none of these parts. Knows nothing of heads
and models. Entry: `parts_for`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True, kw_only=True)
class SpatialParts:
    """The modules of torch for maps with so many sides.

    Attributes:
        conv, norm, avg_pool, max_pool: convolution, batch norm, adaptive average pool and max pool.
        num_cells: along each side, to which a head averages a map: some four numbers for each channel, eight of a
            volume. [ours]
        interpolation: how a map of another size is made of it.
    """

    conv: Callable[..., nn.Module]
    norm: Callable[[int], nn.Module]
    avg_pool: Callable[..., nn.Module]
    max_pool: Callable[[int], nn.Module]
    num_cells: int
    interpolation: str

    def cells(self, sides: Sequence[int]) -> tuple[int, ...]:
        """Returns what a map of these sides is averaged to."""
        return tuple(min(self.num_cells, side) for side in sides)


PARTS = {
    1: SpatialParts(
        conv=nn.Conv1d,
        norm=nn.BatchNorm1d,
        avg_pool=nn.AdaptiveAvgPool1d,
        max_pool=nn.MaxPool1d,
        num_cells=4,
        interpolation="linear",
    ),
    2: SpatialParts(
        conv=nn.Conv2d,
        norm=nn.BatchNorm2d,
        avg_pool=nn.AdaptiveAvgPool2d,
        max_pool=nn.MaxPool2d,
        num_cells=2,
        interpolation="bilinear",
    ),
    3: SpatialParts(
        conv=nn.Conv3d,
        norm=nn.BatchNorm3d,
        avg_pool=nn.AdaptiveAvgPool3d,
        max_pool=nn.MaxPool3d,
        num_cells=2,
        interpolation="trilinear",
    ),
}
"""By the number of sides."""


def parts_for(shape: tuple[int, ...]) -> SpatialParts | None:
    """Returns the parts for maps of a shape.

    Args:
        shape: (C, *sides) of one sample.

    Returns:
        None where there are none: of a vector, or with more than three sides.
    """
    return PARTS.get(len(shape) - 1)
