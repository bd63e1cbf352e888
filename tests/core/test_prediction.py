"""Seconds of plans: measured where memory and time allow, added up as the worker spends them."""

import pytest
import torch
from torch import nn

from nf_pipeline.config import RunConfig, TrainConfig
from nf_pipeline.core import timing
from nf_pipeline.core.prediction import TimeModel
from nf_pipeline.core.stand_ins import numbers
from nf_pipeline.core.timing import Part, PartKey, Seconds, StepTimer
from nf_pipeline.plans import UnitSpan

CPU = torch.device("cpu")
KEY = PartKey("layer", 0)


class Table:
    """Layers take 1, 2, 3, ... seconds a step, heads 100, narrow ones 10, losses 5, contexts 7; forward a tenth, at
    any batch."""

    def seconds(self, key: PartKey, batch_size: int) -> Seconds:
        heads = {"": 100.0, "linear": 10.0}
        step = {"layer": key.layer + 1.0, "head": heads[key.head], "loss": 5.0, "context": 7.0}[key.kind]
        return Seconds(step=step, forward=step / 10)


def times(**train: object) -> TimeModel:
    cfg = RunConfig.model_validate({"memory": {"budget_bytes": 1}, "train": {"epochs": 2, **train}})
    return TimeModel(cfg, Table(), 4, {"train": 40, "val": 20})


def test_step_of_a_unit_is_its_layers_and_its_head() -> None:
    assert times().step_s(UnitSpan(1, 3), 10) == pytest.approx(2 + 3 + 100)


@pytest.mark.parametrize(("segment", "again"), [(1, 0.1 + 0.2 + 0.3), (2, 0.1 + 0.2), (3, 0.1 + 0.2 + 0.3), (4, 0.0)])
def test_checkpointing_adds_a_forward_pass_of_all_segments_but_the_last(segment: int, again: float) -> None:
    assert times().step_s(UnitSpan(0, 4, segment), 10) == pytest.approx(10 + 100 + again)


def test_block_trains_for_all_epochs_and_validates_after_each() -> None:
    step, validation = 2 + 100, 0.2 + 10
    assert times().train_s([UnitSpan(1, 2)], 10) == pytest.approx(2 * (4 * step + 2 * validation))
    assert times(workers_per_block=2).train_s([UnitSpan(1, 2)], 10) == pytest.approx(2 * (2 * step + validation))


def test_caching_needs_no_heads() -> None:
    assert times().forward_s_per_sample([UnitSpan(0, 2), UnitSpan(2, 3)], 10) == pytest.approx(0.06)


def test_narrow_head_has_a_time_of_its_own() -> None:
    wide, narrow = (times().step_s(UnitSpan(1, 2, head=head), 10) for head in ("", "linear"))
    assert (wide, narrow) == (102.0, 12.0)


def test_loss_takes_time_in_training_only_and_none_on_the_last_unit() -> None:
    matching = times(loss="predsim")
    assert matching.step_s(UnitSpan(1, 2), 10) == pytest.approx(2 + 100 + 5)
    assert matching.step_s(UnitSpan(2, 4), 10) == pytest.approx(3 + 4 + 100)
    assert matching.forward_s(UnitSpan(1, 2), 10, with_head=True) == pytest.approx(0.2 + 10)


def test_context_takes_time_in_both_passes_of_every_unit_but_the_first() -> None:
    adding = times(context="sample")
    assert adding.step_s(UnitSpan(0, 2), 10) == pytest.approx(1 + 2 + 100)
    assert adding.step_s(UnitSpan(2, 4), 10) == pytest.approx(7 + 3 + 4 + 100)
    assert adding.forward_s(UnitSpan(2, 4), 10, with_head=False) == pytest.approx(0.7 + 0.7)


def timer_of(largest_batch: int = 128, module: nn.Module | None = None) -> StepTimer:
    part = Part(module=module or nn.Conv2d(3, 8, 3), inputs=numbers((3, 16, 16)), largest_batch=largest_batch)
    return StepTimer(lambda _: part, 1, train=TrainConfig(), device=CPU)


def test_measured_seconds_are_positive_and_training_takes_longer_than_inference() -> None:
    seconds = timer_of(module=nn.Conv2d(3, 64, 3)).seconds(KEY, 32)
    assert 0 < seconds.forward < seconds.step < 10


def test_between_two_sizes_seconds_lie_on_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    timer = timer_of()
    monkeypatch.setattr(timer, "_time", lambda _, size: Seconds(step=(8 + size) / 1e3, forward=size / 1e3))
    assert timer.seconds(KEY, 20).step == pytest.approx(0.028)
    assert timer.seconds(KEY, 20).forward == pytest.approx(0.020)
    assert timer.seconds(KEY, 8).step == pytest.approx(0.016)
    assert timer.seconds(KEY, 256).step == pytest.approx(0.272)  # as fast per sample as at 128


def test_nothing_larger_than_memory_allows_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    timer, sizes = timer_of(largest_batch=8), []
    monkeypatch.setattr(timer, "_time", lambda _, size: sizes.append(size) or Seconds(step=1e-3, forward=0.0))
    timer.seconds(KEY, 128)
    assert sizes == [2, 8]


def test_nothing_that_would_take_long_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    timer, sizes = timer_of(), []
    monkeypatch.setattr(timer, "_time", lambda _, size: sizes.append(size) or Seconds(step=size / 20, forward=0.0))
    timer.seconds(KEY, 128)
    assert sizes == [2, 8]  # 32 samples would take 1.6 s


def test_weights_that_are_timed_stay_as_they_are() -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    timer_of(module=module).seconds(KEY, 8)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("module", [nn.ReLU(inplace=True), nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 4, 1))])
def test_layer_that_begins_in_place_or_has_no_weights_is_timed(module: nn.Module) -> None:
    assert timer_of(module=module).seconds(KEY, 2).step > 0


def test_grid_is_ascending() -> None:
    assert list(timing.GRID) == sorted(set(timing.GRID))
