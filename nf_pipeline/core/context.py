"""What a unit adds to its input: a learned encoding of the network's own sample, which earlier units have not kept.

A unit that learns alone throws away what its own loss has no use for, and later units cannot get it back. After
C. Yu et al., "Go beyond End-to-End Training: Boosting Greedy Local Learning with Context Supply" (2023,
https://arxiv.org/abs/2312.07636), ContSup[E]: x + encoder(sample), trained with the unit and part of the final model.
The encoder's form, where the paper leaves it open, is ours: one linear step that begins at zero and keeps nothing
for its backward pass but what it looks at. On digits (convnet, a unit per layer, 10 epochs, means of three seeds) the
last exit was right on 98.9 % of the validation samples with it, and on 98.6 % without; on 97.9 % with weights that
begin at random, and on 98.6 or 97.1 % with a batch norm behind whose weight begins at zero or one. [ours] Knows
nothing of units and of where samples come from. Entries: `build_context`, `needs_samples`.

Shapes: N batch, C channels; "..." stands for the sides of a map, from none of a vector to three of a volume.
"""

import math
from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from nf_pipeline.config import TrainConfig
from nf_pipeline.core import stand_ins
from nf_pipeline.core.layers import CutModel
from nf_pipeline.core.layout import laid_out
from nf_pipeline.core.objectives import looks_at_sample
from nf_pipeline.core.probe import fake_copy
from nf_pipeline.core.spatial import PARTS, SpatialParts, parts_for
from nf_pipeline.core.user_code import user_code
from nf_pipeline.errors import ConfigError
from nf_pipeline.samples import InputSpec

SMALLEST_KERNEL = 3
"""Of a context's convolution: a pixel and its neighbours, whatever the sizes."""

LARGEST_KERNEL = 8
"""Likewise; of samples that are more times as large as the map, what is seen is an average. A kernel as wide as the
sample would have more weights than the network, on its last maps. [ours]"""


class Context(nn.Module):
    """sample_N -> what is added to a unit's input, [N, C, ...], with sides of 1 where it is the same everywhere.

    Args:
        encoder: whose weights are zero at first, so that a unit begins as one without a context.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, sample_N: torch.Tensor) -> torch.Tensor:
        """Returns the encoding."""
        return self.encoder(laid_out(sample_N))

    def added_to(self, x: torch.Tensor, sample_N: torch.Tensor) -> torch.Tensor:
        """Returns a unit's input with the encoding added, in memory of its own: the input is left as it is."""
        encoded = self(sample_N)
        if encoded.shape == x.shape:
            # No operator keeps what it has returned here for its backward pass: a third map would hold memory.
            return encoded.add_(x)
        return x + encoded.to(x.dtype)


def build_context(inputs: InputSpec, in_shape: tuple[int, ...], seed: int) -> Context:
    """Builds a context with float32 weights on the CPU.

    A sample with as many sides as the unit's input goes through a convolution as wide as the map is smaller, at least
    3 and at most 8, so that every number is seen, and averages over what is still too large. Any other sample is one
    vector for all places: the mean embedding of its tokens, or a linear layer on averages over a few cells. [ours]

    Args:
        inputs: the network's samples.
        in_shape: of one sample at the unit's input.
        seed: 0 <= seed < 2**63; torch's global generator is left as it was.

    Raises:
        ConfigError: samples have more sides than there are convolutions for.
    """
    check_sides(inputs)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        encoder = _encoder(inputs, in_shape)
    with torch.no_grad():
        for weight in encoder.parameters():
            weight.zero_()
    return Context(encoder)


def needs_samples(train: TrainConfig) -> bool:
    """Whether units look at the network's own samples, so that blocks store them beside activations."""
    return train.context != "none" or looks_at_sample(train.loss)


def check_context(train: TrainConfig, inputs: InputSpec) -> None:
    """Checks that samples can go with activations as the configuration says.

    Raises:
        ConfigError: activations are to be flipped and samples are not, or no context can be built for the samples.
    """
    if train.feature_augment != "none" and needs_samples(train):
        asks = f"context {train.context}" if train.context != "none" else f"loss {train.loss}"
        raise ConfigError(
            f"train.feature_augment {train.feature_augment} changes stored maps, and train.{asks} the samples beside "
            "them not",
            "--set train.feature_augment=none, and train.augment for changes of the samples",
        )
    if train.context != "none":
        check_sides(inputs)


