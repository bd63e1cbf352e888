"""What a unit is trained for: its loss, by name, with the weights that only training needs.

One table, name -> constructor; a new loss is one more class. Similarities are those of the samples that one worker
holds: the members of a gang each match their own part of the batch. Knows nothing of layers, optimisers and of how
batches are mixed. Entries: `build_objective`, and `CrossEntropy`, which is what a unit trains for unless told
otherwise.

Shapes: N batch, C channels, H, W, K classes, F features.
"""

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import nn
from torch.nn import functional

from nf_pipeline.core.layout import laid_out
from nf_pipeline.errors import ConfigError

SIMILARITY_SHARE = 0.99
"""Part of the similarities in `predsim`; the rest is cross-entropy (Nokland and Eidnes 2019, section 3.3)."""

GAIN = 4.0
"""Factor of `predsim` as a whole: from the second unit on, gradients of similarities were measured to be a quarter to
two thirds of cross-entropy's, and the authors' optimiser made up for that. [ours]"""

LARGEST_MAP_PIXELS = 256
"""Maps of more pixels, most often the first layers', are averaged to at most so many before similarities. [ours]"""

SMALLEST_NORM = 1e-4
"""Centred samples of a smaller norm are divided by this one: the gradient of a cosine goes with the inverse of the
norm, and a sample that is nearly dead would outweigh its whole batch. Untrained layers' are 0.2 to 3. [ours]"""

WORST_MATCHING = 4.0
"""The mean squared error of similarities, all between -1 and 1, is never larger."""

# Authors' code, too: of fewer channels spreads alone say next to nothing.
_FEWEST_SPREADS = 4


