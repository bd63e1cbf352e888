import pytest

from nf_pipeline.worker.schedule import learning_rate, peak_learning_rate, warmup_steps


def rates(total: int, warmup: int) -> list[float]:
    return [learning_rate(s, total_steps=total, num_warmup_steps=warmup, peak_lr=0.4) for s in range(total)]


def test_rate_rises_linearly_to_the_peak_then_falls_towards_zero() -> None:
    got = rates(100, 10)
    assert got[:10] == pytest.approx([0.4 * (s + 1) / 10 for s in range(10)])
    assert max(got) == pytest.approx(0.4)
    assert got[10:] == sorted(got[10:], reverse=True)
    assert 0 < got[-1] < 0.001


def test_one_step_without_warmup_uses_the_peak() -> None:
    assert rates(1, 0) == [0.4]


def test_peak_scales_linearly_with_the_batch() -> None:
    assert peak_learning_rate(0.1, 256) == pytest.approx(0.2)
    assert peak_learning_rate(0.1, 32) == pytest.approx(0.025)


def test_warmup_takes_at_most_half_the_schedule() -> None:
    assert warmup_steps(1.0, 50, 400) == 50
    assert warmup_steps(1.0, 50, 50) == 25
