"""Temperatures against the ones that logits were made with, and calibration errors against their definition."""

import pytest
import torch

from nf_pipeline.core.calibration import (
    MAX_TEMPERATURE,
    MIN_TEMPERATURE,
    calibration_error,
    cross_entropy,
    fit_temperature,
)

NUM_SAMPLES = 20_000


def drawn(spread: float = 2.0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns logits, and labels drawn from just the probabilities that they stand for."""
    generator = torch.Generator().manual_seed(seed)
    logits_NK = spread * torch.randn(NUM_SAMPLES, 5, generator=generator)
    return logits_NK, torch.multinomial(logits_NK.softmax(dim=1), 1, generator=generator)[:, 0]


@pytest.mark.parametrize("factor", [0.3, 1.0, 4.0])
def test_temperature_that_logits_were_multiplied_with_is_found(factor: float) -> None:
    logits_NK, labels_N = drawn()
    assert fit_temperature(factor * logits_NK, labels_N) == pytest.approx(factor, rel=0.05)


@pytest.mark.parametrize("factor", [0.3, 4.0])
def test_fitted_temperature_lowers_error_and_cross_entropy_of_samples_it_has_not_seen(factor: float) -> None:
    temperature = fit_temperature(*(part * scale for part, scale in zip(drawn(), (factor, 1), strict=True)))
    logits_NK, labels_N = drawn(seed=1)
    logits_NK = factor * logits_NK
    assert calibration_error(logits_NK, labels_N, temperature) < 0.02 < calibration_error(logits_NK, labels_N) / 3
    assert cross_entropy(logits_NK, labels_N, temperature) < cross_entropy(logits_NK, labels_N)


def test_no_temperature_near_the_fitted_one_is_better() -> None:
    logits_NK, labels_N = drawn()
    logits_NK = 3 * logits_NK
    best = fit_temperature(logits_NK, labels_N)
    assert all(
        cross_entropy(logits_NK, labels_N, best) <= cross_entropy(logits_NK, labels_N, best * factor)
        for factor in (0.9, 0.99, 1.01, 1.1)
    )


def test_calibration_error_is_the_mean_distance_of_confidence_and_accuracy() -> None:
    sure, unsure = torch.tensor([[4.0, 0.0]]), torch.tensor([[0.2, 0.0]])
    logits_NK = torch.cat([sure.repeat(4, 1), unsure.repeat(6, 1)])
    labels_N = torch.tensor([0, 0, 0, 1, 0, 0, 0, 1, 1, 1])
    high, low = float(sure.softmax(1)[0, 0]), float(unsure.softmax(1)[0, 0])
    expected = 0.4 * abs(high - 0.75) + 0.6 * abs(low - 0.5)
    assert calibration_error(logits_NK, labels_N) == pytest.approx(expected, abs=1e-6)


def test_model_that_is_always_right_is_as_sure_as_its_number_of_samples_allows() -> None:
    for repeats, sure in ((2, 7 / 8), (10, 31 / 32)):
        logits_NK, labels_N = torch.eye(3).repeat(repeats, 1), torch.arange(3).repeat(repeats)
        probabilities_NK = (logits_NK / fit_temperature(logits_NK, labels_N)).softmax(dim=1)
        assert float(probabilities_NK[0, 0]) == pytest.approx(sure, rel=1e-3)


def test_temperatures_stay_within_their_range() -> None:
    logits_NK, right_N = torch.eye(3).repeat(10, 1), torch.arange(3).repeat(10)
    assert fit_temperature(logits_NK / 1000, right_N) == pytest.approx(MIN_TEMPERATURE, rel=1e-3)
    assert fit_temperature(logits_NK, (right_N + 1) % 3) == pytest.approx(MAX_TEMPERATURE, rel=1e-3)


def test_confidence_of_one_is_counted() -> None:
    assert calibration_error(torch.tensor([[100.0, 0.0]]), torch.tensor([1])) == 1.0


@pytest.mark.parametrize(
    "logits_NK", [torch.zeros(0, 3), torch.tensor([[float("nan"), 0.0]]), torch.tensor([[float("inf"), 0.0]])]
)
def test_nothing_and_numbers_that_are_none_are_refused(logits_NK: torch.Tensor) -> None:
    labels_N = torch.zeros(len(logits_NK), dtype=torch.int64)
    for refuse in (fit_temperature, calibration_error):
        with pytest.raises(ValueError, match="finite logits"):
            refuse(logits_NK, labels_N)