@dataclass(frozen=True, kw_only=True)
class Labels:
    """What the samples of a batch should be told to be.

    Attributes:
        y_N: int64 class indices.
        other_N: classes of the samples that they are mixed with; None for samples as they are.
        share: of `y_N` in a mixed sample, 0 to 1.
    """

    y_N: torch.Tensor
    other_N: torch.Tensor | None = None
    share: float = 1.0

    def mean(self, loss: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Returns the convex combination of a loss for both labels."""
        if self.other_N is None:
            return loss(self.y_N)
        return self.share * loss(self.y_N) + (1.0 - self.share) * loss(self.other_N)

    def one_hot_NK(self, num_classes: int) -> torch.Tensor:
        """Returns float32 rows that sum to 1."""
        classes_K = torch.arange(num_classes, device=self.y_N.device)
        return self.mean(lambda y_N: (y_N[:, None] == classes_K).float())


@dataclass(frozen=True, kw_only=True)
class UnitEnd:
    """Where an objective looks at a unit.

    Attributes:
        out_shape: of one sample of the layers' output.
        num_outputs: K.
        label_smoothing: part of every label that is spread over all classes, 0 to below 1.
    """

    out_shape: tuple[int, ...]
    num_outputs: int
    label_smoothing: float = 0.0


class CrossEntropy(nn.Module):
    """Mean cross-entropy of the head's logits. A module for the weights that other losses have, not to be called.

    Args:
        label_smoothing: see `UnitEnd`.
        on_output: what other losses compute of the layers' output beside the head; it has what weights they have.
    """

    looks_at_output: ClassVar[bool] = False
    """Whether a loss of this class has an `on_output`."""

    def __init__(self, label_smoothing: float = 0.0, on_output: nn.Module | None = None) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing
        self.on_output = on_output

    @classmethod
    def at(cls, end: UnitEnd) -> Self:
        """Returns a loss that looks there, with new weights if it has any."""
        return cls(end.label_smoothing)

    def loss(self, out_NCHW: torch.Tensor, logits_NK: torch.Tensor, labels: Labels) -> torch.Tensor:
        """Returns a scalar."""
        smoothing = self.label_smoothing
        return labels.mean(lambda y_N: functional.cross_entropy(logits_NK, y_N, label_smoothing=smoothing))

    def limit(self, num_outputs: int, times_chance: float) -> float:
        """Returns the loss when the cross-entropy is so many times that of guessing, and all else at its worst."""
        return times_chance * math.log(max(2, num_outputs))

    def restore_head(self, head: nn.Module) -> None:
        """Called after the backward pass, to change the gradients of the head's own weights in place."""


class PredSim(CrossEntropy):
    """0.99 x similarity matching + 0.01 x cross-entropy, times `GAIN`.

    Samples of one class should be alike in what a convolution makes of the layers' output, and others not: mean
    squared error between the similarities of all pairs of samples and those of their labels. After A. Nokland and
    L. H. Eidnes, "Training Neural Networks with Local Error Signals" (ICML 2019, https://arxiv.org/abs/1901.06656).

    The authors train with Adam, for which the scale of a gradient means nothing. Under SGD the layers would learn
    slower than with cross-entropy, hence the gain; and the head, which learns from the small part alone, a hundred
    times slower: its own gradients are scaled to those of cross-entropy. [ours]
    """

    looks_at_output = True

    @classmethod
    def at(cls, end: UnitEnd) -> Self:
        """See `CrossEntropy.at`."""
        return cls(end.label_smoothing, Similarities(end.out_shape))

    def loss(self, out_NCHW: torch.Tensor, logits_NK: torch.Tensor, labels: Labels) -> torch.Tensor:
        """Returns a scalar."""
        cross_entropy = super().loss(out_NCHW, logits_NK, labels)
        wanted_NN = similarities(labels.one_hot_NK(logits_NK.shape[1]))
        matching = functional.mse_loss(self.on_output(out_NCHW), wanted_NN)
        return GAIN * (SIMILARITY_SHARE * matching + (1.0 - SIMILARITY_SHARE) * cross_entropy)

    def limit(self, num_outputs: int, times_chance: float) -> float:
        """See `CrossEntropy.limit`; similarities are bounded, so what explodes shows in the small part alone."""
        cross_entropy = super().limit(num_outputs, times_chance)
        return GAIN * (SIMILARITY_SHARE * WORST_MATCHING + (1.0 - SIMILARITY_SHARE) * cross_entropy)

    def restore_head(self, head: nn.Module) -> None:
        """Scales the gradients to those of cross-entropy alone."""
        for weight in head.parameters():
            if weight.grad is not None:
                weight.grad.mul_(1.0 / (GAIN * (1.0 - SIMILARITY_SHARE)))


class Similarities(nn.Module):
    """out_NCHW -> similarities_NN of all pairs of samples, after a 3x3 convolution C -> C that only training has.

    A map becomes its channels' spreads over the pixels, as in the authors' code. Maps of more than
    `LARGEST_MAP_PIXELS` are pooled first: halved until they are no larger, which follows from the shape alone, so
    that every worker builds the same. [ours] Under autocast only the convolution is of less than float32.

    Args:
        out_shape: (C, H, W), or (F,) where the layers return a vector, which is compared as it is.
    """

    def __init__(self, out_shape: tuple[int, ...]) -> None:
        super().__init__()
        is_map = len(out_shape) == 3
        self.pool = nn.AdaptiveAvgPool2d(_pooled(*out_shape[1:])) if is_map else nn.Identity()
        self.conv = nn.Conv2d(out_shape[0], out_shape[0], 3, padding=1, bias=False) if is_map else nn.Identity()

    def forward(self, out_NCHW: torch.Tensor) -> torch.Tensor:
        """Returns cosines, between -1 and 1."""
        features_NCHW = self.conv(laid_out(self.pool(out_NCHW)))
        return similarities(_spreads(_precise(features_NCHW)))


def similarities(x_NF: torch.Tensor) -> torch.Tensor:
    """Returns the cosine of every pair of samples, each centred at its own mean, in float32 at least.

    Under bf16 cosines would be off by 0.02. Samples nearly all of whose numbers are alike have smaller ones
    (`SMALLEST_NORM`).
    """
    with torch.autocast(x_NF.device.type, enabled=False):
        x_NF = _precise(x_NF)
        centred_NF = functional.normalize(x_NF - x_NF.mean(dim=1, keepdim=True), dim=1, eps=SMALLEST_NORM)
        return centred_NF @ centred_NF.T


OBJECTIVES: dict[str, type[CrossEntropy]] = {"cross_entropy": CrossEntropy, "predsim": PredSim}


def build_objective(name: str, end: UnitEnd, seed: int) -> CrossEntropy:
    """Builds a loss with float32 weights, if it has any, on the CPU; the same seed gives the same weights.

    Args:
        name: a key of `OBJECTIVES`.
        end: where it looks.
        seed: 0 <= seed < 2**63; torch's global generator is left as it was.

    Raises:
        ConfigError: unknown name.
    """
    check_objective_name(name)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return OBJECTIVES[name].at(end)


def looks_at_output(name: str) -> bool:
    """Whether a loss computes something of the layers' output beside the head, which takes bytes and seconds."""
    return OBJECTIVES[name].looks_at_output


def check_objective_name(name: str) -> None:
    """Checks that there is such a loss.

    Raises:
        ConfigError: unknown name.
    """
    if name not in OBJECTIVES:
        near = difflib.get_close_matches(name, OBJECTIVES, n=3, cutoff=0.5)
        known = f"did you mean {' or '.join(near)}?" if near else f"one of {', '.join(OBJECTIVES)}"
        raise ConfigError(f"train.loss: got {name!r}, unknown loss", known)


def _precise(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _spreads(x_NCHW: torch.Tensor) -> torch.Tensor:
    """Returns one number per channel where a map has pixels to spread over, all numbers elsewhere."""
    if x_NCHW.dim() == 4 and x_NCHW.shape[1] >= _FEWEST_SPREADS and x_NCHW[0, 0].numel() > 1:
        return x_NCHW.flatten(2).std(dim=2)
    return x_NCHW.flatten(1)


def _pooled(height: int, width: int) -> tuple[int, int]:
    while height * width > LARGEST_MAP_PIXELS:
        height, width = (height + 1) // 2, (width + 1) // 2
    return height, width
