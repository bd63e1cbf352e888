import pytest
import torch

from nf_pipeline.errors import Diverged
from nf_pipeline.worker.loss_guard import CHECK_EVERY, LossGuard


def step(*losses: float) -> list[torch.Tensor]:
    return [torch.tensor(loss) for loss in losses]


def test_mean_losses_are_per_unit() -> None:
    guard = LossGuard("block-000", 10, 0)
    guard.add(step(1.0, 4.0))
    guard.add(step(3.0, 2.0))
    guard.check()
    assert guard.mean_losses() == [2.0, 3.0]
    assert guard.last_loss() == 2.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e6])
def test_bad_loss_is_an_error_that_names_epoch_step_and_unit(bad: float) -> None:
    guard = LossGuard("block-002", 10, 4)
    guard.add(step(1.0, 1.0))
    guard.add(step(1.0, bad))
    with pytest.raises(Diverged, match=r"block-002.*unit 1 in epoch 5, step 1"):
        guard.check()


def test_losses_are_fetched_every_few_steps_without_being_asked() -> None:
    guard = LossGuard("block-000", 10, 0)
    for _ in range(CHECK_EVERY - 1):
        guard.add(step(float("nan")))
    with pytest.raises(Diverged, match="step 0"):
        guard.add(step(1.0))


def test_loss_at_chance_for_many_classes_is_fine() -> None:
    guard = LossGuard("block-000", 1000, 0)
    guard.add(step(6.9))
    guard.check()
    assert guard.mean_losses() == pytest.approx([6.9])
