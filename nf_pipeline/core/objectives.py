"""What a unit is trained for: its loss, by name, with the weights that only training needs.

One table, name -> constructor; a new loss is one more class, which says what kind of target it is for. Similarities
are those of the samples that one worker holds: the members of a gang each match their own part of the batch. Knows
nothing of layers, optimisers and of how batches are mixed. Entries: `build_objective`, `check_objective`.

Shapes: N batch, C channels, K outputs (a score per class, or each value), F features; "..." stands for the sides of
a map, from none of a vector to three of a volume.
"""

import difflib
import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Final, Self

import torch
from torch import nn
from torch.nn import functional

from nf_pipeline.config import TrainConfig
from nf_pipeline.core.layout import laid_out
from nf_pipeline.core.spatial import parts_for
from nf_pipeline.errors import ConfigError
from nf_pipeline.samples import TargetKind, TargetSpec

AUTO_LOSS: Final = "auto"
"""Value of `train.loss` that leaves it to the kind of target: `DEFAULTS`."""

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
        y_N: int64 class indices [N], or float32 standardised values [N, K].
        other_N: of the samples that they are mixed with; None for samples as they are.
        share: of `y_N` in a mixed sample, 0 to 1.
    """

    y_N: torch.Tensor
    other_N: torch.Tensor | None = None
    share: float = 1.0

    def mean(self, loss: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Returns the convex combination of a loss for both labels.

        Of cross-entropy that is the loss for the mixed labels; of squared errors it has the same gradients.
        """
        if self.other_N is None:
            return loss(self.y_N)
        return self.share * loss(self.y_N) + (1.0 - self.share) * loss(self.other_N)

    def one_hot_NK(self, num_classes: int) -> torch.Tensor:
        """Returns float32 rows that sum to 1, of classes."""
        classes_K = torch.arange(num_classes, device=self.y_N.device)
        return self.mean(lambda y_N: (y_N[:, None] == classes_K).float())


@dataclass(frozen=True, kw_only=True)
class UnitEnd:
    """Where an objective looks at a unit.

    Attributes:
        out_shape: of one sample of the layers' output.
        target: what is predicted.
        label_smoothing: part of every label that is spread over all classes, 0 to below 1.
        is_last: whether the unit ends with the model's own classifier, beside which no loss looks at the output.
    """

    out_shape: tuple[int, ...]
    target: TargetSpec
    label_smoothing: float = 0.0
    is_last: bool = False


class Objective(nn.Module):
    """A loss. A module for the weights that some losses have, not to be called.

    Args:
        on_output: what the loss computes of the layers' output beside the head; it has what weights it has.
    """

    kind: ClassVar[TargetKind]
    """What kind of target it is for."""
    looks_at_output: ClassVar[bool] = False
    """Whether a loss of this class has an `on_output`."""

    def __init__(self, on_output: nn.Module | None = None) -> None:
        super().__init__()
        self.on_output = on_output

    @classmethod
    @abstractmethod
    def at(cls, end: UnitEnd) -> Self:
        """Returns a loss that looks there, with new weights if it has any."""

    @abstractmethod
    def loss(self, out: torch.Tensor, outputs_NK: torch.Tensor, labels: Labels) -> torch.Tensor:
        """Returns a scalar.

        Args:
            out: of the layers, [N, C, ...].
            outputs_NK: of the head.
            labels: what the head should return.
        """

    @abstractmethod
    def limit(self, num_outputs: int, times_chance: float) -> float:
        """Returns the loss when the head is so many times as far off as guesses, and all else at its worst."""

    def restore_head(self, head: nn.Module) -> None:
        """Called after the backward pass, to change the gradients of the head's own weights in place."""


