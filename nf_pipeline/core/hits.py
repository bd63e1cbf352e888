"""Which samples of a split a classifier got right: one integer whose bit i stands for sample i in stored order.

All exits see the same samples, so counting what one got right and another did not takes `(a & ~b).bit_count()`. As
text, an eighth of a byte and a third more per sample: half a megabyte for 100,000 samples and 30 exits. Knows nothing
of models and stores. Entry class: `Hits`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from nf_pipeline.core.chance import sign_test, wilson_interval
from nf_pipeline.core.results import Comparison, Results, Size, best_of
from nf_pipeline.units import format_accuracy

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Hits(Results):
    """See `nf_pipeline.core.results.Results`; the mean is the accuracy, in [0, 1].

    Attributes:
        bits: one per sample, 1 where the likeliest class is the label.
        num_samples: of all.
    """

    bits: int
    num_samples: int

    metric = "accuracy"
    sign = 1
    most = 1.0
    epoch_field = "val_accuracies"
    total_fact = "val_correct"
    sample_fact = "val_hits"

    @classmethod
    def measure(cls, outputs_NK: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Returns whether the largest of the logits_NK is that of the label y_N."""
        return outputs_NK.argmax(dim=1) == targets

    @classmethod
    def of(cls, measured_N: np.ndarray) -> Hits:
        """Packs a yes or no per sample, bool [N]."""
        packed = np.packbits(measured_N, bitorder="little").tobytes()
        return cls(int.from_bytes(packed, "little"), len(measured_N))

    @property
    def total(self) -> int:
        """Samples that it got right."""
        return self.bits.bit_count()

    @property
    def mean(self) -> float:
        """The accuracy, in [0, 1]."""
        return self.total / self.num_samples

    def interval(self, confidence: float) -> tuple[float, float]:
        """Returns the Wilson interval around the accuracy."""
        return wilson_interval(self.total, self.num_samples, confidence)

    def unpacked(self) -> np.ndarray:
        """Returns what `of` was given, bool [N]."""
        flat = np.frombuffer(self.to_bytes(), np.uint8)
        return np.unpackbits(flat, count=self.num_samples, bitorder="little").astype(bool)

    def to_bytes(self) -> bytes:
        """See `Results.to_bytes`."""
        return self.bits.to_bytes(_num_bytes(self.num_samples), "little")

    @classmethod
    def from_bytes(cls, data: bytes, num_samples: int) -> Hits:
        """See `Results.from_bytes`."""
        bits = int.from_bytes(data, "little")
        if len(data) != _num_bytes(num_samples) or bits.bit_length() > num_samples:
            got = f"got {len(data)} bytes up to bit {bits.bit_length()}"
            raise ValueError(f"{got}, want those of {num_samples} samples")
        return cls(bits, num_samples)

    def spread_over(self, first: int, num_samples: int) -> Hits:
        """See `Results.spread_over`."""
        return Hits(self.bits << first, num_samples)

    @classmethod
    def compare(cls, results: Sequence[Hits], sizes: Sequence[Size]) -> HitComparison:
        """See `Results.compare`."""
        correct = [one.total for one in results]
        best = best_of(correct, sizes, cls.sign)
        both = [(one.bits & results[best].bits).bit_count() for one in results]
        return HitComparison.of(correct, both, best, results[0].num_samples)

    @classmethod
    def resamples(
        cls, results: Sequence[Hits], sizes: Sequence[Size], generator: np.random.Generator
    ) -> Iterator[HitComparison]:
        """See `Results.resamples`."""
        patterns_KP, counts_P = _patterns(results)
        num_samples = results[0].num_samples
        while True:
            drawn_P = generator.multinomial(num_samples, counts_P / num_samples)
            correct = _counts(patterns_KP, drawn_P)
            best = best_of(correct, sizes, cls.sign)
            yield HitComparison.of(correct, _counts(patterns_KP, drawn_P * patterns_KP[best]), best, num_samples)

    @staticmethod
    def show(mean: float, digits: int = 1) -> str:
        """See `Results.show`."""
        return format_accuracy(mean, digits)


@dataclass(frozen=True, kw_only=True, eq=False)
class HitComparison(Comparison):
    """How often exits were right on the same samples.

    Attributes:
        correct: how often each one was right.
        both: how often each one and the best were.
    """

    correct: Sequence[int]
    both: Sequence[int]

    @classmethod
    def of(cls, correct: Sequence[int], both: Sequence[int], best: int, num_samples: int) -> HitComparison:
        """Makes one from counts."""
        means = [count / num_samples for count in correct]
        return cls(means=means, best=best, num_samples=num_samples, correct=correct, both=both)

    def given_up(self, idx: int) -> float:
        """Returns percentage points of accuracy."""
        return 100 * (self.correct[self.best] - self.correct[idx]) / self.num_samples

    def p_value(self, idx: int) -> float:
        """See `Comparison.p_value`; McNemar's exact test."""
        return sign_test(*self.only_one(idx))

    def only_one(self, idx: int) -> tuple[int, int]:
        """Returns on how many samples only the best was right, and on how many only this exit."""
        return self.correct[self.best] - self.both[idx], self.correct[idx] - self.both[idx]

    def explain(self, idx: int) -> tuple[str, str, str]:
        """See `Comparison.explain`."""
        only_best, only_one = self.only_one(idx)
        saw = f"{only_best} samples only the best of {len(self.means)} exits got right, {only_one} only this one"
        return f"{self.given_up(idx):.2f} points below", "points", saw


def _num_bytes(num_samples: int) -> int:
    return -(-num_samples // 8)


def _patterns(results: Sequence[Hits]) -> tuple[np.ndarray, np.ndarray]:
    """Groups samples that the same exits got right: drawing groups is drawing samples, and takes less.

    Returns:
        float64 [exits, groups] of 0 and 1, and the samples in each group.
    """
    right_KN = np.stack([one.unpacked() for one in results])
    packed_NB = np.packbits(right_KN, axis=0).T
    groups_PB, counts_P = np.unique(packed_NB, axis=0, return_counts=True)
    patterns_PK = np.unpackbits(groups_PB, axis=1, count=len(results))
    return patterns_PK.T.astype(np.float64), counts_P


def _counts(patterns_KP: np.ndarray, drawn_P: np.ndarray) -> list[int]:
    # Products of float64 are fast, and exact for counts.
    return (patterns_KP @ drawn_P).astype(np.int64).tolist()
