"""How far an exit that predicts values is off, sample by sample: the squared standardised residuals.

A sample's error is the mean over its values of ((prediction - value) / standard deviation of that value over train)
squared, so the mean over samples is the part of the variance that is left: 1 for who predicts the mean of train, 0
for who is always right. As text four bytes and a third more per sample: 16 megabytes for 100,000 samples and 30
exits. Knows nothing of models and stores. Entry class: `SampleErrors`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from nf_pipeline.core.chance import mean_interval, mean_test
from nf_pipeline.core.results import Comparison, Results, Size, best_of
from nf_pipeline.units import format_error

if TYPE_CHECKING:
    import torch

LARGEST_ERROR = 1e30
"""What is larger, or no number, counts as this: means and their spreads stay numbers."""

_STORED = np.dtype("<f4")


@dataclass(frozen=True)
class SampleErrors(Results):
    """See `nf_pipeline.core.results.Results`; the mean is the part of the variance that is left, 0 or more.

    Attributes:
        data: float32, little-endian, one per sample.
    """

    data: bytes

    metric = "error"
    sign = -1
    most = math.inf
    epoch_field = "val_errors"
    total_fact = "val_errors"
    sample_fact = "val_sample_errors"

    @classmethod
    def measure(cls, outputs_NK: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Returns the mean squared residual of every sample, float32, of standardised values_NK."""
        return (outputs_NK.float() - targets).square().mean(dim=1)

    @classmethod
    def of(cls, measured_N: np.ndarray) -> SampleErrors:
        """Packs an error per sample, float [N], 0 or more."""
        numbers_N = np.nan_to_num(measured_N.astype(np.float64), nan=LARGEST_ERROR, posinf=LARGEST_ERROR)
        return cls(numbers_N.clip(0.0, LARGEST_ERROR).astype(_STORED).tobytes())

    @property
    def num_samples(self) -> int:
        """See `Results`."""
        return len(self.data) // _STORED.itemsize

    @cached_property
    def errors_N(self) -> np.ndarray:
        """Float64, one per sample."""
        return np.frombuffer(self.data, _STORED).astype(np.float64)

    @cached_property
    def mean(self) -> float:
        """The part of the variance that is left."""
        # Summed exactly: the driver compares it with what a worker on another machine found.
        return math.fsum(self.errors_N.tolist()) / self.num_samples

    @property
    def total(self) -> float:
        """The mean."""
        return self.mean

    @property
    def is_finite(self) -> bool:
        """Whether every prediction was a number."""
        return bool(self.errors_N.max() < np.float32(LARGEST_ERROR))

    def interval(self, confidence: float) -> tuple[float, float]:
        """Returns the mean and so many standard errors to either side, by Student's t; it begins at 0 or above."""
        # Of one sample the spread is unknown; squared residuals spread by about their mean.
        spread = float(self.errors_N.std(ddof=1)) if self.num_samples > 1 else self.mean
        low, high = mean_interval(self.mean, spread, self.num_samples, confidence)
        return max(0.0, low), high

    def to_bytes(self) -> bytes:
        """See `Results.to_bytes`."""
        return self.data

    @classmethod
    def from_bytes(cls, data: bytes, num_samples: int) -> SampleErrors:
        """See `Results.from_bytes`."""
        if len(data) != _STORED.itemsize * num_samples:
            raise ValueError(f"got {len(data)} bytes, want {_STORED.itemsize} for each of {num_samples} samples")
        errors_N = np.frombuffer(data, _STORED)
        if not bool(((errors_N >= 0) & np.isfinite(errors_N)).all()):
            raise ValueError("got an error that is below 0, or no number")
        return cls(data)

    def spread_over(self, first: int, num_samples: int) -> SampleErrors:
        """See `Results.spread_over`."""
        before = bytes(first * _STORED.itemsize)
        return SampleErrors((before + self.data).ljust(num_samples * _STORED.itemsize, b"\0"))

    @classmethod
    def compare(cls, results: Sequence[SampleErrors], sizes: Sequence[Size]) -> ErrorComparison:
        """See `Results.compare`."""
        errors_EN = np.stack([one.errors_N for one in results])
        means = [one.mean for one in results]
        return ErrorComparison.of(means, sizes, errors_EN, np.ones(errors_EN.shape[1]))

    @classmethod
    def resamples(
        cls, results: Sequence[SampleErrors], sizes: Sequence[Size], generator: np.random.Generator
    ) -> Iterator[ErrorComparison]:
        """See `Results.resamples`."""
        errors_EN = np.stack([one.errors_N for one in results])
        num_samples = errors_EN.shape[1]
        while True:
            drawn_N = generator.integers(num_samples, size=num_samples)
            times_N = np.bincount(drawn_N, minlength=num_samples).astype(np.float64)
            means = (errors_EN @ times_N / num_samples).tolist()
            yield ErrorComparison.of(means, sizes, errors_EN, times_N)

    @staticmethod
    def show(mean: float, digits: int = 1) -> str:
        """See `Results.show`."""
        return f"error {format_error(mean, digits)}"


@dataclass(frozen=True, kw_only=True, eq=False)
class ErrorComparison(Comparison):
    """Errors of exits on the same samples.

    Attributes:
        errors_EN: float64.
        times_N: how often each sample counts, float64.
    """

    errors_EN: np.ndarray
    times_N: np.ndarray

    @classmethod
    def of(
        cls, means: Sequence[float], sizes: Sequence[Size], errors_EN: np.ndarray, times_N: np.ndarray
    ) -> ErrorComparison:
        """Makes one from errors and how often they count."""
        best, num_samples = best_of(means, sizes, SampleErrors.sign), len(times_N)
        return cls(means=means, best=best, num_samples=num_samples, errors_EN=errors_EN, times_N=times_N)

    def given_up(self, idx: int) -> float:
        """Returns per cent of the best one's error."""
        more, least = self.means[idx] - self.means[self.best], self.means[self.best]
        if more <= 0.0:
            return 0.0
        return 100 * more / least if least > 0.0 else math.inf

    def p_value(self, idx: int) -> float:
        """See `Comparison.p_value`; a t-test of the differences, see `nf_pipeline.core.chance.mean_test`."""
        return mean_test(*self.difference(idx), self.num_samples)

    def difference(self, idx: int) -> tuple[float, float]:
        """Returns by how much the errors of an exit are above the best one's on average, and the spread of that."""
        difference_N = self.errors_EN[idx] - self.errors_EN[self.best]
        mean = float(difference_N @ self.times_N) / self.num_samples
        squares = float((difference_N - mean) ** 2 @ self.times_N)
        return mean, math.sqrt(squares / max(1, self.num_samples - 1))

    def explain(self, idx: int) -> tuple[str, str, str]:
        """See `Comparison.explain`."""
        mean, spread = self.difference(idx)
        standard_error = spread / math.sqrt(self.num_samples)
        saw = f"its errors are {mean:.4f} above those of the best of {len(self.means)} exits"
        return f"{self.given_up(idx):.2f} % above", "%", f"{saw}, standard error {standard_error:.4f}"
