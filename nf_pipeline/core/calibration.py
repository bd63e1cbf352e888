"""Makes a classifier's probabilities say how often it is right: temperature scaling, and the error before and after.

After Guo et al., "On Calibration of Modern Neural Networks" (ICML 2017, https://arxiv.org/abs/1706.04599). Dividing
all logits by one number changes no prediction, so accuracies stay what they are. Knows nothing of models and data.
Entries: `calibrate`, `fit_temperature`, `calibration_error`.
"""

import math
from dataclasses import dataclass

import torch
from torch.nn import functional

NUM_BINS = 15
"""Bins of confidence, as in the paper."""

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.05, 20.0
"""Where temperatures are looked for: a model that guesses has its best one at an end."""

_PRECISION = 1e-4


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A temperature, and what it changes on the very samples that it was fitted on.

    One number fits these hardly better than it fits others.

    Attributes:
        temperature: that logits are divided by.
        ece_before, ece_after: expected calibration error without and with it, in [0, 1].
        cross_entropy_before, cross_entropy_after: mean negative log-likelihood, in nats.
        num_samples: that it was fitted on.
    """

    temperature: float
    ece_before: float
    ece_after: float
    cross_entropy_before: float
    cross_entropy_after: float
    num_samples: int

    def check(self) -> None:
        """Checks what a model computes with.

        Raises:
            ValueError: the temperature is not above 0.
        """
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature: got {self.temperature}, want a number above 0")


def calibrate(logits_NK: torch.Tensor, labels_N: torch.Tensor) -> Calibration:
    """Fits a temperature and measures what it changes.

    Args:
        logits_NK, labels_N: see `fit_temperature`.

    Raises:
        ValueError: no samples, or logits that are not finite.
    """
    temperature = fit_temperature(logits_NK, labels_N)
    return Calibration(
        temperature=temperature,
        ece_before=calibration_error(logits_NK, labels_N),
        ece_after=calibration_error(logits_NK, labels_N, temperature),
        cross_entropy_before=cross_entropy(logits_NK, labels_N),
        cross_entropy_after=cross_entropy(logits_NK, labels_N, temperature),
        num_samples=len(labels_N),
    )


def fit_temperature(logits_NK: torch.Tensor, labels_N: torch.Tensor) -> float:
    """Returns the T with which softmax(logits / T) has the smallest cross-entropy, against labels that are not sure.

    That a model is right about all of few samples does not make it sure of the next one: of N samples every label
    counts as (N + 1) / (N + 2), the rest goes to the other classes (Platt 1999, "Probabilistic Outputs for Support
    Vector Machines"; for more than two classes [ours]). The cross-entropy is convex in 1/T, so its only minimum is
    found by bisecting the sign of its slope.

    Args:
        logits_NK: of samples that the model was not trained on.
        labels_N: int64, their classes.

    Raises:
        ValueError: no samples, or logits that are not finite.
    """
    logits_NK = _checked(logits_NK, labels_N)
    num_samples, num_classes = logits_NK.shape
    sure, unsure = (num_samples + 1) / (num_samples + 2), 1 / (num_samples + 2)
    right_N = logits_NK.gather(1, labels_N[:, None])[:, 0]
    wanted_N = sure * right_N + unsure * (logits_NK.sum(dim=1) - right_N) / max(1, num_classes - 1)

    def slope(inverse: float) -> float:
        expected_N = ((inverse * logits_NK).softmax(dim=1) * logits_NK).sum(dim=1)
        return float((expected_N - wanted_N).mean())

    low, high = 1 / MAX_TEMPERATURE, 1 / MIN_TEMPERATURE
    while high / low > 1 + _PRECISION:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return 1 / math.sqrt(low * high)


def calibration_error(logits_NK: torch.Tensor, labels_N: torch.Tensor, temperature: float = 1.0) -> float:
    """Returns the expected calibration error: how far confidence lies from accuracy, in [0, 1].

    See `confidence_error`.

    Args:
        logits_NK, labels_N: see `fit_temperature`.
        temperature: that logits are divided by, above 0.

    Raises:
        ValueError: no samples, or logits that are not finite.
    """
    probabilities_NK = (_checked(logits_NK, labels_N) / temperature).softmax(dim=1)
    confidence_N, predicted_N = probabilities_NK.max(dim=1)
    return confidence_error(confidence_N, predicted_N == labels_N)


def confidence_error(confidence_N: torch.Tensor, right_N: torch.Tensor) -> float:
    """Returns the expected calibration error of predictions, of which there must be some.

    Samples are put into `NUM_BINS` equal bins of their highest probability; the distances between the mean of it and
    the share of right predictions are averaged, weighted by the samples in each bin.

    Args:
        confidence_N: probability of each prediction, in [0, 1].
        right_N: bool, whether it is the label.
    """
    confidence_N = confidence_N.double()
    # A confidence of 1 belongs to the last bin.
    bin_N = (confidence_N * NUM_BINS).long().clamp(max=NUM_BINS - 1)
    gap_B = torch.zeros(NUM_BINS, dtype=torch.float64).index_add_(0, bin_N, confidence_N - right_N.double())
    return float(gap_B.abs().sum() / len(right_N))


def cross_entropy(logits_NK: torch.Tensor, labels_N: torch.Tensor, temperature: float = 1.0) -> float:
    """Returns the mean negative log-likelihood, in nats."""
    return float(functional.cross_entropy(_checked(logits_NK, labels_N) / temperature, labels_N))


def _checked(logits_NK: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
    if len(labels_N) == 0 or not bool(logits_NK.isfinite().all()):
        raise ValueError(f"got {len(labels_N)} samples, want one or more with finite logits")
    return logits_NK.double()
