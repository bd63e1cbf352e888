"""Checks what a network that was not made for this program gives: numbers for its samples, and float32 weights.

Knows nothing of where models come from. Entries: `check_outputs`, `check_weights`, `smallest_image`.
"""

import contextlib

import torch
from torch import nn

from nf_pipeline.core.probe import has_values, probe_input, run_probe
from nf_pipeline.core.trace import mode_of
from nf_pipeline.errors import ConfigError
from nf_pipeline.samples import InputSpec

# Usual sizes of images, and those that common networks are made for.
_SIZES = (8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 299, 320, 384, 448, 512)


def check_outputs(name: str, model: nn.Module, inputs: InputSpec, num_outputs: int) -> None:
    """Runs two made-up samples through the model in evaluation mode, and checks what it returns.

    Args:
        name: in errors, "--model NAME".
        inputs: what the model takes.
        num_outputs: numbers that it returns for a sample.

    Raises:
        ConfigError: it fails, or gives something else than `num_outputs` finite numbers for a sample.
    """
    with torch.no_grad(), mode_of(model, training=False):
        logits_NK = run_probe(f"--model {name}: the model", model, probe_input(model, inputs))
    if tuple(logits_NK.shape[1:]) != (num_outputs,):
        raise ConfigError(
            f"--model {name}: got outputs of shape {tuple(logits_NK.shape[1:])}, want ({num_outputs},): "
            f"one per class or value",
            "let the factory take num_outputs and use it for the last layer",
        )
    if has_values(logits_NK) and not logits_NK.isfinite().all():
        raise ConfigError(
            f"--model {name}: its outputs for random samples are not finite", "give its weights finite values"
        )


def check_weights(name: str, model: nn.Module) -> None:
    """Compares the model's weights with what training takes.

    Raises:
        ConfigError: a weight is not float32 on the CPU.
    """
    for path, weight in model.named_parameters():
        if weight.dtype != torch.float32 or weight.device.type != "cpu":
            raise ConfigError(
                f"--model {name}: {path} is {weight.dtype} on {weight.device}, want torch.float32 on cpu",
                "return the model as float32 on the CPU; train.precision and train.device decide the rest",
            )


def smallest_image(model: nn.Module, image_shape: tuple[int, ...]) -> int | None:
    """Finds the smallest usual size above the images' own that the model takes, by trying.

    Costs a forward pass of two images for each; meant for errors.

    Args:
        image_shape: (C, H, W) of images that it does not take.

    Returns:
        Height and width in pixels; None if there is none up to 512.
    """
    channels, *size = image_shape
    larger = [pixels for pixels in _SIZES if pixels > min(size)]
    return next((pixels for pixels in larger if _takes(model, (channels, pixels, pixels))), None)


def _takes(model: nn.Module, image_shape: tuple[int, ...]) -> bool:
    with contextlib.suppress(ConfigError), torch.no_grad(), mode_of(model, training=False):
        run_probe("the model", model, probe_input(model, InputSpec(shape=image_shape)))
        return True
    return False
