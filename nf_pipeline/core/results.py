"""What an exit made of every sample of a split, and exits compared sample by sample, whatever they predict.

Choosing an exit, ending a run early and saying how sure all that is need a mean, an interval, a test of one exit
against another, and new draws of the samples. What these are differs by kind of target and is for the subclasses,
which `nf_pipeline.core.metrics` finds by it. Plain arithmetic without torch. Entries: `Results`, `Comparison`.

Shapes: N samples, E exits, K outputs.
"""

from __future__ import annotations

import base64
import binascii
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np

if TYPE_CHECKING:
    import torch

Size = tuple[int, int]
"""By which the smaller of two exits is told: parameters, then depth."""


class Results(ABC):
    """One result per sample, in stored order. Immutable, and equal to results with the same numbers.

    Attributes:
        num_samples: at least 1.
    """

    metric: ClassVar[str]
    """What the mean is called: "accuracy" or "error"."""
    sign: ClassVar[int]
    """1 where more is better, -1 where less is."""
    most: ClassVar[float]
    """The mean is never above this one, nor below 0."""
    epoch_field: ClassVar[str]
    """Field of `nf_pipeline.events.EpochDone` for the means of a block's exits."""
    total_fact: ClassVar[str]
    """Name of a block's `total` per exit in its result."""
    sample_fact: ClassVar[str]
    """Name of a block's `to_text` per exit in its manifest."""

    num_samples: int

    @classmethod
    @abstractmethod
    def measure(cls, outputs_NK: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Returns what `of` takes of some samples, [N], on their device.

        Args:
            outputs_NK: of an exit, as it was trained to return them.
            targets: what it was to return, as it was trained for.
        """

    @classmethod
    @abstractmethod
    def of(cls, measured_N: np.ndarray) -> Self:
        """Packs what `measure` has returned."""

    @property
    def is_finite(self) -> bool:
        """Whether every prediction was a number, as far as results show it."""
        return True

    @property
    @abstractmethod
    def mean(self) -> float:
        """Over the samples."""

    @property
    @abstractmethod
    def total(self) -> float:
        """What the mean follows from, to the last bit."""

    @abstractmethod
    def interval(self, confidence: float) -> tuple[float, float]:
        """Returns an interval around the mean, for an exit that was fixed beforehand."""

    @abstractmethod
    def to_bytes(self) -> bytes:
        """Returns what `from_bytes` reads back; all zero bits where nothing is known of a sample."""

    @classmethod
    @abstractmethod
    def from_bytes(cls, data: bytes, num_samples: int) -> Self:
        """Reads what `to_bytes` returned.

        Raises:
            ValueError: it is something else, or of another number of samples.
        """

    @abstractmethod
    def spread_over(self, first: int, num_samples: int) -> Self:
        """Returns the results at their places among more samples, of the others of which nothing is known."""

    @classmethod
    @abstractmethod
    def compare(cls, results: Sequence[Self], sizes: Sequence[Size]) -> Comparison:
        """Compares exits on the samples that they share; of equally good ones the smallest counts as the best."""

    @classmethod
    @abstractmethod
    def resamples(
        cls, results: Sequence[Self], sizes: Sequence[Size], generator: np.random.Generator
    ) -> Iterator[Comparison]:
        """Yields comparisons on as many samples drawn from these with replacement, without end."""

    @staticmethod
    @abstractmethod
    def show(mean: float, digits: int = 1) -> str:
        """Writes a mean for people, with so many digits behind the point of a per cent."""

    def bar(self, confidence: float) -> float:
        """Returns the end of the interval that another exit has to pass to be the better one beyond chance."""
        return self.interval(confidence)[1 if self.sign > 0 else 0]

    def to_text(self) -> str:
        """Returns the results in base64, for a JSON document."""
        return base64.b64encode(self.to_bytes()).decode()

    @classmethod
    def from_text(cls, text: str, num_samples: int) -> Self:
        """Reads what `to_text` returned.

        Raises:
            ValueError: it is no base64, or not the results of so many samples.
        """
        try:
            data = base64.b64decode(text, validate=True)
        except binascii.Error as error:
            raise ValueError(f"no base64: {error}") from None
        return cls.from_bytes(data, num_samples)


@dataclass(frozen=True, kw_only=True, eq=False)
class Comparison(ABC):
    """How good exits are on the same samples, and how sure the best one is better than another.

    Attributes:
        means: of every exit.
        best: position of the best one.
        num_samples: of all.
    """

    means: Sequence[float]
    best: int
    num_samples: int

    @abstractmethod
    def given_up(self, idx: int) -> float:
        """Returns by how much an exit is worse than the best one, in the unit of `exits.tolerance`."""

    @abstractmethod
    def p_value(self, idx: int) -> float:
        """Returns how likely it is that the best one looks so much better if both are equally good."""

    @abstractmethod
    def explain(self, idx: int) -> tuple[str, str, str]:
        """Puts in words how much an exit gives up, in what unit tolerances are, and what the paired test saw."""


def best_of(keys: Sequence[float], sizes: Sequence[Size], sign: int) -> int:
    """Returns the position of the best of some exits, of several the smallest.

    Args:
        keys: by which they are compared.
        sign: see `Results.sign`.
    """
    return min(range(len(sizes)), key=lambda idx: (-sign * keys[idx], sizes[idx]))
