import pytest
import torch

from nf_pipeline.config import TrainConfig
from nf_pipeline.core.layers import cut
from nf_pipeline.core.local_unit import build_units, even_spans
from nf_pipeline.core.models import build_model
from nf_pipeline.core.objectives import OBJECTIVES, CrossEntropy, Labels, UnitEnd, build_objective
from nf_pipeline.core.train_step import make_optimizer, train_step
from nf_pipeline.errors import Diverged
from nf_pipeline.samples import InputSpec, TargetSpec
from nf_pipeline.worker.loss_guard import CHECK_EVERY, LossGuard

PLAIN = [CrossEntropy(), CrossEntropy()]


def step(*losses: float) -> list[torch.Tensor]:
    return [torch.tensor(loss) for loss in losses]


def test_mean_losses_are_per_unit() -> None:
    guard = LossGuard("block-000", PLAIN, 10, 0)
    guard.add(step(1.0, 4.0))
    guard.add(step(3.0, 2.0))
    guard.check()
    assert guard.mean_losses() == [2.0, 3.0]
    assert guard.last_loss() == 2.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e6])
def test_bad_loss_is_an_error_that_names_epoch_step_and_unit(bad: float) -> None:
    guard = LossGuard("block-002", PLAIN, 10, 4)
    guard.add(step(1.0, 1.0))
    guard.add(step(1.0, bad))
    with pytest.raises(Diverged, match=r"block-002.*unit 1 in epoch 5, step 1"):
        guard.check()


def test_losses_are_fetched_every_few_steps_without_being_asked() -> None:
    guard = LossGuard("block-000", PLAIN[:1], 10, 0)
    for _ in range(CHECK_EVERY - 1):
        guard.add(step(float("nan")))
    with pytest.raises(Diverged, match="step 0"):
        guard.add(step(1.0))


def test_loss_at_chance_for_many_classes_is_fine() -> None:
    guard = LossGuard("block-000", PLAIN[:1], 1000, 0)
    guard.add(step(6.9))
    guard.check()
    assert guard.mean_losses() == pytest.approx([6.9])


def test_limit_of_a_loss_with_a_bounded_part_is_its_own() -> None:
    end = UnitEnd(out_shape=(6, 5, 5), target=TargetSpec(size=10))
    objectives = [build_objective(name, end, 0) for name in ("predsim", "cross_entropy")]
    guard = LossGuard("block-000", objectives, 10, 0)
    guard.add(step(16.0, 200.0))
    guard.check()
    guard.add(step(30.0, 200.0))
    with pytest.raises(Diverged, match=r"loss 30 of unit 0 .*limit 25"):
        guard.check()


@pytest.mark.parametrize(("loss", "limit"), [("mse", 1e4), ("mae", 100.0), ("huber", 100.0)])
def test_values_may_be_off_by_a_hundred_standard_deviations_and_no_further(loss: str, limit: float) -> None:
    end = UnitEnd(out_shape=(6,), target=TargetSpec(kind="values", size=3))
    objective = build_objective(loss, end, 0)
    residuals_NK, labels = torch.full((4, 3), 99.0), Labels(y_N=torch.zeros(4, 3))
    guard = LossGuard("block-000", [objective], 3, 0)
    guard.add([objective.loss(residuals_NK, residuals_NK, labels)])
    guard.check()
    guard.add(step(1.01 * limit))
    with pytest.raises(Diverged, match=f"limit {limit:.0f}"):
        guard.check()


@pytest.mark.parametrize("loss", OBJECTIVES)
def test_training_that_explodes_is_found_whatever_it_is_for(loss: str) -> None:
    shape, train = (1, 8, 8), TrainConfig(loss=loss, unit_layers=2)
    target = TargetSpec(kind=OBJECTIVES[loss].kind, size=10)
    generator = torch.Generator().manual_seed(0)
    x_NCHW, y_N = torch.randn(32, *shape, generator=generator), torch.randint(0, 10, (32,), generator=generator)
    if target.kind == "values":
        y_N = torch.randn(32, 10, generator=generator)
    guards = []
    for lr in (0.05, 50.0):
        cut_model = cut(
            build_model("convnet", inputs=InputSpec(shape=shape), num_outputs=10, seed=0), InputSpec(shape=shape)
        )
        (unit,) = build_units(cut_model, "adaptive", even_spans(6, 2), target, 0, range(1), train=train)
        optimizer = make_optimizer(unit.train(), train, lr)
        guard = LossGuard("block-000", [unit.objective], 10, 0)
        for _ in range(12):
            guard.add(train_step([unit], [optimizer], x_NCHW, y_N, "fp32", sample_N=x_NCHW))
        guards.append(guard)
    guards[0].check()
    with pytest.raises(Diverged, match=r"loss [0-9.e+]+ of unit 0"):
        guards[1].check()
