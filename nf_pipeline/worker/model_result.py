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
from nf_pipeline.core.exits import ExitCandidate, ExitRule
from nf_pipeline.core.optimism import choice_optimism
from nf_pipeline.worker.choice import CommittedChoice
from nf_pipeline.worker.exit_pass import LookAtTest, Scores
from nf_pipeline.worker.tasks import AssembleTask

INTERVAL_NAMES = {"accuracy": "interval", "error": "error_interval"}
"""What the interval around a mean, which is called after its metric, is called in the document, by metric."""


def describe_result(
    task: AssembleTask,
    exits: Sequence[ExitCandidate],
    costs: ExitCosts,
    made: CommittedChoice,
    look: LookAtTest | None,
) -> dict[str, Any]:
    """Returns the facts of the stage but for the final model's parameters.

    `exits`, `chosen_exit`, `chosen_reason`, `val_accuracy`, `test_accuracy` and `params_full` stand for themselves.
    `metric` says whether exits are compared by accuracy or by error: what is named after the other one is None.
    `val_optimism` is how much better the choice makes validation look on average, `val_accuracy_corrected` or
    `val_error_corrected` what is left of it, `val_interval_corrected` or `val_error_interval_corrected` an interval
    that holds whichever exit is chosen. `test_reads` says for how many choices the test split was looked at.
    `calibration` has the temperature and what it changed, on validation and test, None where values are predicted;
    `early_exits` the exits that are kept before the chosen one, None if none are, with the accuracy and cost of every
    operating point.

    Args:
        costs: of all exits.
        made: the committed choice.
        look: at the test split; None without one.
    """
    choice, confidence = made.choice, task.config.exits.confidence
    one, scores = exits[choice.chosen_exit], look.scores if look is not None else None
    rule = ExitRule(tolerance=task.config.exits.tolerance, confidence=confidence)
    optimism, metric = choice_optimism(exits, rule), one.results.metric
    corrected = min(one.results.most, max(0.0, one.results.mean - one.results.sign * optimism))
    return {
        "metric": metric,
        "exits": [_exit(candidate, confidence) for candidate in exits],
        "chosen_exit": choice.chosen_exit,
        "chosen_reason": choice.reason,
        **_mean(metric, "val_{}", one.results.mean),
        "val_optimism": optimism,
        **_mean(metric, "val_{}_corrected", corrected),
        **_interval(metric, "val_{}_corrected", one.interval_among(len(exits), confidence)),
        **_test(metric, look, confidence),
        "test_reads": 0 if look is None else made.num_test_reads,
        "calibration": choice.calibration and {**asdict(choice.calibration), **_test_calibration(scores)},
        "early_exits": _early_exits(choice.early_exits, exits, costs, scores),
        "params_full": task.plan.params_full,
    }


def _exit(candidate: ExitCandidate, confidence: float) -> dict[str, Any]:
    metric = candidate.results.metric
    return {
        "layer_idx": candidate.layer_idx,
        "layer": candidate.layer,
        **_mean(metric, "val_{}", candidate.results.mean),
        **_interval(metric, "val_{}", candidate.interval(confidence)),
        "params": candidate.params,
        "flops": candidate.flops,
    }


def _test(metric: str, look: LookAtTest | None, confidence: float) -> dict[str, Any]:
    mean = interval = None
    if look is not None:
        mean, interval = look.results.mean, look.results.interval(confidence)
    return {**_mean(metric, "test_{}", mean), **_interval(metric, "test_{}", interval)}


def _mean(metric: str, key: str, mean: float | None) -> dict[str, float | None]:
    """Stores a mean under the name of its metric, and None under those of the others."""
    return {key.format(which): mean if which == metric else None for which in INTERVAL_NAMES}


def _interval(metric: str, key: str, interval: tuple[float, float] | None) -> dict[str, list[float] | None]:
    """The same of the interval around it."""
    found = None if interval is None else list(interval)
    return {key.format(name): found if which == metric else None for which, name in INTERVAL_NAMES.items()}


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
