"""Trained units whose layers run again on every batch of a later block, in place of activations read from the store.

The profiler and the worker run this very code, so what it holds is predicted as exactly as the training step. Knows
nothing of where weights come from, or of whether computing is faster than reading. Entry class: `FrozenUnits`.
"""

from collections.abc import Iterable

import torch
from torch import nn

from nf_pipeline.core.local_unit import LocalUnit
from nf_pipeline.core.train_step import Precision, forward_block


class FrozenUnits(nn.Module):
    """The layers of trained units, in inference mode and without gradients; their heads stay behind.

    Args:
        units: in order; their layers are taken over, not copied, and train no more.
        precision: that they were trained with.
    """

    def __init__(self, units: Iterable[LocalUnit], precision: Precision) -> None:
        super().__init__()
        self.units = nn.ModuleList(without_head(unit) for unit in units)
        self._precision = precision
        self.requires_grad_(False).eval()

    def output(self, x_NCHW: torch.Tensor, sample_N: torch.Tensor | None = None) -> torch.Tensor:
        """Returns what float32 shards would hold of the last layer's output; see `forward_block`.

        The batch stays alive until the last layer is done, in the prediction as in the worker.
        """
        return forward_block(self.units, x_NCHW, self._precision, with_heads=False, sample_N=sample_N)[0].float()


def without_head(unit: LocalUnit) -> LocalUnit:
    """Returns a unit of the same layers and context, not copied, that classifies nothing."""
    return LocalUnit(unit.layers, nn.Identity(), context=unit.context)
