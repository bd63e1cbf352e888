"""Everything that the validation split decides: the exit, its temperature, and who may leave before it.

The exit itself needs no forward pass: every block noted which validation samples its heads got right. Temperatures
and thresholds need one over the validation split. Reads no test labels. Entries: `list_exits`, `calibrated`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from nf_pipeline.core.calibration import Calibration, calibrate, fit_temperature
from nf_pipeline.core.early_exit_model import EarlyExitPlan, confidence
from nf_pipeline.core.early_exits import ExitCosts, find_points
from nf_pipeline.core.exits import ExitCandidate
from nf_pipeline.core.hits import hits_from_text
from nf_pipeline.errors import Diverged, ObjectCorrupt
from nf_pipeline.plans import Plan


def list_exits(plan: Plan, block_facts: Sequence[Mapping[str, Any]]) -> list[ExitCandidate]:
    """Turns what the trained blocks found into one candidate per unit, shallowest first.

    Parameters and FLOPs are those of the model that ends at the exit, its head included.

    Raises:
        ObjectCorrupt: a block does not say which samples its exits got right.
    """
    num_val = block_facts[0]["num_val"]
    try:
        hits = [hits_from_text(text, num_val) for facts in block_facts for text in facts["val_hits"]]
    except ValueError as error:
        raise ObjectCorrupt(f"a block's manifest is damaged: facts.val_hits: {error}") from None
    costs = exit_costs(plan, len(hits))
    return [
        ExitCandidate(
            layer_idx=unit.stop - 1,
            layer=plan.layers[unit.stop - 1].name,
            hits=one,
            num_val=num_val,
            params=sum(layer.params for layer in plan.layers[: unit.stop]) + unit.head_params,
            flops=layers_flops + head_flops,
        )
        for unit, one, layers_flops, head_flops in zip(plan.units, hits, costs.layers, costs.heads, strict=False)
    ]


def exit_costs(plan: Plan, num_exits: int) -> ExitCosts:
    """Returns the FLOPs of the first exits of a plan."""
    units = plan.units[:num_exits]
    return ExitCosts(
        layers=tuple(sum(layer.flops for layer in plan.layers[: unit.stop]) for unit in units),
        heads=tuple(unit.head_flops for unit in units),
    )


def calibrated(stage: str, logits_NK: torch.Tensor, labels_N: torch.Tensor) -> Calibration:
    """Fits the temperature of the chosen exit.

    Raises:
        Diverged: it returns what is no number.
    """
    try:
        return calibrate(logits_NK, labels_N)
    except ValueError as error:
        raise Diverged(stage, f"the final model cannot be calibrated: {error}", "lower train.lr") from None


def plan_early_exits(
    logits: Sequence[torch.Tensor], labels_N: torch.Tensor, costs: ExitCosts, temperature: float
) -> EarlyExitPlan:
    """Fits a temperature for each exit before the last and finds the operating points.

    Args:
        logits: logits_NK of every exit.
        labels_N: of the same samples.
        costs: of the exits.
        temperature: of the last one.
    """
    temperatures = (*(_temperature(logits_NK, labels_N) for logits_NK in logits[:-1]), temperature)
    sure = [confidence(one, scale) for one, scale in zip(logits, temperatures, strict=True)]
    confidence_EN = torch.stack(sure).numpy()
    right_EN = torch.stack([one.argmax(dim=1) == labels_N for one in logits]).numpy()
    return EarlyExitPlan(
        temperatures=temperatures,
        points=find_points(np.nan_to_num(confidence_EN), right_EN, costs),
        val_accuracy=float(right_EN[-1].mean()),
    )


def _temperature(logits_NK: torch.Tensor, labels_N: torch.Tensor) -> float:
    # An exit that returns what is no number is never sure: nobody leaves there.
    return fit_temperature(logits_NK, labels_N) if bool(logits_NK.isfinite().all()) else 1.0
