"""The streamlined final model: layers up to the chosen exit, contexts that look at its input, and that exit's head.

Takes samples as they are stored and returns logits of classes, or values in their own units, so that whoever loads it
needs to know nothing about normalisation. Knows nothing of files.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from nf_pipeline.core.context import build_context
from nf_pipeline.core.heads import build_head, head_site
from nf_pipeline.core.layers import cut
from nf_pipeline.core.layout import laid_out
from nf_pipeline.core.local_unit import LocalUnit
from nf_pipeline.core.models import build_model
from nf_pipeline.errors import ConfigError
from nf_pipeline.samples import InputSpec, TargetSpec


@dataclass(frozen=True, kw_only=True)
class ExitSpec:
    """Which layers of which model: all that its architecture follows from.

    Attributes:
        model: registry name or "package.module:factory".
        inputs: what it takes.
        target: what it predicts.
        head: name of the auxiliary head; the last layer has the model's own classifier.
        num_layers: layers from the model's input to the exit.
        contexts: layers, ascending, before each of which an encoding of the model's own input is added.
    """

    model: str
    inputs: InputSpec
    target: TargetSpec
    head: str
    num_layers: int
    contexts: tuple[int, ...] = ()


class Normalise(nn.Module):
    """Samples [N, *shape] as they are stored -> what the first layer takes, as in training.

    Tokens become int64, numbers float32, with the mean and the standard deviation of train taken out of every channel
    where these are known.

    Args:
        inputs: what is stored.
    """

    def __init__(self, inputs: InputSpec) -> None:
        super().__init__()
        self._is_tokens = inputs.num_tokens > 0
        sides = (-1, *[1] * (len(inputs.shape) - 1))
        for name, values in (("mean_C", inputs.mean), ("std_C", inputs.std)):
            of_channels = torch.tensor(values, dtype=torch.float32).view(sides) if values else None
            self.register_buffer(name, of_channels)

    def forward(self, stored_N: torch.Tensor) -> torch.Tensor:
        """Returns the batch for the first layer."""
        if self._is_tokens:
            return stored_N.long()
        if self.mean_C is None:
            return stored_N.float()
        return (stored_N.float() - self.mean_C) / self.std_C


class OwnUnits(nn.Module):
    """Standardised values_NK, which networks are trained on -> values_NK in their own units, and back.

    Args:
        target: with mean and std.
    """

    def __init__(self, target: TargetSpec) -> None:
        super().__init__()
        self.register_buffer("mean_K", torch.tensor(target.mean, dtype=torch.float32))
        self.register_buffer("std_K", torch.tensor(target.std, dtype=torch.float32))

    def forward(self, standardised_NK: torch.Tensor) -> torch.Tensor:
        """Returns values in their own units."""
        return standardised_NK * self.std_K + self.mean_K

    def standardised(self, values_NK: torch.Tensor) -> torch.Tensor:
        """Returns what networks are trained on; NaN where a value is not known."""
        return (values_NK - self.mean_K) / self.std_K


def own_units(target: TargetSpec) -> OwnUnits | None:
    """Returns what turns a network's outputs into the target's own units; None where they have none."""
    return OwnUnits(target) if target.mean else None


class ExitModel(nn.Module):
    """Samples as they are stored (images: 0 to 255) -> logits_NK, or values_NK in their own units.

    Args:
        units: from the first to the exit's; only the last one's head is kept.
        inputs: what it takes.
        target: what it predicts.
    """

    def __init__(self, units: Sequence[LocalUnit], inputs: InputSpec, target: TargetSpec) -> None:
        super().__init__()
        self.normalise = Normalise(inputs)
        self.layers = nn.Sequential(*(layer for unit in units for layer in unit.layers))
        starts = itertools.accumulate((len(unit.layers) for unit in units), initial=0)
        placed = ((str(start), unit.context) for start, unit in zip(starts, units, strict=False))
        self.contexts = nn.ModuleDict({name: context for name, context in placed if context is not None})
        self.head = units[-1].head
        self.own_units = own_units(target)
        self._is_last = units[-1].is_last

    def forward(self, stored_N: torch.Tensor) -> torch.Tensor:
        """Returns the logits, or the values."""
        # Without contexts no name keeps the batch while the layers run.
        sample_N = self.normalise(stored_N) if self.contexts else None
        x_NCHW = self.run_layers(
            self.normalise(stored_N) if sample_N is None else sample_N, 0, len(self.layers), sample_N
        )
        outputs_NK = self.run_head(x_NCHW)
        return outputs_NK if self.own_units is None else self.own_units(outputs_NK)

    @property
    def enters_at(self) -> tuple[int, ...]:
        """Layers, ascending, before each of which a context adds an encoding of the model's own input."""
        return tuple(int(layer_idx) for layer_idx in self.contexts)

    def seen_later(self, sample_N: torch.Tensor) -> torch.Tensor | None:
        """Returns what `normalise` returned if layers after the first look at it; else None: let go of it."""
        return sample_N if self.contexts else None

    def run_layers(
        self, x_NCHW: torch.Tensor, start: int, stop: int, sample_N: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Runs a half-open range of layers on what the layer before it, or `normalise`, has returned.

        Args:
            sample_N: of the same samples, from `seen_later`.
        """
        for layer_idx, layer in list(enumerate(self.layers))[start:stop]:
            if (name := str(layer_idx)) in self.contexts:
                x_NCHW = self.contexts[name].added_to(x_NCHW, sample_N)
            x_NCHW = layer(laid_out(x_NCHW))
        return x_NCHW

    def run_head(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        """Returns the logits, or the standardised values, of what the last layer has returned."""
        return self.head(x_NCHW.contiguous() if self._is_last else laid_out(x_NCHW))


def build_exit_model(spec: ExitSpec) -> ExitModel:
    """Builds the architecture with fresh weights, in inference mode, ready for `load_state_dict`.

    Args:
        spec: the model and its exit.

    Raises:
        ConfigError: the model cannot be built or cut, has fewer layers, or no context is built for its samples.
    """
    model = build_model(spec.model, inputs=spec.inputs, num_outputs=spec.target.size, seed=0)
    cut_model = cut(model, spec.inputs)
    if spec.num_layers > len(cut_model.layers):
        raise ConfigError(f"num_layers: got {spec.num_layers}, {spec.model} has {len(cut_model.layers)} layers")
    is_last = spec.num_layers == len(cut_model.layers)
    if is_last:
        head = cut_model.tail
    else:
        site = head_site(cut_model.out_shapes, spec.num_layers - 1, spec.target.size)
        head = build_head(spec.head, site, seed=0)
    units = []
    for start, stop in zip((0, *spec.contexts), (*spec.contexts, spec.num_layers), strict=True):
        context = build_context(spec.inputs, cut_model.out_shapes[start - 1], seed=0) if start else None
        units.append(LocalUnit(cut_model.layers[start:stop], head, is_last=is_last, context=context))
    return ExitModel(units, spec.inputs, spec.target).eval()
