"""Added-up bytes of units against those of whole steps."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from nf_pipeline.config import MemoryConfig, RunConfig
from nf_pipeline.core.drafts import PlanJob
from nf_pipeline.core.estimate import Inputs, UnitEstimator, look_at
from nf_pipeline.core.layers import CutModel, cut
from nf_pipeline.core.models import build_model
from nf_pipeline.core.planner import make_plan
from nf_pipeline.errors import ConfigError
from nf_pipeline.plans import Plan, UnitProfile, UnitSpan
from nf_pipeline.samples import InputSpec, TargetSpec

IMAGE_SHAPE = (3, 32, 32)
ROWS = {"train": 900, "val": 100}


def config_for(name: str, **train: object) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"name": name},
            "memory": {"budget_bytes": "64MiB"},
            "train": {"device": "cpu", **train},
        }
    )


def job_for(cut_model: CutModel, cfg: RunConfig) -> PlanJob:
    return PlanJob(
        cfg=cfg,
        memory=cfg.memory,
        budgets=(64 * 2**20,),
        cap_name="memory.max_batch_size",
        cut_model=cut_model,
        inputs=InputSpec(shape=IMAGE_SHAPE),
        target=TargetSpec(size=10),
        split_rows=ROWS,
        device=torch.device("cpu"),
    )


def job_of(name: str, **train: object) -> PlanJob:
    model = build_model(name, inputs=InputSpec(shape=IMAGE_SHAPE), num_outputs=10, seed=0)
    return job_for(cut(model, InputSpec(shape=IMAGE_SHAPE)), config_for(name, **train))


@pytest.mark.parametrize(
    ("name", "train"),
    [
        ("convnet", {}),
        ("convnet", {"precision": "bf16"}),
        ("convnet", {"loss": "predsim"}),
        ("convnet", {"loss": "predsim", "precision": "bf16", "mixup": 0.2, "head": "linear"}),
        ("convnet", {"loss": "infopro", "mixup": 0.2}),
        ("convnet", {"head": "auglocal", "label_smoothing": 0.1, "mixup": 0.2}),
        ("resnet18", {}),
        ("resnet18", {"precision": "bf16"}),
        ("resnet18", {"loss": "predsim", "head": "auglocal"}),
        ("mobilenet_v2", {}),
    ],
)
def test_estimates_are_near_whole_steps_and_seldom_below(name: str, train: dict[str, object]) -> None:
    job = job_of(name, **train)
    last = job.num_layers
    spans = [
        *(UnitSpan(start, start + 1) for start in range(0, last, 4)),
        UnitSpan(0, last),
        UnitSpan(0, last, 1),
        UnitSpan(1, last - 1, 2),
        UnitSpan(last // 2, last),
    ]
    ratios = [
        estimate.peak_bytes(batch_size) / whole.peak_bytes(batch_size)
        for estimate, whole in zip(job.estimate(spans), job.profile(spans), strict=True)
        for batch_size in (2, 32, 128)
    ]
    assert 0.8 < min(ratios) <= max(ratios) < 1.25
    assert sorted(ratios)[len(ratios) // 4] > 0.97


def test_estimate_of_a_unit_says_what_its_profile_says_of_weights_and_heads() -> None:
    job = job_of("convnet")
    spans = [UnitSpan(0, 2), UnitSpan(2, 3, head="linear"), UnitSpan(3, job.num_layers)]
    for estimate, whole in zip(job.estimate(spans), job.profile(spans), strict=True):
        assert (estimate.span, estimate.unit_idx) == (whole.span, whole.unit_idx)
        assert (estimate.head_params, estimate.head_flops) == (whole.head_params, whole.head_flops)
        assert estimate.resident_bytes == pytest.approx(whole.resident_bytes, abs=64)


def test_checkpoints_and_shorter_units_are_estimated_to_hold_less() -> None:
    job = job_of("resnet18")
    last = job.num_layers
    spans = [UnitSpan(0, last), UnitSpan(0, last, 2), UnitSpan(0, 3), UnitSpan(0, 2)]
    peaks = [unit.peak_bytes(64) for unit in job.estimate(spans)]
    assert peaks[1] < 0.8 * peaks[0]
    assert peaks[3] < peaks[2] < peaks[0]


def test_part_keeps_what_its_backward_pass_needs() -> None:
    inputs = Inputs(shape=(3, 16, 16), batch_sizes=(5,))
    (convolution,) = look_at(nn.Conv2d(3, 8, 3, padding=1), inputs, "fp32")
    out_bytes = 5 * 8 * 16 * 16 * 4
    assert (convolution.out, convolution.kept, convolution.forward) == (out_bytes, out_bytes, out_bytes)
    assert convolution.weights == (3 * 8 * 9 + 8) * 4
    (activation,) = look_at(nn.ReLU(inplace=True), Inputs(shape=(8, 16, 16), batch_sizes=(5,)), "fp32")
    assert (activation.kept, activation.weights, activation.out) == (0, 0, out_bytes)


class FailsOnFakes(nn.Module):
    """Branches on numbers."""

    def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        return x_NCHW if x_NCHW.sum() > 0 else -x_NCHW


def test_part_that_needs_values_is_refused() -> None:
    with pytest.raises(ConfigError, match="a training step on fake tensors fails"):
        look_at(FailsOnFakes(), Inputs(shape=(3, 8, 8), batch_sizes=(2,)), "fp32")


def test_where_nothing_can_be_estimated_whole_steps_make_the_same_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    def plan() -> Plan:
        cfg = config_for("convnet", local="layer", head="classic")
        return make_plan(cfg, inputs=InputSpec(shape=(3, 8, 8)), target=TargetSpec(size=10), split_rows=ROWS)

    def refuse(*_: object) -> None:
        raise ConfigError("model: fails on fakes", "change it")

    estimated = plan()
    monkeypatch.setattr(UnitEstimator, "profile", refuse)
    assert plan().units == estimated.units


@pytest.mark.parametrize("factor", [0.5, 0.85, 2.0])
def test_estimates_that_are_far_off_change_no_promise_of_the_plan(
    monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    honest = UnitEstimator.profile

    def wrong(self: UnitEstimator, span: UnitSpan) -> UnitProfile:
        unit = honest(self, span)
        scaled = [int(factor * part) for part in (unit.bytes_per_sample, unit.constant_bytes, unit.resident_bytes)]
        return replace(unit, bytes_per_sample=scaled[0], constant_bytes=scaled[1], resident_bytes=scaled[2])

    monkeypatch.setattr(UnitEstimator, "profile", wrong)
    cfg = config_for("convnet").model_copy(update={"memory": MemoryConfig(budget_bytes="3MiB")})
    plan = make_plan(cfg, inputs=InputSpec(shape=(3, 16, 16)), target=TargetSpec(size=10), split_rows=ROWS)
    assert max(block.predicted_peak_bytes for block in plan.blocks) <= 3 * 2**20
    (taken,) = [candidate for candidate in plan.candidates if candidate.verdict == "taken"]
    assert taken.batch_sizes == tuple(block.batch_size for block in plan.blocks)
    rivals = [one for one in plan.candidates if "is below" not in one.verdict]
    assert all(one.predicted_s >= taken.predicted_s / 1.06 for one in rivals)
