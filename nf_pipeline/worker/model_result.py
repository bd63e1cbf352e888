"""What the last stage found, as the document that summary.json and the model card are made of.

Computes what of it is arithmetic. Entry: `describe_result`.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from nf_pipeline.core.calibration import confidence_error
from nf_pipeline.core.early_exit_model import EarlyExitPlan
from nf_pipeline.core.early_exits import ExitCosts, measure_point
from nf_pipeline.core.exits import ExitCandidate, ExitRule, wilson_interval
from nf_pipeline.core.optimism import choice_optimism
from nf_pipeline.worker.choice import CommittedChoice
from nf_pipeline.worker.exit_pass import Scores
from nf_pipeline.worker.tasks import AssembleTask


def describe_result(
    task: AssembleTask,
    exits: Sequence[ExitCandidate],
    costs: ExitCosts,
    made: CommittedChoice,
    scores: Scores | None,
) -> dict[str, Any]:
    """Returns the facts of the stage but for the final model's parameters.

    `exits`, `chosen_exit`, `chosen_reason`, `val_accuracy`, `test_accuracy` and `params_full` stand for themselves.
    `val_optimism` is how much the choice makes the validation accuracy look better on average,
    `val_accuracy_corrected` what is left of it, `val_interval_corrected` an interval that holds whichever exit is
    chosen. `test_interval` is Wilson's, `test_reads` for how many choices the test split was looked at.
    `calibration` has the temperature and what it changed, on validation and test; `early_exits` the exits that are
    kept before the chosen one, None if none are, with the accuracy and cost of every operating point.

    Args:
        costs: of all exits.
        made: the committed choice.
        scores: of the exits that are kept on the test split; None without one.
    """
    choice, confidence = made.choice, task.config.exits.confidence
    one = exits[choice.chosen_exit]
    rule = ExitRule(tolerance_points=task.config.exits.tolerance, confidence=confidence)
    optimism = choice_optimism(exits, rule)
    return {
        "exits": [_exit(candidate, confidence) for candidate in exits],
        "chosen_exit": choice.chosen_exit,
        "chosen_reason": choice.reason,
        "val_accuracy": one.val_accuracy,
        "val_optimism": optimism,
        "val_accuracy_corrected": min(1.0, max(0.0, one.val_accuracy - optimism)),
        "val_interval_corrected": list(one.interval_among(len(exits), confidence)),
        **_test(scores, confidence),
        "test_reads": 0 if scores is None else made.num_test_reads,
        "calibration": {**asdict(choice.calibration), **_test_calibration(scores)},
        "early_exits": _early_exits(choice.early_exits, exits, costs, scores),
        "params_full": task.plan.params_full,
    }


def _exit(candidate: ExitCandidate, confidence: float) -> dict[str, Any]:
    return {
        "layer_idx": candidate.layer_idx,
        "layer": candidate.layer,
        "val_accuracy": candidate.val_accuracy,
        "val_interval": list(candidate.interval(confidence)),
        "params": candidate.params,
        "flops": candidate.flops,
    }


def _test(scores: Scores | None, confidence: float) -> dict[str, Any]:
    if scores is None:
        return {"test_accuracy": None, "test_interval": None}
    right_N = scores.right_EN[-1]
    num_right, num_test = int(right_N.sum()), len(right_N)
    interval = list(wilson_interval(num_right, num_test, confidence))
    return {"test_accuracy": num_right / num_test, "test_interval": interval}


def _test_calibration(scores: Scores | None) -> dict[str, Any]:
    if scores is None:
        return {"test_ece_before": None, "test_ece_after": None}
    right_N = torch.from_numpy(scores.right_EN[-1])
    before, after = torch.from_numpy(scores.unscaled_N), torch.from_numpy(scores.confidence_EN[-1])
    return {"test_ece_before": confidence_error(before, right_N), "test_ece_after": confidence_error(after, right_N)}


def _early_exits(
    plan: EarlyExitPlan | None, exits: Sequence[ExitCandidate], costs: ExitCosts, scores: Scores | None
) -> dict[str, Any] | None:
    if plan is None:
        return None
    kept = len(plan.temperatures)
    costs = ExitCosts(layers=costs.layers[:kept], heads=costs.heads[:kept])
    points = []
    for point in plan.points:
        test = (None, None)
        if scores is not None:
            test = measure_point(scores.confidence_EN, scores.right_EN, costs, point.exits, point.threshold)
        points.append({**asdict(point), "test_accuracy": test[0], "test_flops": test[1]})
    kept_exits = zip(exits, plan.temperatures, strict=False)
    return {
        "exits": [{"layer_idx": one.layer_idx, "layer": one.layer, "temperature": t} for one, t in kept_exits],
        "points": points,
        "default_point": plan.points.index(plan.default),
        "val_accuracy": plan.val_accuracy,
        "flops": exits[kept - 1].flops,
    }
