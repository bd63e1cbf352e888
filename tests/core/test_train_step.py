"""The training step against the same arithmetic written out, and what it keeps alive."""

import weakref
from typing import Any

import pytest
import torch
from torch import nn

from nf_pipeline.config import TrainConfig
from nf_pipeline.core.local_unit import LocalUnit
from nf_pipeline.core.memory import LiveBytes
from nf_pipeline.core.train_step import forward_block, make_optimizer, resolve_device, train_step
from nf_pipeline.errors import ConfigError

CPU = torch.device("cpu")
CFG = TrainConfig(momentum=0.9, weight_decay=0.01)


def make_unit(in_channels: int, out_channels: int, seed: int) -> LocalUnit:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layer = nn.Sequential(nn.Conv2d(in_channels, out_channels, 3, padding=1), nn.BatchNorm2d(out_channels))
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(out_channels, 4))
    return LocalUnit([layer], head)


def make_block() -> list[LocalUnit]:
    return [make_unit(3, 8, seed=1), make_unit(8, 6, seed=2)]


def make_batch(num: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x_NCHW = torch.randn(num, 3, 8, 8, generator=generator)
    return x_NCHW, torch.randint(0, 4, (num,), generator=generator)


def train_by_hand(unit: LocalUnit, momenta: list[Any], x_NCHW: torch.Tensor, y_N: torch.Tensor) -> Any:
    """SGD with momentum and weight decay, written out."""
    out_NCHW, logits_NK = unit(x_NCHW)
    loss = nn.functional.cross_entropy(logits_NK, y_N)
    parameters = list(unit.parameters())
    with torch.no_grad():
        for idx, gradient in enumerate(torch.autograd.grad(loss, parameters)):
            decayed = gradient + CFG.weight_decay * parameters[idx]
            momenta[idx] = decayed if momenta[idx] is None else CFG.momentum * momenta[idx] + decayed
            parameters[idx] -= 0.1 * momenta[idx]
    return out_NCHW.detach(), loss.detach()


def test_train_step_equals_the_arithmetic_written_out() -> None:
    x_NCHW, y_N = make_batch()
    units, expected_units = make_block(), make_block()
    optimizers = [make_optimizer(unit, CFG, 0.1) for unit in units]
    momenta = [[None] * len(list(unit.parameters())) for unit in expected_units]
    for _ in range(3):
        losses = train_step(units, optimizers, x_NCHW, y_N, "fp32")
        value = x_NCHW
        for unit_idx, unit in enumerate(expected_units):
            value, loss = train_by_hand(unit, momenta[unit_idx], value, y_N)
            torch.testing.assert_close(losses[unit_idx], loss)
    for unit, expected in zip(units, expected_units, strict=True):
        for name, parameter in unit.named_parameters():
            torch.testing.assert_close(parameter, expected.get_parameter(name), msg=name)


def test_reduce_sees_each_units_gradients_before_its_step_and_may_change_them() -> None:
    x_NCHW, y_N = make_batch()
    units, expected = make_block(), make_block()
    seen: list[LocalUnit] = []

    def double(unit: LocalUnit) -> None:
        seen.append(unit)
        assert all(parameter.grad is not None for parameter in unit.parameters())
        for other in units:
            assert other is unit or all(parameter.grad is None for parameter in other.parameters())
        for parameter in unit.parameters():
            parameter.grad.mul_(2.0)

    plain = CFG.model_copy(update={"momentum": 0.0, "weight_decay": 0.0})
    train_step(units, [make_optimizer(unit, plain, 0.1) for unit in units], x_NCHW, y_N, "fp32", double)
    train_step(expected, [make_optimizer(unit, plain, 0.2) for unit in expected], x_NCHW, y_N, "fp32")
    assert seen == units
    for unit, twice in zip(units, expected, strict=True):
        for name, parameter in unit.named_parameters():
            torch.testing.assert_close(parameter, twice.get_parameter(name), msg=name)


def test_gradients_stop_at_the_unit_input() -> None:
    x_NCHW, y_N = make_batch()
    units, alone = make_block(), make_block()[:1]
    train_step(units, [make_optimizer(unit, CFG, 0.1) for unit in units], x_NCHW, y_N, "fp32")
    train_step(alone, [make_optimizer(alone[0], CFG, 0.1)], x_NCHW, y_N, "fp32")
    for name, parameter in units[0].named_parameters():
        assert torch.equal(parameter, alone[0].get_parameter(name)), name


def test_losses_are_detached_scalars_and_gradients_are_gone_after_the_step() -> None:
    units = make_block()
    losses = train_step(units, [make_optimizer(unit, CFG, 0.1) for unit in units], *make_batch(), "fp32")
    assert [(loss.shape, loss.requires_grad) for loss in losses] == [(torch.Size([]), False)] * 2
    assert all(parameter.grad is None for unit in units for parameter in unit.parameters())


def test_only_weights_and_momentum_stay_after_the_step() -> None:
    units = make_block()
    optimizers = [make_optimizer(unit, CFG, 0.1) for unit in units]
    meter = LiveBytes(CPU)
    meter.track(*units)
    weights = sum(parameter.nbytes for unit in units for parameter in unit.parameters())
    before_bytes = meter.current_bytes
    with meter:
        train_step(units, optimizers, *make_batch(), "fp32")
    assert meter.current_bytes == before_bytes + weights
    assert meter.peak_bytes > meter.current_bytes


class BatchWatcher(nn.Module):
    """Passes its input on and notes whether the block's batch is still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.batch: weakref.ref[torch.UntypedStorage] | None = None
        self.was_alive = True

    def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        self.was_alive = self.batch is not None and self.batch() is not None
        return x_NCHW


def test_the_batch_is_free_once_the_first_unit_is_trained() -> None:
    watcher = BatchWatcher()
    first, second = make_block()
    second = LocalUnit([watcher, *second.layers], second.head)

    def give_batch() -> torch.Tensor:
        x_NCHW, _ = make_batch()
        watcher.batch = weakref.ref(x_NCHW.untyped_storage())
        return x_NCHW

    optimizers = [make_optimizer(unit, CFG, 0.1) for unit in (first, second)]
    train_step([first, second], optimizers, give_batch(), make_batch()[1], "fp32")
    assert not watcher.was_alive


def test_bf16_passes_bf16_on_and_keeps_float32_weights_and_losses() -> None:
    units = make_block()
    seen: list[torch.dtype] = []
    units[1].layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    losses = train_step(units, [make_optimizer(unit, CFG, 0.1) for unit in units], *make_batch(), "bf16")
    assert seen == [torch.bfloat16]
    assert {loss.dtype for loss in losses} == {torch.float32}
    assert {parameter.dtype for unit in units for parameter in unit.parameters()} == {torch.float32}


def test_optimizer_skips_frozen_parameters_and_takes_its_settings() -> None:
    unit = make_unit(3, 8, seed=1)
    unit.layers[0].requires_grad_(False)
    optimizer = make_optimizer(unit, CFG, 0.25)
    (group,) = optimizer.param_groups
    assert len(group["params"]) == 2  # weight and bias of the head's linear layer
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.25, 0.9, 0.01)


def test_the_optimizer_step_makes_no_temporary_on_the_cpu() -> None:
    unit = make_unit(3, 8, seed=1)
    optimizer = make_optimizer(unit, CFG, 0.1)
    for parameter in unit.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with LiveBytes(CPU) as meter:
        optimizer.step()
    assert meter.peak_bytes == 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_forward_block_returns_the_output_and_every_heads_logits(precision: Any) -> None:
    units = [unit.eval() for unit in make_block()]
    x_NCHW, _ = make_batch()
    out_NCHW, all_logits = forward_block(units, x_NCHW, precision, with_heads=True)
    assert (out_NCHW.shape, out_NCHW.requires_grad) == ((5, 6, 8, 8), False)
    assert [logits_NK.shape for logits_NK in all_logits] == [(5, 4), (5, 4)]
    headless_NCHW, no_logits = forward_block(units, x_NCHW, precision, with_heads=False)
    assert torch.equal(headless_NCHW, out_NCHW)
    assert no_logits == []


def test_forward_block_equals_the_units_called_one_by_one() -> None:
    units = [unit.eval() for unit in make_block()]
    x_NCHW, _ = make_batch()
    middle_NCHW, first_logits_NK = units[0](x_NCHW)
    out_NCHW, second_logits_NK = units[1](middle_NCHW)
    result_NCHW, all_logits = forward_block(units, x_NCHW, "fp32", with_heads=True)
    assert torch.equal(result_NCHW, out_NCHW)
    assert torch.equal(all_logits[0], first_logits_NK)
    assert torch.equal(all_logits[1], second_logits_NK)


def test_auto_device_is_the_gpu_only_when_there_is_one() -> None:
    assert resolve_device("cpu") == CPU
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_without_a_gpu_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="got cuda"):
        resolve_device("cuda")


@pytest.mark.gpu
def test_a_gpu_has_an_index_with_which_its_memory_can_be_capped() -> None:
    device = resolve_device("cuda")
    torch.cuda.set_per_process_memory_fraction(1.0, device)
    assert device.index is not None
