"""The streamlined final model: layers up to the chosen exit and that exit's head.

Takes raw pixels, so that whoever loads it needs to know nothing about normalisation. Knows nothing of files.
"""

from collections.abc import Sequence

import torch
from torch import nn

from nf_pipeline.core.layers import cut
from nf_pipeline.core.local_unit import LocalUnit, build_units, unit_ranges
from nf_pipeline.core.models import build_model


class Normalise(nn.Module):
    """pixels_NCHW (0 to 255) -> x_NCHW float32, as in training.

    Args:
        mean, std: per channel, of pixels scaled to [0, 1].
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean_C11", 255.0 * torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1))
        self.register_buffer("std_C11", 255.0 * torch.tensor(std, dtype=torch.float32).view(-1, 1, 1))

    def forward(self, pixels_NCHW: torch.Tensor) -> torch.Tensor:
        """Returns the normalised batch."""
        return (pixels_NCHW.float() - self.mean_C11) / self.std_C11


class ExitModel(nn.Module):
    """pixels_NCHW (uint8 or float, 0 to 255) -> logits_NK.

    Args:
        units: from the first to the exit's; only the last one's head is kept.
        mean, std: per channel, of pixels scaled to [0, 1].
    """

    def __init__(self, units: Sequence[LocalUnit], mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.normalise = Normalise(mean, std)
        self.layers = nn.Sequential(*(layer for unit in units for layer in unit.layers))
        self.head = units[-1].head

    def forward(self, pixels_NCHW: torch.Tensor) -> torch.Tensor:
        """Returns the logits."""
        return self.head(self.layers(self.normalise(pixels_NCHW)))


def build_exit_model(
    *,
    model: str,
    image_shape: tuple[int, int, int],
    num_classes: int,
    head: str,
    unit_layers: int,
    num_units: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> ExitModel:
    """Builds the architecture with `num_units` units and fresh weights, ready for `load_state_dict`."""
    units = build_first_units(
        model=model,
        image_shape=image_shape,
        num_classes=num_classes,
        head=head,
        unit_layers=unit_layers,
        num_units=num_units,
    )
    return ExitModel(units, mean, std).eval()


def build_first_units(
    *,
    model: str,
    image_shape: tuple[int, int, int],
    num_classes: int,
    head: str,
    unit_layers: int,
    num_units: int,
    seed: int = 0,
) -> list[LocalUnit]:
    """Builds the first `num_units` units of a model with fresh weights."""
    cut_model = cut(build_model(model, image_shape=image_shape, num_classes=num_classes, seed=seed), image_shape)
    available = len(unit_ranges(len(cut_model.layers), unit_layers))
    return build_units(cut_model, head, unit_layers, num_classes, seed, units=range(min(num_units, available)))
