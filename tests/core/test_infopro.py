"""Units that also make the sample again: what they train for, what they keep of it, and what they take."""

import copy
import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.nn import functional

from nf_pipeline.config import TrainConfig
from nf_pipeline.core.layers import CutModel, cut
from nf_pipeline.core.layout import laid_out
from nf_pipeline.core.local_unit import LocalUnit, build_units, even_spans
from nf_pipeline.core.memory import LiveBytes
from nf_pipeline.core.mixup import Mix, draw_mix
from nf_pipeline.core.models import build_model
from nf_pipeline.core.objectives import (
    OBJECTIVES,
    STRONGEST,
    CrossEntropy,
    InfoPro,
    Labels,
    UnitEnd,
    build_objective,
    check_objective,
    looks_at_sample,
)
from nf_pipeline.core.profiler import StepProbe
from nf_pipeline.core.stand_ins import numbers
from nf_pipeline.core.train_step import make_optimizer, train_step
from nf_pipeline.errors import ConfigError
from nf_pipeline.samples import InputSpec, TargetSpec

pytestmark = pytest.mark.usefixtures("one_thread")

DIGITS = Path("nf_pipeline/data/digits.parquet")
INPUTS, TARGET = InputSpec(shape=(1, 8, 8)), TargetSpec(size=10)
LARGE, CPU = InputSpec(shape=(3, 16, 16)), torch.device("cpu")
TRAIN = TrainConfig(loss="infopro")


