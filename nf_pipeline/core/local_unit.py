"""A unit: consecutive layers that train together by backpropagation, with one head at their end.

Knows nothing of optimisers, batches or blocks. Entry: `build_units`.
"""

from collections.abc import Sequence

import torch
from torch import nn

from nf_pipeline.core.heads import build_head
from nf_pipeline.core.layers import CutModel

# Spreads (seed, unit) over seeds so that no two units of neighbouring seeds draw the same head.
_SEED_STEP = 1_000_003


class LocalUnit(nn.Module):
    """x_NCHW -> (out_NCHW, logits_NK): layers, and a head on what they return.

    Names in the state dict: `layers.0. ...` counted from the unit's first layer, and `head. ...`.
    """

    def __init__(self, layers: Sequence[nn.Module], head: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.head = head

    def forward(self, x_NCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the next unit's input (still attached to the graph) and the head's logits."""
        out_NCHW = self.layers(x_NCHW)
        return out_NCHW, self.head(out_NCHW)


def unit_ranges(num_layers: int, unit_layers: int) -> list[tuple[int, int]]:
    """Splits layers into half-open ranges of `unit_layers`; the last may be shorter.

    Example: unit_ranges(8, 3) == [(0, 3), (3, 6), (6, 8)].
    """
    return [(start, min(start + unit_layers, num_layers)) for start in range(0, num_layers, unit_layers)]


def build_units(
    cut_model: CutModel,
    head_name: str,
    unit_layers: int,
    num_classes: int,
    seed: int,
    units: range | None = None,
) -> list[LocalUnit]:
    """Wraps a cut model's layers into units; the layers are shared with the model, not copied.

    The last unit's head is the model's own classifier. The others' weights depend on (seed, position) only: a
    worker that builds one block gets what a worker that builds all gets.

    Args:
        units: positions to build; None builds all.

    Raises:
        ConfigError: unknown head, or a layer whose output is no map of features.
    """
    ranges = unit_ranges(len(cut_model.layers), unit_layers)
    built = []
    for unit_idx in units if units is not None else range(len(ranges)):
        start, stop = ranges[unit_idx]
        if unit_idx == len(ranges) - 1:
            head = cut_model.tail
        else:
            head_seed = seed * _SEED_STEP + unit_idx
            head = build_head(head_name, cut_model.out_shapes[stop - 1], num_classes, head_seed)
        built.append(LocalUnit(cut_model.layers[start:stop], head))
    return built
