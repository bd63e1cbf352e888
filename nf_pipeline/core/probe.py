"""Runs a module once on two made-up samples, to learn its output's shape or that it fails.

Works for real, fake and meta weights; the samples are made where the weights are. Entries: `probe_input`,
`run_probe`.
"""

import contextlib
import copy
from typing import TypeVar

import torch
from torch import nn

# Private, but the only way to tell weights that were built under FakeTensorMode.
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)

from nf_pipeline.core import stand_ins
from nf_pipeline.core.memory import LiveBytes
from nf_pipeline.core.user_code import check_host_memory, user_code
from nf_pipeline.errors import ConfigError, NFError
from nf_pipeline.samples import InputSpec

ModuleT = TypeVar("ModuleT", bound=nn.Module)

UNTRACEABLE = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException)
"""What fake tensors raise for operators that need values, not only shapes."""

# Two pictures of so many bytes (600x600 pixels of colour) cannot exhaust a machine: the check would cost more. What a
# layer makes of a vector, a sequence or a volume can be far larger than they are.
_CHECKED_BYTES = 8 * 2**20
_PICTURES_DIM = 4
# With a single sample, an operation that mixes up the batch dimension could pass.
_NUM_SAMPLES = 2


def probe_input(model: nn.Module, inputs: InputSpec) -> torch.Tensor:
    """Makes the same two random samples every time, as `stand_ins.noise`, on the device of the model's weights.

    Leaves torch's global generator alone. For fake weights the samples are fake.
    """
    weight = next(model.parameters(), None)
    if isinstance(weight, FakeTensor):
        with weight.fake_mode:
            return stand_ins.zeros(inputs, _NUM_SAMPLES, weight.device)
    generator = torch.Generator(device="cpu").manual_seed(0)
    x_N = stand_ins.noise(inputs, _NUM_SAMPLES, generator=generator)
    return x_N if weight is None else x_N.to(weight.device)


def run_probe(what: str, module: nn.Module, x_N: torch.Tensor) -> torch.Tensor:
    """Runs a module on what `probe_input` made, or on another module's output.

    Args:
        what: names the module in errors.

    Raises:
        ConfigError: it fails, returns anything but one float32 tensor with a row per sample, or would need more
            memory than this machine has.
    """
    where = f"{what} fails on an input of shape {tuple(x_N.shape)}"
    is_picture = x_N.dim() == _PICTURES_DIM
    fix = "change the model, or the size of the images with --image-size" if is_picture else "change the model"
    with user_code(where, fix):
        if (x_N.nbytes > _CHECKED_BYTES or not is_picture) and has_values(x_N):
            check_host_memory(_forward_bytes(module, x_N), "its activations take")
        out = module(x_N)
    if not isinstance(out, torch.Tensor) or out.dim() < 2 or out.shape[0] != _NUM_SAMPLES:
        got = tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
        raise ConfigError(
            f"{what} returns {got} for {_NUM_SAMPLES} samples, want one tensor with a row per sample",
            "return one tensor, the logits at the end",
        )
    if out.dtype != torch.float32:
        raise ConfigError(f"{what} returns {out.dtype}, want torch.float32", "convert its result with .float()")
    return out


def _forward_bytes(module: nn.Module, x_N: torch.Tensor) -> int:
    """Returns the most bytes that the pass holds at once, counted on fake tensors; 0 where these do not work."""
    meter = LiveBytes(torch.device("cpu"))
    # What fails on fake tensors, in whatever way, is tried as it is: then it fails for people, or not at all.
    with (
        contextlib.suppress(NFError),
        user_code("on fake tensors", "try it as it is"),
        FakeTensorMode(allow_non_fake_inputs=True) as fakes,
        meter,
    ):
        fake_copy(module, fakes)(fakes.from_tensor(x_N))
    return meter.peak_bytes


def fake_copy(module: ModuleT, fakes: FakeTensorMode) -> ModuleT:
    """Copies a module with fake weights and buffers: deepcopy finds them in its memo, no data is copied."""
    memo: dict[int, object] = {}
    for buffer in module.buffers():
        memo[id(buffer)] = fakes.from_tensor(buffer)
    for parameter in module.parameters():
        fake = fakes.from_tensor(parameter.detach())
        memo[id(parameter)] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
    return copy.deepcopy(module, memo)


def has_values(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds numbers: fake and meta tensors have only a shape."""
    return not isinstance(tensor, FakeTensor) and not tensor.is_meta
