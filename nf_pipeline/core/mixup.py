"""Mixes the samples of a batch in pairs, inputs and labels alike, whatever the block reads: images or activations.

After H. Zhang et al., "mixup: Beyond Empirical Risk Minimization" (ICLR 2018, https://arxiv.org/abs/1710.09412); one
share for the whole batch, as in the authors' code. Draws from torch's global generator of the CPU, which a worker
seeds from (seed, block, epoch) and its place in its gang: each member mixes its own part of the batch. Knows nothing
of losses beyond the labels they take. Entry: `draw_mix`.

Shapes: N batch, C channels, H, W.
"""

from dataclasses import dataclass

import torch

from nf_pipeline.core.objectives import Labels


@dataclass(frozen=True, kw_only=True)
class Mix:
    """Who is mixed with whom.

    Attributes:
        order_N: int64 permutation on the inputs' device; sample i is mixed with sample order_N[i].
        share: of sample i, 0 to 1.
    """

    order_N: torch.Tensor
    share: float

    def inputs(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        """Returns the mixed inputs; for a moment both batches are held."""
        other_NCHW = x_NCHW[self.order_N]
        return other_NCHW.lerp_(x_NCHW, self.share)

    def labels(self, y_N: torch.Tensor) -> Labels:
        """Returns both labels of every sample."""
        return Labels(y_N=y_N, other_N=y_N[self.order_N], share=self.share)


def draw_mix(alpha: float, batch_size: int, device: torch.device) -> Mix | None:
    """Draws a permutation, and a share from Beta(alpha, alpha); None, and nothing drawn, where `alpha` is 0."""
    if alpha == 0.0:
        return None
    share = float(torch.distributions.Beta(alpha, alpha).sample())
    return Mix(order_N=torch.randperm(batch_size).to(device), share=share)


def any_mix(alpha: float, batch_size: int, device: torch.device) -> Mix | None:
    """Returns a mix that takes the bytes of a drawn one, without drawing; None where `alpha` is 0."""
    return Mix(order_N=torch.arange(batch_size, device=device), share=0.5) if alpha else None
