"""What a unit is trained for: its loss, by name, with the weights that only training needs.

One table, name -> constructor; a new loss is one more class, which says what kind of target it is for. Similarities
are those of the samples that one worker holds: the members of a gang each match their own part of the batch. Knows
nothing of layers, optimisers and of how batches are mixed. Entries: `build_objective`, `check_objective`.

Shapes: N batch, C channels, K outputs (a score per class, or each value), F features; "..." stands for the sides of
a map, from none of a vector to three of a volume.
"""

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Final, Self

import torch
from torch import nn
from torch.nn import functional

from nf_pipeline.config import TrainConfig
from nf_pipeline.core.dtypes import precise
from nf_pipeline.core.reconstruction import Decoder, squared_error
from nf_pipeline.core.similarity import Similarities, similarities
from nf_pipeline.errors import ConfigError
from nf_pipeline.near_names import did_you_mean
from nf_pipeline.samples import InputSpec, TargetKind, TargetSpec

AUTO_LOSS: Final = "auto"
"""Value of `train.loss` that leaves it to the kind of target: `DEFAULTS`."""

SIMILARITY_SHARE = 0.99
"""Part of the similarities in `predsim`; the rest is cross-entropy (Nokland and Eidnes 2019, section 3.3)."""

GAIN = 4.0
"""Factor of `predsim` as a whole: from the second unit on, gradients of similarities were measured to be a quarter to
two thirds of cross-entropy's, and the authors' optimiser made up for that. [ours]"""

WORST_MATCHING = 4.0
"""The mean squared error of similarities, all between -1 and 1, is never larger."""

