"""Samples leave where they are sure, and what has left is computed no further."""

import pytest
import torch
from torch import nn

from nf_pipeline.core.early_exit_model import EarlyExitModel, EarlyExitPlan, all_logits, build_early_heads
from nf_pipeline.core.early_exits import OperatingPoint
from nf_pipeline.core.exit_model import ExitModel, ExitSpec, build_exit_model
from nf_pipeline.core.local_unit import LocalUnit
from nf_pipeline.errors import ConfigError
from nf_pipeline.samples import InputSpec, TargetSpec

INPUTS = InputSpec(shape=(1, 2, 2), mean=(0.0,), std=(1.0,))
CLASSES = 3


class Counted(nn.Module):
    """Hands its input on and remembers how many samples it had."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        self.seen.append(len(x_NCHW))
        return x_NCHW


class SureFrom(nn.Module):
    """Predicts class `label`, and is surer the brighter the image."""

    def __init__(self, label: int, scale: float) -> None:
        super().__init__()
        self.label, self.scale = label, scale

    def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        logits_NK = torch.zeros(len(x_NCHW), CLASSES)
        logits_NK[:, self.label] = self.scale * x_NCHW.flatten(1).mean(dim=1)
        return logits_NK


def point(exits: tuple[int, ...], threshold: float, accuracy: float = 0.9, flops: float = 5.0) -> OperatingPoint:
    return OperatingPoint(exits=exits, threshold=threshold, val_accuracy=accuracy, val_flops=flops)


def make(*points: OperatingPoint, temperatures: tuple[float, ...] = (1.0, 1.0, 1.0)) -> EarlyExitModel:
    """Three layers that only count; the exits after the first and the second say 0 and 1, the last one 2."""
    final = ExitModel(
        [LocalUnit([Counted(), Counted(), Counted()], SureFrom(2, 1.0))], INPUTS, TargetSpec(size=CLASSES)
    ).eval()
    heads = [SureFrom(0, 0.1), SureFrom(1, 0.2)]
    return EarlyExitModel(
        final, heads, (1, 2), EarlyExitPlan(temperatures=temperatures, points=points, val_accuracy=0.0)
    )


def images(*values: float) -> torch.Tensor:
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)


def seen(model: EarlyExitModel) -> list[list[int]]:
    return [layer.seen for layer in model.final.layers]


def test_batch_shrinks_and_results_come_in_the_order_of_the_images() -> None:
    model = make(point((0, 1), 0.8))
    # 0.8 of three classes is a logit of 2.08: from 20.8 at the first exit, from 10.4 at the second.
    logits_NK, exit_N = model(images(5.0, 30.0, 15.0, 6.0, 25.0))
    assert exit_N.tolist() == [2, 0, 1, 2, 0]
    assert logits_NK.argmax(dim=1).tolist() == [2, 0, 1, 2, 0]
    assert logits_NK.max(dim=1).values.tolist() == pytest.approx([5.0, 3.0, 3.0, 6.0, 2.5])
    assert seen(model) == [[5], [3], [2]]


def test_nothing_is_computed_once_all_have_left() -> None:
    model = make(point((0, 1), 0.8))
    assert model(images(30.0, 40.0)).exit_N.tolist() == [0, 0]
    assert seen(model) == [[2], [], []]


def test_exits_that_are_not_in_the_point_are_passed_by() -> None:
    model = make(point((1,), 0.0))
    model.heads[0].forward = None  # calling it would fail
    assert model(images(90.0, 1.0)).exit_N.tolist() == [1, 1]
    everyone = make(point((), 1.0))
    assert everyone(images(90.0)).exit_N.tolist() == [2]


def test_temperature_of_an_exit_divides_its_logits_and_decides_who_leaves() -> None:
    model = make(point((0,), 0.8), temperatures=(2.0, 1.0, 4.0))
    logits_NK, exit_N = model(images(30.0, 50.0))
    assert exit_N.tolist() == [2, 0]
    assert logits_NK.max(dim=1).values.tolist() == pytest.approx([7.5, 2.5])


def test_wanted_accuracy_and_cost_take_their_points_and_share_the_layers() -> None:
    points = (point((0,), 0.5, 0.7, 2.0), point((1,), 0.5, 0.8, 4.0), point((), 1.0, 0.9, 8.0))
    model = make(*points)
    assert model.with_accuracy(0.75).point == points[1]
    assert model.with_flops(7.9).point == points[1]
    assert model.with_flops(2.0).point == points[0]
    assert model.with_accuracy(0.7).final is model.final
    with pytest.raises(ConfigError, match=r"accuracy: got 0\.95, the most accurate operating point has 0\.9000"):
        model.with_accuracy(0.95)
    with pytest.raises(ConfigError, match="flops: got 1, the cheapest operating point takes 2 per sample"):
        model.with_flops(1.0)


def test_point_taken_without_a_wish_is_the_cheapest_as_accurate_as_the_last_exit() -> None:
    points = (point((0,), 0.5, 0.7, 2.0), point((1,), 0.5, 0.8, 4.0), point((), 1.0, 0.9, 8.0))
    assert EarlyExitPlan(temperatures=(1.0,) * 3, points=points, val_accuracy=0.75).default == points[1]


@pytest.mark.parametrize(
    ("temperatures", "points"),
    [
        ((1.0, 1.0), ()),
        ((1.0, 0.0), (point((), 1.0),)),
        ((1.0, float("nan")), (point((), 1.0),)),
        ((1.0, 1.0), (point((1,), 1.0),)),
        ((1.0, 1.0, 1.0), (point((1, 0), 1.0),)),
        ((1.0, 1.0), (point((-1,), 1.0),)),
    ],
)
def test_plan_that_no_model_can_follow_is_refused(temperatures, points) -> None:
    with pytest.raises(ValueError, match=r"temperatures|points"):
        EarlyExitPlan(temperatures=temperatures, points=points, val_accuracy=0.5).check()


@pytest.mark.parametrize("contexts", [(), (1, 3, 4)])
def test_last_logits_of_a_real_model_are_the_final_models_and_leaving_changes_no_others(contexts) -> None:
    inputs = InputSpec(shape=(3, 16, 16), mean=(127.5,) * 3, std=(127.5,) * 3)
    spec = ExitSpec(
        model="convnet", inputs=inputs, target=TargetSpec(size=7), head="adaptive", num_layers=5, contexts=contexts
    )
    final = build_exit_model(spec)
    for weight in final.contexts.parameters():
        torch.nn.init.normal_(weight)
    heads, stops = build_early_heads(spec, [(2, "linear"), (4, "adaptive")]), (2, 4)
    pixels_NCHW = torch.randint(0, 256, (9, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    every = all_logits(final, heads, stops, pixels_NCHW)
    torch.testing.assert_close(every[-1], final(pixels_NCHW).detach())
    threshold = float(every[0].softmax(dim=1).amax(dim=1).median())
    plan = EarlyExitPlan(temperatures=(1.0,) * 3, points=(point((0, 1), threshold),), val_accuracy=0.0)
    logits_NK, exit_N = EarlyExitModel(final, heads, stops, plan)(pixels_NCHW)
    assert 0 < int((exit_N == 0).sum()) < 9
    expected = torch.stack([every[exit_idx][row] for row, exit_idx in enumerate(exit_N.tolist())])
    torch.testing.assert_close(logits_NK, expected)
