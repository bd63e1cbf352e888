"""The final model with the exits before its own: a sample leaves at the first one that is sure enough.

What has left is computed no further: the batch shrinks from exit to exit. Where nobody may leave, a head is not run.
Knows nothing of files, nor of how operating points are found. Entries: `EarlyExitModel`, `all_logits`.

Shapes: N batch, C channels, H, W, K classes.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from nf_pipeline.core.early_exits import OperatingPoint, best_within, cheapest_with
from nf_pipeline.core.exit_model import ExitModel, ExitSpec
from nf_pipeline.core.heads import build_head, head_site
from nf_pipeline.core.layers import cut
from nf_pipeline.core.layout import laid_out
from nf_pipeline.core.models import build_model
from nf_pipeline.errors import ConfigError


class Exited(NamedTuple):
    """What came out of a batch.

    Attributes:
        logits_NK: of the exit at which each sample left, divided by its temperature: their softmax says how often
            the prediction is right.
        exit_N: int64, positions in the model's exits.
    """

    logits_NK: torch.Tensor
    exit_N: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class EarlyExitPlan:
    """How samples leave.

    Attributes:
        temperatures: that each exit's logits are divided by, the last one's included.
        points: operating points to choose from, cheapest first, see `find_points`.
        val_accuracy: of the last exit alone, on the samples that the points were found on.
    """

    temperatures: tuple[float, ...]
    points: tuple[OperatingPoint, ...]
    val_accuracy: float

    @property
    def default(self) -> OperatingPoint:
        """The cheapest point that is as accurate as the last exit alone."""
        return cheapest_with(self.points, self.val_accuracy) or self.points[-1]

    def check(self) -> None:
        """Checks what a model computes with.

        Raises:
            ValueError: no exit, no point, a temperature that is not above 0, or an exit that is not there.
        """
        last = len(self.temperatures) - 1
        if not self.points or not all(0 < temperature < float("inf") for temperature in self.temperatures):
            raise ValueError(f"points, temperatures: got {len(self.points)} points, {self.temperatures}")
        for point in self.points:
            if list(point.exits) != sorted(set(point.exits) & set(range(last))):
                raise ValueError(f"points: exits {point.exits} are not in order, or not among the first {last}")


class EarlyExitModel(nn.Module):
    """Samples as they are stored, such as pixels_NCHW (0 to 255) -> `Exited`. In inference mode.

    Until told otherwise it is as accurate on the validation split as its last exit alone, or more, at the lowest cost
    found; `with_accuracy` and `with_flops` give other compromises. Its layers are shared with them and with `final`,
    not copied.

    Attributes:
        final: the model that ends at the last exit.
        point: which samples leave where.
        points: all that there are to choose from.

    Args:
        heads: of the exits before the last.
        stops: layers before each of these exits, ascending, fewer than `final` has.
        plan: temperatures and operating points.
    """

    def __init__(
        self,
        final: ExitModel,
        heads: Sequence[nn.Module],
        stops: Sequence[int],
        plan: EarlyExitPlan,
    ) -> None:
        super().__init__()
        self.final = final
        self.heads = nn.ModuleList(heads)
        self.point = plan.default
        self.points = plan.points
        self._stops = (*stops, len(final.layers))
        self._plan = plan
        self.eval()

    @property
    def num_exits(self) -> int:
        """The last one included."""
        return len(self._stops)

    @torch.no_grad()
    def forward(self, pixels_NCHW: torch.Tensor) -> Exited:
        """Classifies a batch; what is sure leaves early."""
        x_NCHW = self.final.normalise(pixels_NCHW)
        sample_N = self.final.seen_later(x_NCHW)
        rest_N = torch.arange(len(x_NCHW), device=x_NCHW.device)
        exit_N = torch.full_like(rest_N, self.num_exits - 1)
        parts: list[tuple[torch.Tensor, torch.Tensor]] = []
        for exit_idx, stop, following in self._legs():
            x_NCHW = self.final.run_layers(x_NCHW, stop, following, sample_N)
            logits_NK = self._logits(x_NCHW, exit_idx)
            leaves_N = self._leaves(logits_NK, exit_idx)
            exit_N[rest_N[leaves_N]] = exit_idx
            parts.append((rest_N[leaves_N], logits_NK[leaves_N]))
            x_NCHW, rest_N = x_NCHW[~leaves_N], rest_N[~leaves_N]
            sample_N = None if sample_N is None else sample_N[~leaves_N]
            if len(rest_N) == 0:
                break
        places_N, logits_NK = (torch.cat(column) for column in zip(*parts, strict=True))
        return Exited(logits_NK[places_N.argsort()], exit_N)

    def with_accuracy(self, accuracy: float) -> "EarlyExitModel":
        """Returns the model at the cheapest operating point with an accuracy on the validation split.

        Args:
            accuracy: in [0, 1], at least.

        Raises:
            ConfigError: no point has it.
        """
        most = max(point.val_accuracy for point in self.points)
        want = f"accuracy: got {accuracy:g}, the most accurate operating point has {most:.4f} on validation"
        return self._at(cheapest_with(self.points, accuracy), want, "ask for less, or train on")

    def with_flops(self, flops: float) -> "EarlyExitModel":
        """Returns the model at the most accurate operating point with a mean cost per sample.

        Args:
            flops: of one sample's forward pass on average over the validation split, at most.

        Raises:
            ConfigError: no point is so cheap.
        """
        least = min(point.val_flops for point in self.points)
        want = f"flops: got {flops:g}, the cheapest operating point takes {least:.0f} per sample"
        return self._at(best_within(self.points, flops), want, "allow more")

    def _at(self, point: OperatingPoint | None, want: str, fix: str) -> "EarlyExitModel":
        if point is None:
            raise ConfigError(want, fix)
        other = copy.copy(self)  # which shares everything
        other.point = point
        return other

    def _legs(self) -> list[tuple[int, int, int]]:
        """Lists the exits that are tried: position, first layer after the exit before it, and the layers up to it."""
        tried = [*self.point.exits, self.num_exits - 1]
        stops = [self._stops[exit_idx] for exit_idx in tried]
        return list(zip(tried, [0, *stops], stops, strict=False))

    def _logits(self, x_NCHW: torch.Tensor, exit_idx: int) -> torch.Tensor:
        is_last = exit_idx == self.num_exits - 1
        logits_NK = self.final.run_head(x_NCHW) if is_last else self.heads[exit_idx](laid_out(x_NCHW))
        return logits_NK / self._plan.temperatures[exit_idx]

    def _leaves(self, logits_NK: torch.Tensor, exit_idx: int) -> torch.Tensor:
        if exit_idx == self.num_exits - 1:
            return torch.ones(len(logits_NK), dtype=torch.bool, device=logits_NK.device)
        return confidence(logits_NK) >= self.point.threshold


@torch.no_grad()
def all_logits(
    final: ExitModel, heads: Sequence[nn.Module], stops: Sequence[int], pixels_NCHW: torch.Tensor
) -> list[torch.Tensor]:
    """Returns the logits_NK of every exit, not divided by any temperature, or standardised values; nobody leaves.

    Args:
        final, heads, stops: see `EarlyExitModel`.
    """
    x_NCHW, found = final.normalise(pixels_NCHW), []
    sample_N = final.seen_later(x_NCHW)
    for head, start, stop in zip(heads, (0, *stops), stops, strict=False):
        x_NCHW = final.run_layers(x_NCHW, start, stop, sample_N)
        found.append(head(laid_out(x_NCHW)))
    x_NCHW = final.run_layers(x_NCHW, stops[-1] if stops else 0, len(final.layers), sample_N)
    return [*found, final.run_head(x_NCHW)]


def build_early_heads(spec: ExitSpec, exits: Sequence[tuple[int, str]]) -> list[nn.Module]:
    """Builds the heads before the last with fresh weights, in inference mode, ready for their own.

    Args:
        spec: of the final model.
        exits: layers before each of them, fewer than the model has, and its head's name.

    Raises:
        ConfigError: the model cannot be built or cut, or a head is unknown.
    """
    model = build_model(spec.model, inputs=spec.inputs, num_outputs=spec.target.size, seed=0)
    shapes = cut(model, spec.inputs).out_shapes
    sites = [head_site(shapes, num_layers - 1, spec.target.size) for num_layers, _ in exits]
    return [build_head(name, site, seed=0).eval() for site, (_, name) in zip(sites, exits, strict=True)]


def confidence(logits_NK: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Returns the probability of the likeliest class, [N]."""
    return (logits_NK / temperature).softmax(dim=1).amax(dim=1)