class CrossEntropy(Objective):
    """Mean cross-entropy of the head's logits.

    Args:
        label_smoothing: see `UnitEnd`.
        on_output: see `Objective`.
    """

    kind = "class"

    def __init__(self, label_smoothing: float = 0.0, on_output: nn.Module | None = None) -> None:
        super().__init__(on_output)
        self.label_smoothing = label_smoothing

    @classmethod
    def at(cls, end: UnitEnd) -> Self:
        """See `Objective.at`."""
        return cls(end.label_smoothing)

    def loss(self, out: torch.Tensor, outputs_NK: torch.Tensor, labels: Labels) -> torch.Tensor:
        """See `Objective.loss`."""
        smoothing = self.label_smoothing
        return labels.mean(lambda y_N: functional.cross_entropy(outputs_NK, y_N, label_smoothing=smoothing))

    def limit(self, num_outputs: int, times_chance: float) -> float:
        """See `Objective.limit`; who guesses has the logarithm of the number of classes."""
        return times_chance * math.log(max(2, num_outputs))


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
        """See `Objective.at`."""
        return cls(end.label_smoothing, Similarities(end.out_shape))

    def loss(self, out: torch.Tensor, outputs_NK: torch.Tensor, labels: Labels) -> torch.Tensor:
        """See `Objective.loss`."""
        cross_entropy = super().loss(out, outputs_NK, labels)
        wanted_NN = similarities(labels.one_hot_NK(outputs_NK.shape[1]))
        matching = functional.mse_loss(self.on_output(out), wanted_NN)
        return GAIN * (SIMILARITY_SHARE * matching + (1.0 - SIMILARITY_SHARE) * cross_entropy)

    def limit(self, num_outputs: int, times_chance: float) -> float:
        """See `Objective.limit`; similarities are bounded, so what explodes shows in the small part alone."""
        cross_entropy = super().limit(num_outputs, times_chance)
        return GAIN * (SIMILARITY_SHARE * WORST_MATCHING + (1.0 - SIMILARITY_SHARE) * cross_entropy)

    def restore_head(self, head: nn.Module) -> None:
        """Scales the gradients to those of cross-entropy alone."""
        for weight in head.parameters():
            if weight.grad is not None:
                weight.grad.mul_(1.0 / (GAIN * (1.0 - SIMILARITY_SHARE)))


class _OfValues(Objective):
    """A loss of the residuals between the head's outputs and standardised values, in float32."""

    kind = "values"

    @classmethod
    def at(cls, end: UnitEnd) -> Self:
        """See `Objective.at`."""
        return cls()

    def loss(self, out: torch.Tensor, outputs_NK: torch.Tensor, labels: Labels) -> torch.Tensor:
        """See `Objective.loss`; the mean over samples and values."""
        return labels.mean(lambda y_NK: self.of_residuals(_precise(outputs_NK) - y_NK))

    @abstractmethod
    def of_residuals(self, residuals_NK: torch.Tensor) -> torch.Tensor:
        """Returns a scalar."""

    def limit(self, num_outputs: int, times_chance: float) -> float:
        """See `Objective.limit`; who predicts the mean of train is off by one standard deviation."""
        return times_chance


class SquaredError(_OfValues):
    """Mean squared error: the head learns the mean of what a sample's values may be. 1 for who guesses."""

    def of_residuals(self, residuals_NK: torch.Tensor) -> torch.Tensor:
        """Returns a scalar."""
        return residuals_NK.square().mean()

    def limit(self, num_outputs: int, times_chance: float) -> float:
        """See `Objective.limit`; squared, like the residuals: a rare value far out is no divergence."""
        return times_chance**2


class AbsoluteError(_OfValues):
    """Mean absolute error: the head learns the median, and samples far off count no more than others."""

    def of_residuals(self, residuals_NK: torch.Tensor) -> torch.Tensor:
        """Returns a scalar."""
        return residuals_NK.abs().mean()


class Huber(_OfValues):
    """Half the squared error up to a residual of one standard deviation, beyond it straight, like the absolute error.

    P. J. Huber, "Robust Estimation of a Location Parameter" (Annals of Mathematical Statistics 35, 1964, 73-101,
    https://doi.org/10.1214/aoms/1177703732).
    """

    def of_residuals(self, residuals_NK: torch.Tensor) -> torch.Tensor:
        """Returns a scalar."""
        return functional.huber_loss(residuals_NK, torch.zeros_like(residuals_NK))


class Similarities(nn.Module):
    """out -> similarities_NN of all pairs of samples, after a convolution 3 wide, C -> C, that only training has.

    A map becomes its channels' spreads over its places, as in the authors' code for pictures, however many sides it
    has. Maps of more than `LARGEST_MAP_PIXELS` are pooled first: halved until they are no larger, which follows
    from the shape alone, so that every worker builds the same. [ours] Under autocast only the convolution is of less
    than float32.

    Args:
        out_shape: (C, *sides) with one to three sides, or (F,) where the layers return a vector, which is compared as
            it is.
    """

    def __init__(self, out_shape: tuple[int, ...]) -> None:
        super().__init__()
        channels, *sides = out_shape
        parts = parts_for(out_shape)
        self.pool = parts.avg_pool(_pooled(*sides)) if parts else nn.Identity()
        self.conv = parts.conv(channels, channels, 3, padding=1, bias=False) if parts else nn.Identity()

    def forward(self, out: torch.Tensor) -> torch.Tensor:
        """Returns cosines, between -1 and 1."""
        features = self.conv(laid_out(self.pool(out)))
        return similarities(_spreads(_precise(features)))


