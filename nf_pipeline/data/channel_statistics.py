"""Mean and standard deviation of each channel, streaming. Entry: `new_statistics`.

Whole numbers are counted or summed exactly, so any order gives the same; of floating point numbers the same order
does.
"""

from typing import Protocol

import numpy as np

from nf_pipeline.samples import InputSpec

_LEVELS = 256


class Statistics(Protocol):
    """What has been seen of each channel so far."""

    def add(self, samples: np.ndarray) -> None:
        """Counts some samples, [N, C, ...] of the stored type."""

    def mean(self) -> tuple[float, ...]:
        """Returns each channel's mean, in stored units."""

    def std(self) -> tuple[float, ...]:
        """Returns each channel's standard deviation, in stored units; never 0: it is divided by."""


def new_statistics(inputs: InputSpec) -> Statistics | None:
    """Returns statistics of such inputs without any samples yet; None of tokens, which are no quantities."""
    if inputs.num_tokens:
        return None
    channels = inputs.shape[0]
    if inputs.dtype == "uint8" and inputs.is_image:  # few channels
        return ChannelStatistics(channels)
    return FloatStatistics(channels) if inputs.dtype == "float32" else WholeStatistics(channels)


class ChannelStatistics:
    """Counts how often each channel takes each of the 256 values of uint8.

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        self._counts = np.zeros((channels, _LEVELS), np.int64)

    def add(self, samples: np.ndarray) -> None:
        """Counts the pixels of uint8 [N, C, ...]."""
        for channel, counts in enumerate(self._counts):
            counts += np.bincount(samples[:, channel].ravel(), minlength=_LEVELS)

    def mean(self) -> tuple[float, ...]:
        """Returns each channel's mean in [0, 255]."""
        return tuple(255 * float(mean) for mean in self._moments()[0])

    def std(self) -> tuple[float, ...]:
        """Returns each channel's standard deviation, at least 1."""
        return tuple(255 * float(max(std, 1 / 255)) for std in self._moments()[1])

    def _moments(self) -> tuple[np.ndarray, np.ndarray]:
        values = np.arange(_LEVELS) / 255
        pixels = self._counts.sum(axis=1)
        mean = self._counts @ values / pixels
        variance = (self._counts * (values - mean[:, None]) ** 2).sum(axis=1) / pixels
        return mean, np.sqrt(variance)


class WholeStatistics:
    """Sums numbers of 8 or 16 bits and their squares, as whole numbers without bounds.

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        self._count = 0
        self._sums = [0] * channels
        self._squares = [0] * channels

    def add(self, samples: np.ndarray) -> None:
        """Counts uint8, uint16 or int16 [N, C, ...]; fewer than 2**31 numbers of a channel at once."""
        wide_NCX = samples.reshape(*samples.shape[:2], -1).astype(np.int64)
        self._count += wide_NCX.shape[0] * wide_NCX.shape[2]
        self._sums = _added(self._sums, wide_NCX.sum(axis=(0, 2)))
        self._squares = _added(self._squares, (wide_NCX * wide_NCX).sum(axis=(0, 2)))

    def mean(self) -> tuple[float, ...]:
        """Returns each channel's mean, correctly rounded."""
        return tuple(total / self._count for total in self._sums)

    def std(self) -> tuple[float, ...]:
        """Returns each channel's standard deviation, at least 1."""
        scaled = (self._count * squares - total**2 for total, squares in zip(self._sums, self._squares, strict=True))
        return tuple(max((variance / self._count**2) ** 0.5, 1.0) for variance in scaled)


class FloatStatistics:
    """Merges the moments of successive batches, in float64.

    Source: Chan, Golub, LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances".

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        self._count = 0
        self._mean = np.zeros(channels)
        self._squares = np.zeros(channels)  # of distances from the mean, summed

    def add(self, samples: np.ndarray) -> None:
        """Counts finite float32 [N, C, ...]."""
        if not len(samples):
            return
        wide_NCX = samples.reshape(*samples.shape[:2], -1).astype(np.float64)
        count = wide_NCX.shape[0] * wide_NCX.shape[2]
        mean = wide_NCX.mean(axis=(0, 2))
        squares = np.square(wide_NCX - mean[:, None]).sum(axis=(0, 2))
        distance, total = mean - self._mean, self._count + count
        self._mean = self._mean + distance * (count / total)
        self._squares = self._squares + squares + distance**2 * (self._count * count / total)
        self._count = total

    def mean(self) -> tuple[float, ...]:
        """Returns each channel's mean."""
        return tuple(map(float, self._mean))

    def std(self) -> tuple[float, ...]:
        """Returns each channel's standard deviation; 1 where float32 cannot tell it from a constant's [ours]."""
        std = np.sqrt(self._squares / max(1, self._count))
        is_constant = std <= np.finfo(np.float32).eps * np.abs(self._mean)
        return tuple(map(float, np.where(is_constant, 1.0, std)))


def _added(sums: list[int], more: np.ndarray) -> list[int]:
    return [total + int(value) for total, value in zip(sums, more, strict=True)]