def infopro(depth: float = 0.0, smoothing: float = 0.0) -> InfoPro:
    end = UnitEnd(out_shape=(6, 5, 5), target=TARGET, label_smoothing=smoothing, inputs=INPUTS, depth=depth)
    return build_objective("infopro", end, 0)


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns outputs of layers, logits, labels and samples."""
    generator = torch.Generator().manual_seed(3)
    out_NCHW, sample_N = (torch.randn(9, *shape, generator=generator) for shape in ((6, 5, 5), INPUTS.shape))
    logits_NK = torch.randn(9, 10, generator=generator)
    return out_NCHW, logits_NK, torch.randint(0, 10, (9,), generator=generator), sample_N


def convnet() -> CutModel:
    return cut(build_model("convnet", inputs=INPUTS, num_outputs=10, seed=0), INPUTS)


def units_for(train: TrainConfig, unit_layers: int = 1, units: range | None = None) -> list[LocalUnit]:
    return build_units(convnet(), "adaptive", even_spans(6, unit_layers), TARGET, 0, units, train=train)


def test_only_this_loss_looks_at_samples() -> None:
    assert [name for name in ("auto", *OBJECTIVES) if looks_at_sample(name)] == ["infopro"]


@pytest.mark.parametrize("depth", [0.0, 0.25])
def test_loss_is_cross_entropy_and_the_weighted_error_of_the_guess(depth: float) -> None:
    objective, (out_NCHW, logits_NK, y_N, sample_N) = infopro(depth, smoothing=0.1), batch()
    errors = [(guess - wanted) ** 2 for guess, wanted in zip(objective.on_output(out_NCHW), sample_N, strict=True)]
    cross_entropy = functional.cross_entropy(logits_NK, y_N, label_smoothing=0.1)
    expected = cross_entropy + STRONGEST * (1 - depth) * sum(error.mean() for error in errors) / 9
    torch.testing.assert_close(objective.loss(out_NCHW, logits_NK, Labels(y_N=y_N), sample_N), expected)


def test_weight_falls_to_nothing_at_the_last_unit_with_an_auxiliary_head() -> None:
    *inner, last = units_for(TRAIN)
    assert [unit.objective.weight for unit in inner] == pytest.approx(
        [STRONGEST * part / 4 for part in (4, 3, 2, 1, 0)]
    )
    assert [unit.objective.on_output is None for unit in inner] == [False, False, False, False, True]
    assert type(last.objective) is CrossEntropy
    first, end = units_for(TRAIN, unit_layers=3)
    assert first.objective.weight == STRONGEST and type(end.objective) is CrossEntropy


def test_last_depth_trains_by_cross_entropy_bit_for_bit_and_needs_no_samples() -> None:
    out_NCHW, logits_NK, y_N, _ = batch()
    loss = infopro(depth=1.0).loss(out_NCHW, logits_NK, Labels(y_N=y_N))
    assert torch.equal(loss, functional.cross_entropy(logits_NK, y_N))


def test_error_sends_gradients_to_the_layers_and_none_to_the_head_or_the_samples() -> None:
    x_NCHW, y_N = torch.randn(6, *INPUTS.shape, requires_grad=True), torch.tensor([0, 1, 2, 0, 1, 2])
    (unit,) = units_for(TRAIN, units=range(1))
    out_NCHW, _ = unit(x_NCHW.detach())
    logits_NK = torch.zeros(6, 10)  # say nothing of layers and head
    unit.objective.loss(out_NCHW, logits_NK, Labels(y_N=y_N), x_NCHW.detach()).backward()
    assert all(weight.grad.abs().sum() > 0 for weight in unit.layers.parameters() if weight.dim() > 1)
    assert all(weight.grad is None for weight in unit.head.parameters())


@pytest.mark.parametrize(
    ("target", "inputs", "part", "fix"),
    [
        (TARGET, InputSpec(shape=(12,), dtype="int32", num_tokens=50), "tokens are no quantities", "predsim"),
        (TargetSpec(kind="values", size=2), INPUTS, "infopro, which is for classes; the targets are values", "mse"),
    ],
)
def test_tokens_and_values_are_refused(target: TargetSpec, inputs: InputSpec, part: str, fix: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_objective(TRAIN, target, inputs)
    assert part in caught.value.what and fix in caught.value.fix and "infopro" not in caught.value.fix
    check_objective(TRAIN, TARGET, INPUTS)


def test_samples_that_are_missing_are_an_error_and_not_a_loss_without_them() -> None:
    out_NCHW, logits_NK, y_N, _ = batch()
    with pytest.raises(ValueError, match="sample_N"):
        infopro().loss(out_NCHW, logits_NK, Labels(y_N=y_N))
    with pytest.raises(ValueError, match="inputs"):
        build_objective("infopro", UnitEnd(out_shape=(6, 5, 5), target=TARGET), 0)


def test_limit_lets_a_sample_far_out_pass_and_neither_part_explode() -> None:
    objective, (out_NCHW, logits_NK, y_N, sample_N) = infopro(), batch()
    limit, labels = objective.limit(10, 100.0), Labels(y_N=y_N)
    sample_N[0] *= 200.0
    assert objective.loss(out_NCHW, logits_NK, labels, sample_N) < limit
    assert objective.loss(out_NCHW, 1e5 * logits_NK, labels, sample_N) > limit
    with torch.no_grad():
        for weight in objective.on_output.guess.parameters():
            weight.mul_(1e4)
    assert objective.loss(out_NCHW, logits_NK, labels, sample_N) > limit


def test_mixed_batch_is_to_be_made_again_as_it_was_mixed() -> None:
    generator = torch.Generator().manual_seed(0)
    x_NCHW, y_N = torch.randn(6, *INPUTS.shape, generator=generator), torch.arange(6)
    mix = Mix(order_N=torch.tensor([1, 2, 3, 4, 5, 0]), share=0.3)
    (unit,), (other,) = (units_for(TRAIN, units=range(1)) for _ in range(2))
    optimizer = make_optimizer(unit, TRAIN, 0.0)
    (loss,) = train_step([unit], [optimizer], x_NCHW, y_N, "fp32", mix=mix, sample_N=x_NCHW)
    mixed_NCHW = 0.3 * x_NCHW + 0.7 * x_NCHW[mix.order_N]
    expected = other.objective.loss(*other(mixed_NCHW), mix.labels(y_N), mixed_NCHW)
    torch.testing.assert_close(loss, expected.detach())


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Returns standardised pictures and their classes."""
    rows = pq.read_table(DIGITS).slice(0, 1200).to_pylist()
    pictures = np.stack([np.asarray(Image.open(io.BytesIO(row["image"]["bytes"]))) for row in rows])
    x_NCHW = torch.from_numpy(pictures).float()[:, None]
    return (x_NCHW - x_NCHW.mean()) / x_NCHW.std(), torch.tensor([row["label"] for row in rows])


