"""The streamlined final model: layers up to the chosen exit and that exit's head.

Takes raw pixels, so that whoever loads it needs to know nothing about normalisation. Knows nothing of files.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from nf_pipeline.core.heads import build_head, head_site
from nf_pipeline.core.layers import cut
from nf_pipeline.core.layout import laid_out
from nf_pipeline.core.local_unit import LocalUnit
from nf_pipeline.core.models import build_model
from nf_pipeline.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ExitSpec:
    """Which layers of which model: all that its architecture follows from.

    Attributes:
        model: registry name or "package.module:factory".
        image_shape: (C, H, W) of the images.
        num_classes: K.
        head: name of the auxiliary head; the last layer has the model's own classifier.
        num_layers: layers from the model's input to the exit.
    """

    model: str
    image_shape: tuple[int, int, int]
    num_classes: int
    head: str
    num_layers: int


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
        self._is_last = units[-1].is_last

    def forward(self, pixels_NCHW: torch.Tensor) -> torch.Tensor:
        """Returns the logits."""
        return self.run_head(self.run_layers(self.normalise(pixels_NCHW), 0, len(self.layers)))

    def run_layers(self, x_NCHW: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Runs a half-open range of layers on what the layer before it, or `normalise`, has returned."""
        for layer in list(self.layers)[start:stop]:
            x_NCHW = layer(laid_out(x_NCHW))
        return x_NCHW

    def run_head(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        """Returns the logits of what the last layer has returned."""
        return self.head(x_NCHW.contiguous() if self._is_last else laid_out(x_NCHW))


def build_exit_model(spec: ExitSpec, *, mean: Sequence[float], std: Sequence[float]) -> ExitModel:
    """Builds the architecture with fresh weights, in inference mode, ready for `load_state_dict`.

    Args:
        spec: the model and its exit.
        mean, std: per channel, of pixels scaled to [0, 1].

    Raises:
        ConfigError: the model cannot be built or cut, or has fewer layers.
    """
    model = build_model(spec.model, image_shape=spec.image_shape, num_classes=spec.num_classes, seed=0)
    cut_model = cut(model, spec.image_shape)
    if spec.num_layers > len(cut_model.layers):
        raise ConfigError(f"num_layers: got {spec.num_layers}, {spec.model} has {len(cut_model.layers)} layers")
    is_last = spec.num_layers == len(cut_model.layers)
    if is_last:
        head = cut_model.tail
    else:
        site = head_site(cut_model.out_shapes, spec.num_layers - 1, spec.num_classes)
        head = build_head(spec.head, site, seed=0)
    return ExitModel([LocalUnit(cut_model.layers[: spec.num_layers], head, is_last=is_last)], mean, std).eval()
