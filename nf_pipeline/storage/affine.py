"""Numbers as bytes: value = scale * (byte - zero point), with one scale and zero point per channel.

Zero is always a byte of its own, so that what a rectifier has set to zero stays exactly zero. The ranges are measured
on a part of the data and widened; what is beyond them is stored as the nearest value inside. Deliberately knows
nothing of networks. Entry points: `fit_affine`, `Affine`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nf_pipeline.errors import ConfigError

HEADROOM = 0.25
"""Part of a measured range by which it is widened, on each side of zero: more data have larger extremes."""

_STEPS = 254  # of 255: a zero point is rounded up to a whole byte
_NARROWEST = 1 / 64  # of the widest channel: one that was silent while it was measured may speak later
_TINIEST = 1e-30
_DIGITS = 4


@dataclass(frozen=True)
class Affine:
    """How the bytes of every channel stand for numbers.

    Attributes:
        scales: float, above 0; one per channel.
        zero_points: the byte, 0 to 255, that stands for zero; one per channel.
    """

    scales: tuple[float, ...]
    zero_points: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.scales) != len(self.zero_points):
            raise ConfigError(f"affine: got {len(self.scales)} scales and {len(self.zero_points)} zero points")
        for scale in self.scales:
            if not isinstance(scale, float) or not 0 < scale < math.inf:
                raise ConfigError(f"affine: scale: got {scale!r}, want a number above 0")
        for zero_point in self.zero_points:
            if type(zero_point) is not int or not 0 <= zero_point <= 255:
                raise ConfigError(f"affine: zero point: got {zero_point!r}, want 0 to 255")

    def decode(self, stored: np.ndarray) -> np.ndarray:
        """Turns bytes into numbers.

        Args:
            stored: uint8 [N, C, ...].

        Returns:
            float32 of the same shape, bit for bit what training reads.
        """
        sides = (-1, *[1] * (stored.ndim - 2))
        numbers = stored.astype(np.float32)
        numbers -= np.asarray(self.zero_points, np.float32).reshape(sides)
        numbers *= np.asarray(self.scales, np.float32).reshape(sides)
        return numbers


def fit_affine(low: Sequence[float], high: Sequence[float]) -> Affine:
    """Chooses scales and zero points for measured ranges.

    Args:
        low, high: smallest and largest number of every channel, finite.
    """
    lows = [(1 + HEADROOM) * min(value, 0.0) for value in low]
    highs = [(1 + HEADROOM) * max(value, 0.0) for value in high]
    widest = max((top - bottom for bottom, top in zip(lows, highs, strict=True)), default=0.0)
    scales, zero_points = [], []
    for bottom, top in zip(lows, highs, strict=True):
        scale = _rounded_up(max(top - bottom, _NARROWEST * widest, _TINIEST) / _STEPS)
        scales.append(scale)
        zero_points.append(math.ceil(-bottom / scale))
    return Affine(tuple(scales), tuple(zero_points))


def _rounded_up(scale: float) -> float:
    """Few digits keep documents short; the same number everywhere, however it was computed."""
    unit = 10.0 ** (math.floor(math.log10(scale)) - _DIGITS + 1)
    return float(f"{math.ceil(scale / unit) * unit:.{_DIGITS - 1}e}")