def linear_error(out_NCHW: torch.Tensor, sample_N: torch.Tensor, num_fitted: int) -> float:
    """Fits a linear map from what layers return to the samples, by ridge regression; its error on the others."""
    x_NF = torch.cat([out_NCHW.flatten(1), torch.ones(len(out_NCHW), 1)], 1).double()
    y_NF = sample_N.flatten(1).double()
    known_NF, wanted_NF = x_NF[:num_fitted], y_NF[:num_fitted]
    covariance_FF = known_NF.T @ known_NF + torch.eye(x_NF.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(covariance_FF, known_NF.T @ wanted_NF)
    return (x_NF[num_fitted:] @ weights - y_NF[num_fitted:]).square().mean().item()


def test_unit_keeps_more_of_the_sample_than_with_cross_entropy_alone(
    digits: tuple[torch.Tensor, torch.Tensor],
) -> None:
    (x_NCHW, y_N), errors = digits, {}
    for loss in ("cross_entropy", "infopro"):
        train = TrainConfig(loss=loss)
        (unit,) = units_for(train, unit_layers=3, units=range(1))
        optimizer = make_optimizer(unit.train(), train, 0.05)
        for epoch in range(4):
            for rows in torch.randperm(800, generator=torch.Generator().manual_seed(epoch)).split(50):
                train_step([unit], [optimizer], x_NCHW[rows], y_N[rows], "fp32", sample_N=x_NCHW[rows])
        with torch.no_grad():
            out_NCHW, logits_NK = unit.eval()(x_NCHW)
        errors[loss] = linear_error(out_NCHW, x_NCHW, 800)
        assert (logits_NK[800:].argmax(1) == y_N[800:]).float().mean() > 0.95
    assert errors["infopro"] < 0.9 * errors["cross_entropy"]


def measured_peak(units: list[LocalUnit], shape: tuple[int, ...], num: int, train: TrainConfig) -> int:
    """Trains for real, two steps; the network's own samples are the batch where that is what enters."""
    units = [copy.deepcopy(unit).train() for unit in units]
    optimizers = [make_optimizer(unit, train, 0.01) for unit in units]
    meter = LiveBytes(CPU)
    meter.track(*units)
    with meter:
        for _ in range(2):
            x_NCHW, y_N = laid_out(torch.randn(num, *shape)), torch.zeros(num, dtype=torch.int64)
            sample_N = x_NCHW if shape == LARGE.shape else laid_out(torch.randn(num, *LARGE.shape))
            held = [x_NCHW]
            del x_NCHW
            mix = draw_mix(train.mixup, num, CPU)
            train_step(units, optimizers, held.pop(), y_N, train.precision, mix=mix, sample_N=sample_N)
            del y_N, mix, sample_N
    return meter.peak_bytes


@pytest.mark.parametrize("settings", [{}, {"precision": "bf16", "mixup": 0.2, "context": "sample"}])
def test_predicted_peak_is_that_of_a_real_step_with_the_samples_held(settings: dict[str, object]) -> None:
    train = TrainConfig(loss="infopro", **settings)
    model = cut(build_model("convnet", inputs=LARGE, num_outputs=10, seed=0), LARGE)
    units = build_units(model, "adaptive", even_spans(6, 1), TARGET, 0, train=train)
    ends = [LARGE, *map(numbers, model.out_shapes)]
    for start, stop in ((0, 1), (2, 3), (1, 4), (0, 6)):
        block = units[start:stop]
        probe = StepProbe(block, ends[start], train=train, device=CPU, target=TARGET, sample=LARGE)
        measured = measured_peak(block, ends[start].shape, 16, train)
        assert probe.peak_bytes(16) == pytest.approx(measured, rel=0.001), (start, stop)
