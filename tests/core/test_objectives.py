"""What units are trained for: the formulas written out, and whose weights they touch."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from nf_pipeline.config import TrainConfig
from nf_pipeline.core.layers import CutModel, cut
from nf_pipeline.core.local_unit import LocalUnit, build_units, even_spans
from nf_pipeline.core.models import build_model
from nf_pipeline.core.objectives import (
    GAIN,
    OBJECTIVES,
    CrossEntropy,
    Labels,
    PredSim,
    UnitEnd,
    build_objective,
    check_objective,
    looks_at_output,
)
from nf_pipeline.core.similarity import similarities
from nf_pipeline.core.train_step import make_optimizer, train_step
from nf_pipeline.errors import ConfigError
from nf_pipeline.samples import InputSpec, TargetSpec

SHAPE = (1, 8, 8)
CLASSES, VALUES = TargetSpec(size=4), TargetSpec(kind="values", size=2)
OF_CLASSES, OF_VALUES = (
    [name for name, objective in OBJECTIVES.items() if objective.kind == kind] for kind in ("class", "values")
)


def end_of(
    out_shape: tuple[int, ...] = (6, 5, 5), smoothing: float = 0.0, target: TargetSpec = CLASSES, depth: float = 0.0
) -> UnitEnd:
    return UnitEnd(
        out_shape=out_shape, target=target, label_smoothing=smoothing, inputs=InputSpec(shape=SHAPE), depth=depth
    )


def predsim(out_shape: tuple[int, ...] = (6, 5, 5), seed: int = 0) -> PredSim:
    return build_objective("predsim", end_of(out_shape), seed)


def batch(out_shape: tuple[int, ...] = (6, 5, 5), num: int = 9) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    out = torch.randn(num, *out_shape, generator=generator)
    return out, torch.randn(num, 4, generator=generator), torch.randint(0, 4, (num,), generator=generator)


def convnet() -> CutModel:
    return cut(build_model("convnet", inputs=InputSpec(shape=SHAPE), num_outputs=10, seed=0), InputSpec(shape=SHAPE))


def units_for(train: TrainConfig, unit_layers: int = 2, units: range | None = None) -> list[LocalUnit]:
    return build_units(convnet(), "adaptive", even_spans(6, unit_layers), TargetSpec(size=10), 0, units, train=train)


def test_cross_entropy_is_torchs_bit_for_bit() -> None:
    out_NCHW, logits_NK, y_N = batch()
    loss = build_objective("cross_entropy", end_of(), 0).loss(out_NCHW, logits_NK, Labels(y_N=y_N))
    assert torch.equal(loss, functional.cross_entropy(logits_NK, y_N))


@pytest.mark.parametrize("name", OF_CLASSES)
def test_smoothed_labels_change_the_cross_entropy_as_torch_defines_it(name: str) -> None:
    out_NCHW, logits_NK, y_N = batch()
    plain, smoothed = (build_objective(name, end_of(smoothing=part), 0) for part in (0.0, 0.2))
    share = GAIN * 0.01 if name == "predsim" else 1.0
    wanted, before = (functional.cross_entropy(logits_NK, y_N, label_smoothing=part) for part in (0.2, 0.0))
    sample_N = torch.zeros(len(y_N), *SHAPE)
    losses = [one.loss(out_NCHW, logits_NK, Labels(y_N=y_N), sample_N) for one in (smoothed, plain)]
    changed = losses[0] - losses[1]
    torch.testing.assert_close(changed, share * (wanted - before))


def test_similarity_matching_loss_is_the_formula_written_out() -> None:
    objective, (out_NCHW, logits_NK, y_N) = predsim(), batch()
    features = functional.conv2d(out_NCHW, objective.on_output.conv.weight, padding=1)
    spreads = [[channel.std().item() for channel in sample] for sample in features]
    one_hot = [[float(label == idx) for idx in range(4)] for label in y_N.tolist()]
    errors_NN = (similarities(torch.tensor(spreads)) - similarities(torch.tensor(one_hot))) ** 2
    expected = GAIN * (0.99 * errors_NN.mean().item() + 0.01 * functional.cross_entropy(logits_NK, y_N).item())
    assert objective.loss(out_NCHW, logits_NK, Labels(y_N=y_N)).item() == pytest.approx(expected, rel=1e-5)


def test_similarities_of_maps_under_bf16_are_off_by_the_convolutions_rounding_alone() -> None:
    objective, (out_NCHW, _, _) = predsim(), batch()
    exact_NCHW, low_NCHW = (out_NCHW.clone().requires_grad_() for _ in range(2))
    weights_NN = torch.randn(9, 9, generator=torch.Generator().manual_seed(1))
    (objective.on_output(exact_NCHW) * weights_NN).sum().backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low_NN = objective.on_output(low_NCHW)
    (low_NN * weights_NN).sum().backward()
    assert low_NN.dtype == torch.float32
    torch.testing.assert_close(low_NN.diagonal(), torch.ones(9))
    assert (low_NCHW.grad - exact_NCHW.grad).norm() < 0.02 * exact_NCHW.grad.norm()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_whether_a_loss_looks_at_the_output_is_known_without_building_it(name: str) -> None:
    before = torch.get_rng_state()
    answer = looks_at_output(name)
    assert torch.equal(torch.get_rng_state(), before)
    assert answer == (build_objective(name, end_of(), 0).on_output is not None)


@pytest.mark.parametrize(
    ("name", "expected"), [("mse", (0.25 + 4) / 2), ("mae", (0.5 + 2) / 2), ("huber", (0.125 + 1.5) / 2)]
)
def test_losses_of_values_are_means_of_their_residuals(name: str, expected: float) -> None:
    objective, y_NK = build_objective(name, end_of(target=VALUES), 0), torch.tensor([[1.0, -1.0]])
    outputs_NK = torch.tensor([[1.5, 1.0]])
    assert objective.loss(outputs_NK, outputs_NK, Labels(y_N=y_NK)).item() == pytest.approx(expected)
    low_NK = outputs_NK.bfloat16()
    assert objective.loss(low_NK, low_NK, Labels(y_N=y_NK)).dtype == torch.float32


def test_mixed_values_have_the_gradients_of_their_mixture() -> None:
    generator, share = torch.Generator().manual_seed(0), 0.3
    outputs_NK = torch.randn(5, 2, generator=generator).requires_grad_()
    one_NK, other_NK = (torch.randn(5, 2, generator=generator) for _ in range(2))
    mse = build_objective("mse", end_of(target=VALUES), 0)
    mse.loss(outputs_NK, outputs_NK, Labels(y_N=one_NK, other_N=other_NK, share=share)).backward()
    expected_NK = 2 * (outputs_NK.detach() - share * one_NK - (1 - share) * other_NK) / 10
    torch.testing.assert_close(outputs_NK.grad, expected_NK)


@pytest.mark.parametrize(("target", "kind"), [(CLASSES, "CrossEntropy"), (VALUES, "SquaredError")])
def test_loss_that_is_left_open_follows_the_target(target: TargetSpec, kind: str) -> None:
    assert type(build_objective("auto", end_of(target=target), 0)).__name__ == kind
    assert not looks_at_output("auto")


@pytest.mark.parametrize("name", OF_VALUES)
def test_last_unit_trains_for_the_loss_of_values_like_the_others(name: str) -> None:
    units = build_units(convnet(), "adaptive", even_spans(6, 2), VALUES, 0, train=TrainConfig(loss=name))
    assert {type(unit.objective) for unit in units} == {OBJECTIVES[name]}


@pytest.mark.parametrize(
    ("settings", "target", "part"),
    [
        ({"loss": "predsim"}, VALUES, "predsim, which is for classes; the targets are values"),
        ({"loss": "cross_entropy"}, VALUES, "cross_entropy, which is for classes"),
        ({"loss": "mse"}, CLASSES, "mse, which is for values; the targets are classes"),
        ({"label_smoothing": 0.1}, VALUES, "train.label_smoothing: got 0.1"),
        ({"loss": "mea"}, VALUES, "'mea', unknown loss"),
    ],
)
def test_loss_for_another_kind_of_target_is_refused(settings: dict, target: TargetSpec, part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_objective(TrainConfig(**settings), target, InputSpec(shape=SHAPE))
    assert part in caught.value.what and caught.value.fix
    other = VALUES if target is CLASSES else CLASSES
    if "unknown" not in part:
        check_objective(TrainConfig(**settings), other, InputSpec(shape=SHAPE))


def test_training_on_values_learns_them() -> None:
    generator = torch.Generator().manual_seed(0)
    x_NCHW = torch.randn(64, *SHAPE, generator=generator)
    means_N4 = functional.avg_pool2d(x_NCHW, 4).flatten(1)
    y_NK = torch.stack([means_N4[:, 0] - means_N4[:, 1], means_N4[:, 2] + means_N4[:, 3]], 1)
    y_NK = (y_NK - y_NK.mean(0)) / y_NK.std(0)
    units = build_units(convnet(), "adaptive", even_spans(6, 3), VALUES, 0, train=TrainConfig())[:1]
    optimizers = [make_optimizer(unit.train(), TrainConfig(), 0.02) for unit in units]
    losses = [float(train_step(units, optimizers, x_NCHW, y_NK, "fp32")[0]) for _ in range(60)]
    assert losses[0] > 0.8 and losses[-1] < 0.15


def test_dead_channels_and_samples_that_are_all_alike_give_finite_gradients() -> None:
    objective, (out_NCHW, logits_NK, y_N) = predsim(), batch()
    dead_NCHW = torch.zeros_like(out_NCHW).requires_grad_()
    objective.loss(dead_NCHW, logits_NK, Labels(y_N=y_N)).backward()
    assert torch.isfinite(dead_NCHW.grad).all()
    assert torch.isfinite(objective.on_output.conv.weight.grad).all()


def test_mixed_labels_give_the_convex_combination() -> None:
    (_, logits_NK, y_N), share = batch(), 0.3
    labels = Labels(y_N=y_N, other_N=y_N.flip(0), share=share)
    losses = [functional.cross_entropy(logits_NK, each_N) for each_N in (y_N, y_N.flip(0))]
    expected = share * losses[0] + (1 - share) * losses[1]
    torch.testing.assert_close(CrossEntropy().loss(logits_NK, logits_NK, labels), expected)
    one_hot_NK = labels.one_hot_NK(4)
    torch.testing.assert_close(one_hot_NK.sum(1), torch.ones(9))
    assert one_hot_NK[0, y_N[0]].item() == pytest.approx(share + (1 - share) * float(y_N[0] == y_N[8]))


def test_weights_of_a_loss_depend_on_its_seed_only_and_not_on_the_units_built_beside_it() -> None:
    before = torch.get_rng_state()
    weights = [predsim(seed=seed).on_output.conv.weight for seed in (5, 5, 6)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    train = TrainConfig(loss="predsim")
    together, alone = units_for(train), units_for(train, units=range(1, 2))
    assert torch.equal(together[1].objective.on_output.conv.weight, alone[0].objective.on_output.conv.weight)


def test_only_training_has_the_weights_of_a_loss_and_the_last_unit_none() -> None:
    *inner, last = units_for(TrainConfig(loss="predsim", label_smoothing=0.1))
    for unit in inner:
        extra = set(unit.state_dict()) - set(unit.trained().state_dict())
        assert extra == {"objective.on_output.conv.weight"}
        assert all(
            value is unit.state_dict(keep_vars=True)[name] for name, value in unit.trained().named_parameters()
        )
    assert type(last.objective) is CrossEntropy
    assert last.objective.label_smoothing == 0.1
    plain = build_units(convnet(), "adaptive", even_spans(6, 2), TargetSpec(size=10), 0)
    assert [list(unit.state_dict()) for unit in plain] == [
        list(unit.trained().state_dict()) for unit in (*inner, last)
    ]


def test_head_learns_from_its_cross_entropy_at_full_rate_and_the_layers_from_both_parts() -> None:
    x_NCHW, y_N = torch.randn(6, *SHAPE), torch.tensor([0, 1, 2, 0, 1, 2])
    (plain,), (matching,) = (
        units_for(TrainConfig(loss=name), units=range(1)) for name in ("cross_entropy", "predsim")
    )
    plain.eval(), matching.eval()  # dropout and batch norms would tell the passes apart
    for unit in (plain, matching):
        out_NCHW, logits_NK = unit(x_NCHW)
        unit.objective.loss(out_NCHW, logits_NK, Labels(y_N=y_N)).backward()
        unit.objective.restore_head(unit.head)
    for one, other in zip(plain.head.parameters(), matching.head.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-7)
    weights = zip(plain.layers.parameters(), matching.layers.parameters(), strict=True)
    assert not any(torch.allclose(one.grad, other.grad, rtol=0.1) for one, other in weights)


def test_training_brings_samples_of_a_class_together_and_trains_the_losss_own_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    y_N = torch.randint(0, 3, (48,), generator=generator)
    pattern_K = torch.randn(3, *SHAPE, generator=generator)
    x_NCHW = pattern_K[y_N] + 0.3 * torch.randn(48, *SHAPE, generator=generator)
    train = TrainConfig(loss="predsim")
    (unit,) = units_for(train, units=range(1))
    before = unit.objective.on_output.conv.weight.detach().clone()
    optimizer = make_optimizer(unit.train(), train, 0.05)
    losses = [float(train_step([unit], [optimizer], x_NCHW, y_N, "fp32")[0]) for _ in range(40)]
    assert losses[-1] < 0.5 * losses[0]
    assert not torch.equal(unit.objective.on_output.conv.weight, before)
    assert (unit.eval()(x_NCHW)[1].argmax(1) == y_N).float().mean() > 0.9


def test_unknown_loss_lists_near_names() -> None:
    with pytest.raises(ConfigError, match=r"train\.loss: got 'predsin', unknown loss") as error:
        build_objective("predsin", end_of(), 0)
    assert "predsim" in error.value.fix


def test_unit_that_is_given_no_loss_has_plain_cross_entropy() -> None:
    unit = LocalUnit([nn.Conv2d(1, 2, 1)], nn.Flatten())
    assert (type(unit.objective), unit.objective.label_smoothing, unit.objective.on_output) == (
        CrossEntropy,
        0.0,
        None,
    )
