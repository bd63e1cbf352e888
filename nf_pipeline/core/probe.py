"""Runs a module once on two made-up samples, to learn its output's shape or that it fails.

Works for real, fake and meta weights; the samples are made where the weights are. Entries: `probe_input`,
`run_probe`.
"""

import torch
from torch import nn

# Private, but the only way to tell weights that were built under FakeTensorMode.
from torch._subclasses.fake_tensor import FakeTensor

from nf_pipeline.errors import ConfigError

# With a single sample, an operation that mixes up the batch dimension could pass.
_NUM_SAMPLES = 2


def probe_input(model: nn.Module, image_shape: tuple[int, int, int]) -> torch.Tensor:
    """Makes the same two random samples every time, float32, on the device of the model's weights.

    Leaves torch's global generator alone. For fake weights the samples are fake.
    """
    weight = next(model.parameters(), None)
    if isinstance(weight, FakeTensor):
        with weight.fake_mode:
            return torch.zeros(_NUM_SAMPLES, *image_shape, device=weight.device)
    generator = torch.Generator(device="cpu").manual_seed(0)
    x_NCHW = torch.randn(_NUM_SAMPLES, *image_shape, generator=generator, device="cpu")
    return x_NCHW if weight is None else x_NCHW.to(weight.device)


def run_probe(what: str, module: nn.Module, x_NCHW: torch.Tensor) -> torch.Tensor:
    """Runs a module on what `probe_input` made, or on another module's output.

    Args:
        what: names the module in errors.

    Raises:
        ConfigError: it fails, or returns anything but one tensor with a row per sample.
    """
    try:
        out = module(x_NCHW)
    except Exception as error:  # the user's code can fail in any way
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ConfigError(
            f"{what} fails on an input of shape {tuple(x_NCHW.shape)}: {reason}",
            "change the model, or the size of the images with --image-size",
        ) from error
    if not isinstance(out, torch.Tensor) or out.dim() < 2 or out.shape[0] != _NUM_SAMPLES:
        got = tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
        raise ConfigError(
            f"{what} returns {got} for {_NUM_SAMPLES} samples, want one tensor with a row per sample",
            "return one tensor, the logits at the end",
        )
    return out


def has_values(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds numbers: fake and meta tensors have only a shape."""
    return not isinstance(tensor, FakeTensor) and not tensor.is_meta
