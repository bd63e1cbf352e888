"""Mean and standard deviation of each channel, exact and streaming. Entry: `ChannelStatistics`."""

import numpy as np

_LEVELS = 256


class ChannelStatistics:
    """Counts how often each channel takes each of the 256 values: whole numbers, so any order gives the same.

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        self._counts = np.zeros((channels, _LEVELS), np.int64)

    def add(self, images: np.ndarray) -> None:
        """Counts the pixels of uint8 [N, C, H, W]."""
        for channel, counts in enumerate(self._counts):
            counts += np.bincount(images[:, channel].ravel(), minlength=_LEVELS)

    def mean(self) -> list[float]:
        """Returns each channel's mean in [0, 1], that is of value / 255."""
        return [float(mean) for mean in self._moments()[0]]

    def std(self) -> list[float]:
        """Returns each channel's standard deviation of value / 255; at least 1 / 255: it is divided by."""
        return [float(max(std, 1 / 255)) for std in self._moments()[1]]

    def _moments(self) -> tuple[np.ndarray, np.ndarray]:
        values = np.arange(_LEVELS) / 255
        pixels = self._counts.sum(axis=1)
        mean = self._counts @ values / pixels
        variance = (self._counts * (values - mean[:, None]) ** 2).sum(axis=1) / pixels
        return mean, np.sqrt(variance)