STRONGEST = 1.25
"""Weight of the reconstruction error in `infopro` at the first unit, beside a cross-entropy of weight 1; it falls to
0 at the last one. The authors take 5 to 0 for the cross-entropy of pixels between 0 and 1, beside 0.5 (CIFAR-10).
Near a pixel that one grows by about 2 (p - x)^2, which is an eighth of the squared error of standardised pixels,
whose standard deviation is about a quarter of their range: 5 / 8 beside 0.5. [ours]"""


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
        inputs: the network's own sample; None where it is not known, as in units that only run.
        depth: where the unit stands among those that have an auxiliary head: 0 the first, 1 the last of them.
    """

    out_shape: tuple[int, ...]
    target: TargetSpec
    label_smoothing: float = 0.0
    is_last: bool = False
    inputs: InputSpec | None = None
    depth: float = 0.0


class Objective(nn.Module):
    """A loss. A module for the weights that some losses have, not to be called.

    Args:
        on_output: what the loss computes of the layers' output beside the head; it has what weights it has.
    """

    kind: ClassVar[TargetKind]
    """What kind of target it is for."""
    looks_at_output: ClassVar[bool] = False
    """Whether a loss of this class has an `on_output`."""
    looks_at_sample: ClassVar[bool] = False
    """Whether a loss of this class is given the network's own samples, which blocks then store."""

    def __init__(self, on_output: nn.Module | None = None) -> None:
        super().__init__()
        self.on_output = on_output

    @classmethod
    @abstractmethod
    def at(cls, end: UnitEnd) -> Self:
        """Returns a loss that looks there, with new weights if it has any."""

    @abstractmethod
    def loss(
        self,
        out: torch.Tensor,
        outputs_NK: torch.Tensor,
        labels: Labels,
        sample_N: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Returns a scalar.

        Args:
            out: of the layers, [N, C, ...].
            outputs_NK: of the head.
            labels: what the head should return.
            sample_N: the network's own input for the batch, mixed where the batch is; read where the loss
                `looks_at_sample`.
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

    def loss(
        self,
        out: torch.Tensor,
        outputs_NK: torch.Tensor,
        labels: Labels,
        sample_N: torch.Tensor | None = None,
    ) -> torch.Tensor:
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

    def loss(
        self,
        out: torch.Tensor,
        outputs_NK: torch.Tensor,
        labels: Labels,
        sample_N: torch.Tensor | None = None,
    ) -> torch.Tensor:
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


class InfoPro(CrossEntropy):
    """Cross-entropy + weight x the error of the samples as a small decoder makes them again of the layers' output.

    What the layers throw away no later unit gets back, and the first ones cannot know what those need: they keep what
    is left of the sample. After Y. Wang et al., "Revisiting Locally Supervised Learning: an Alternative to End-to-end
    Training" (ICLR 2021, https://arxiv.org/abs/2101.10832). The weight falls from `STRONGEST` at the first unit to 0
    at the last one that has an auxiliary head, which needs no decoder. The error is squared, since samples are any
    numbers, where the authors take the cross-entropy of pixels. [ours]

    Args:
        label_smoothing: see `UnitEnd`.
        decoder: of the layers' output; None where the weight is 0.
        weight: of the error.
    """

    looks_at_output = True
    looks_at_sample = True

    def __init__(self, label_smoothing: float, decoder: Decoder | None, weight: float) -> None:
        super().__init__(label_smoothing, decoder)
        self.weight = weight

    @classmethod
    def at(cls, end: UnitEnd) -> Self:
        """See `Objective.at`.

        Raises:
            ValueError: the samples are not known.
        """
        if end.inputs is None:
            raise ValueError("inputs: got none, want what a sample is, which this loss is to make again")
        weight = STRONGEST * (1.0 - end.depth)
        return cls(end.label_smoothing, Decoder(end.out_shape, end.inputs.shape) if weight else None, weight)

    def loss(
        self,
        out: torch.Tensor,
        outputs_NK: torch.Tensor,
        labels: Labels,
        sample_N: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `Objective.loss`.

        Raises:
            ValueError: there are no samples.
        """
        cross_entropy = super().loss(out, outputs_NK, labels)
        if self.on_output is None:
            return cross_entropy
        if sample_N is None:
            raise ValueError("sample_N: got none, want the samples of the batch")
        return cross_entropy + self.weight * squared_error(self.on_output(out), sample_N)

    def limit(self, num_outputs: int, times_chance: float) -> float:
        """See `Objective.limit`; squared, like the error: a rare number far out in a sample is no divergence."""
        return super().limit(num_outputs, times_chance) + self.weight * times_chance**2


class _OfValues(Objective):
    """A loss of the residuals between the head's outputs and standardised values, in float32."""

    kind = "values"

    @classmethod
    def at(cls, end: UnitEnd) -> Self:
        """See `Objective.at`."""
        return cls()

    def loss(
        self,
        out: torch.Tensor,
        outputs_NK: torch.Tensor,
        labels: Labels,
        sample_N: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `Objective.loss`; the mean over samples and values."""
        return labels.mean(lambda y_NK: self.of_residuals(precise(outputs_NK) - y_NK))

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


OBJECTIVES: dict[str, type[Objective]] = {
    "cross_entropy": CrossEntropy,
    "predsim": PredSim,
    "infopro": InfoPro,
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


def looks_at_sample(name: str) -> bool:
    """Whether a loss is given the network's own samples, which blocks then store beside activations."""
    return name != AUTO_LOSS and OBJECTIVES[name].looks_at_sample


def check_objective(train: TrainConfig, target: TargetSpec, inputs: InputSpec) -> None:
    """Checks that a loss is there, and made for what is to be predicted, from such samples.

    Raises:
        ConfigError: it is unknown, or for another kind of target, or makes samples again that are tokens, or labels
            of values are to be smoothed.
    """
    check_objective_name(train.loss)
    fitting = [AUTO_LOSS, *(name for name, kind in OBJECTIVES.items() if kind.kind == target.kind)]
    if train.loss not in fitting:
        what = f"train.loss: got {train.loss}, which is for {_plural(OBJECTIVES[train.loss].kind)}"
        fix = f"--set train.loss={' or '.join(fitting)}"
        raise ConfigError(f"{what}; the targets are {_plural(target.kind)}", fix)
    if looks_at_sample(train.loss) and inputs.num_tokens:
        others = [name for name in fitting if not looks_at_sample(name)]
        what = f"train.loss: got {train.loss}, which makes the samples again; tokens are no quantities"
        raise ConfigError(what, f"--set train.loss={' or '.join(others)}")
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
        raise ConfigError(f"train.loss: got {name!r}, unknown loss", did_you_mean(name, known))


def _plural(kind: TargetKind) -> str:
    return "classes" if kind == "class" else kind
