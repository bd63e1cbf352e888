"""Everything that the validation split decides: the exit, its temperature, and who may leave before it.

The exit itself needs no forward pass: every block noted what its heads made of the validation samples. Temperatures
and thresholds, which only classes have, need one over the validation split. Reads no test labels. Entries:
`list_exits`, `calibrated`.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from nf_pipeline.core.calibration import Calibration, calibrate, fit_temperature
from nf_pipeline.core.early_exit_model import EarlyExitPlan, confidence
from nf_pipeline.core.early_exits import ExitCosts, find_points
from nf_pipeline.core.exits import ExitCandidate
from nf_pipeline.core.metrics import results_kind
from nf_pipeline.core.results import Results
from nf_pipeline.errors import Diverged, ObjectCorrupt
from nf_pipeline.plans import BlockPlan, Plan


def list_exits(plan: Plan, block_facts: Sequence[Mapping[str, Any]]) -> list[ExitCandidate]:
    """Turns what the trained blocks found into one candidate per unit, shallowest first.

    Parameters and FLOPs are those of the model that ends at the exit, its head and contexts included.

    Raises:
        ObjectCorrupt: a block does not say what its exits made of the samples; names it.
    """
    kind, num_val = results_kind(plan.target), block_facts[0]["num_val"]
    results = [
        one
        for block, facts in zip(plan.blocks, block_facts, strict=False)
        for one in _results(kind, block, facts, num_val)
    ]
    costs = exit_costs(plan, len(results))
    return [
        ExitCandidate(
            layer_idx=unit.stop - 1,
            layer=plan.layers[unit.stop - 1].name,
            results=one,
            params=_params(plan, unit_idx),
            flops=costs.layers[unit_idx] + costs.heads[unit_idx],
        )
        for unit_idx, (unit, one) in enumerate(zip(plan.units, results, strict=False))
    ]


def _params(plan: Plan, unit_idx: int) -> int:
    unit = plan.units[unit_idx]
    contexts = sum(one.context_params for one in plan.units[: unit_idx + 1])
    return sum(layer.params for layer in plan.layers[: unit.stop]) + contexts + unit.head_params


def _results(kind: type[Results], block: BlockPlan, facts: Mapping[str, Any], num_val: int) -> list[Results]:
    try:
        results = [kind.from_text(text, num_val) for text in facts[kind.sample_fact]]
    except ValueError as error:
        problem = str(error)
    else:
        num_exits = block.units[1] - block.units[0]
        if len(results) == num_exits:
            return results
        problem = f"got results of {len(results)} exits, want {num_exits}"
    what = f"the manifest of block-{block.block_idx:03d} is damaged: facts.{kind.sample_fact}: {problem}"
    raise ObjectCorrupt(what, fix="resume the run with --repair")


def exit_costs(plan: Plan, num_exits: int) -> ExitCosts:
    """Returns the FLOPs of the first exits of a plan."""
    units = plan.units[:num_exits]
    contexts = itertools.accumulate(unit.context_flops for unit in units)
    return ExitCosts(
        layers=tuple(
            sum(layer.flops for layer in plan.layers[: unit.stop]) + context
            for unit, context in zip(units, contexts, strict=True)
        ),
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
