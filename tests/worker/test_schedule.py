import pytest
import torch

from nf_pipeline.config import TrainConfig
from nf_pipeline.worker.schedule import learning_rate, peak_learning_rate, set_learning_rate, warmup_steps


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


def test_every_group_of_every_optimiser_gets_the_rate_of_the_step():
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(3)]
    optimizers = [torch.optim.SGD([{"params": [weights[0]]}, {"params": [weights[1]]}], lr=9.0)]
    optimizers.append(torch.optim.SGD([weights[2]], lr=9.0))
    config = TrainConfig(epochs=4, warmup_epochs=1.0)
    set_learning_rate(optimizers, config, 3, 10, 0.4)
    rates = {group["lr"] for optimizer in optimizers for group in optimizer.param_groups}
    assert rates == {learning_rate(3, total_steps=40, num_warmup_steps=10, peak_lr=0.4)}