def similarities(x_NF: torch.Tensor) -> torch.Tensor:
    """Returns the cosine of every pair of samples, each centred at its own mean, in float32 at least.

    Under bf16 cosines would be off by 0.02. Samples nearly all of whose numbers are alike have smaller ones
    (`SMALLEST_NORM`).
    """
    with torch.autocast(x_NF.device.type, enabled=False):
        x_NF = _precise(x_NF)
        centred_NF = functional.normalize(x_NF - x_NF.mean(dim=1, keepdim=True), dim=1, eps=SMALLEST_NORM)
        return centred_NF @ centred_NF.T


OBJECTIVES: dict[str, type[Objective]] = {
    "cross_entropy": CrossEntropy,
    "predsim": PredSim,
    "mse": SquaredError,
    "mae": AbsoluteError,
    "huber": Huber,
}

DEFAULTS: dict[TargetKind, str] = {"class": "cross_entropy", "values": "mse"}
"""What each kind of target is trained for unless told otherwise."""


def build_objective(name: str, end: UnitEnd, seed: int) -> Objective:
    """Builds a loss with float32 weights, if it has any, on the CPU; the same seed gives the same weights.

    Args:
        name: a key of `OBJECTIVES`, or `AUTO_LOSS`. Where there is but the model's own classifier, a loss that looks
            at the layers' output gives way to the default.
        end: where it looks.
        seed: 0 <= seed < 2**63; torch's global generator is left as it was.

    Raises:
        ConfigError: unknown name.
    """
    check_objective_name(name)
    if name == AUTO_LOSS or (end.is_last and looks_at_output(name)):
        name = DEFAULTS[end.target.kind]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return OBJECTIVES[name].at(end)


def looks_at_output(name: str) -> bool:
    """Whether a loss computes something of the layers' output beside the head, which takes bytes and seconds."""
    return name != AUTO_LOSS and OBJECTIVES[name].looks_at_output


def check_objective(train: TrainConfig, target: TargetSpec) -> None:
    """Checks that a loss is there, and made for what is to be predicted.

    Raises:
        ConfigError: it is unknown, or for another kind of target, or labels of values are to be smoothed.
    """
    check_objective_name(train.loss)
    fitting = [AUTO_LOSS, *(name for name, kind in OBJECTIVES.items() if kind.kind == target.kind)]
    if train.loss not in fitting:
        what = f"train.loss: got {train.loss}, which is for {_plural(OBJECTIVES[train.loss].kind)}"
        fix = f"--set train.loss={' or '.join(fitting)}"
        raise ConfigError(f"{what}; the targets are {_plural(target.kind)}", fix)
    if train.label_smoothing and target.kind != "class":
        what = f"train.label_smoothing: got {train.label_smoothing:g}, which spreads labels over classes"
        raise ConfigError(f"{what}; the targets are {_plural(target.kind)}", "--set train.label_smoothing=0")


def check_objective_name(name: str) -> None:
    """Checks that there is such a loss.

    Raises:
        ConfigError: unknown name.
    """
    known = (AUTO_LOSS, *OBJECTIVES)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        fix = f"did you mean {' or '.join(near)}?" if near else f"one of {', '.join(known)}"
        raise ConfigError(f"train.loss: got {name!r}, unknown loss", fix)


def _plural(kind: TargetKind) -> str:
    return "classes" if kind == "class" else kind


def _precise(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _spreads(x: torch.Tensor) -> torch.Tensor:
    """Returns one number per channel where a map has places to spread over, all numbers elsewhere."""
    if x.dim() > 2 and x.shape[1] >= _FEWEST_SPREADS and x[0, 0].numel() > 1:
        return x.flatten(2).std(dim=2)
    return x.flatten(1)


def _pooled(*sides: int) -> tuple[int, ...]:
    while math.prod(sides) > LARGEST_MAP_PIXELS:
        sides = tuple((side + 1) // 2 for side in sides)
    return sides