def check_sample_stays(cut_model: CutModel) -> None:
    """Checks that layers leave their network's input as it is, for later units to look at.

    Raises:
        ConfigError: one changes it in place.
    """
    failure = user_code("model: a forward pass fails", "change the model: every layer must take any batch")
    with failure, FakeTensorMode(allow_non_fake_inputs=True) as fakes, torch.no_grad():
        sample_N = stand_ins.zeros(cut_model.inputs, 1)
        fake_copy(cut_model.whole(), fakes).eval()(sample_N)
    if sample_N._version:
        raise ConfigError(
            "model: a layer changes the network's input in place, which later units are to look at",
            "remove inplace=True from the first layers, or --set train.context=none and another train.loss",
        )


def check_sides(inputs: InputSpec) -> None:
    """Checks that samples have no more sides than there are convolutions for.

    Raises:
        ConfigError: they have.
    """
    if not inputs.num_tokens and len(inputs.shape) - 1 > max(PARTS):
        raise ConfigError(
            f"train.context sample: samples have shape {inputs.shape}, want at most {max(PARTS)} sides",
            "--set train.context=none",
        )


def _encoder(inputs: InputSpec, in_shape: tuple[int, ...]) -> nn.Module:
    channels, *sides = in_shape
    if inputs.num_tokens:
        embed = nn.EmbeddingBag(inputs.num_tokens, channels)
        return nn.Sequential(OrderedDict(embed=embed, to_map=_ToMap(len(sides))))
    if sides and len(inputs.shape) == len(in_shape):
        return _convolution(inputs.shape, in_shape, parts_for(in_shape))
    parts = parts_for(inputs.shape)
    cells = parts.cells(inputs.shape[1:]) if parts else ()
    layers = OrderedDict(pool=parts.avg_pool(cells), flatten=nn.Flatten()) if parts else OrderedDict()
    layers["linear"] = nn.Linear(inputs.shape[0] * math.prod(cells), channels)
    layers["to_map"] = _ToMap(len(sides))
    return nn.Sequential(layers)


def _convolution(shape: tuple[int, ...], in_shape: tuple[int, ...], parts: SpatialParts) -> nn.Module:
    """Returns what makes a map of a sample: a convolution, with averages before and behind where sizes ask for it."""
    wanted = tuple(in_shape[1:])
    seen = tuple(min(side, LARGEST_KERNEL * goal) for side, goal in zip(shape[1:], wanted, strict=True))
    steps = [_Step.between(side, goal) for side, goal in zip(seen, wanted, strict=True)]
    kernel, stride, padding, made = zip(*steps, strict=True)
    layers = OrderedDict(
        shrink=parts.avg_pool(seen),
        conv=parts.conv(shape[0], in_shape[0], kernel, stride=stride, padding=padding),
        pool=parts.avg_pool(wanted),
    )
    if seen == tuple(shape[1:]):
        del layers["shrink"]
    if made == wanted:
        del layers["pool"]
    return nn.Sequential(layers)


class _Step(NamedTuple):
    """How a convolution goes along one side, and the numbers that come out."""

    kernel: int
    stride: int
    padding: int
    made: int

    @classmethod
    def between(cls, side: int, goal: int) -> "_Step":
        """Returns steps as wide as `goal` is smaller than `side`; padded so that they reach from end to end."""
        stride = max(1, side // goal)
        kernel, made = max(SMALLEST_KERNEL, stride), -(-side // stride)
        return cls(kernel, stride, (made * stride - side + kernel - stride + 1) // 2, made)


class _ToMap(nn.Module):
    """vector_NC -> [N, C, 1, ...] with so many sides."""

    def __init__(self, num_sides: int) -> None:
        super().__init__()
        self._num_sides = num_sides

    def forward(self, x_NC: torch.Tensor) -> torch.Tensor:
        """Returns the same numbers."""
        return x_NC.view(*x_NC.shape, *[1] * self._num_sides)
