"""What the planner's choice costs beside the best baseline: the question of a budget in one line.

Baselines train their whole schedule, the pipeline that of every block, unless deeper exits stop to improve; what
either is worth is in the other tables. A baseline that was given up is no candidate: backpropagation is. Precision
and settings are the same: bf16, and settings of its own, are open to every method. Pure. Entry: `compare_choices`.
"""

import statistics
from collections.abc import Sequence
from typing import Any

from nf_pipeline.bench.curves import spread_of
from nf_pipeline.bench.methods import method_named

Document = dict[str, Any]

OWN = "nf"


def compare_choices(own: Sequence[Document]) -> list[Document]:
    """Compares the default pipeline with the baseline whose whole schedule is the shortest.

    Args:
        own: documents of a model's trainings.

    Returns:
        One per budget at which the pipeline trains, smallest first. Spreads are [median, smallest, largest] over
        seeds; what concerns a baseline is None where none trains.
    """
    done = [document for document in own if document["status"] == "done"]
    budgets = sorted({d["cell"]["budget_bytes"] for d in done if d["cell"]["method"] == OWN})
    return [_choice(budget, [d for d in done if d["cell"]["budget_bytes"] == budget]) for budget in budgets]


def _choice(budget: int, here: Sequence[Document]) -> Document:
    runs = {document["cell"]["seed"]: document for document in here if document["cell"]["method"] == OWN}
    rival, rivals = _fastest(here)
    pairs = [(runs[seed], rivals[seed]) for seed in sorted(runs) if seed in rivals]
    return {
        "budget_bytes": budget,
        "baseline": rival,
        "baseline_s": spread_of([other["train_s"] for _, other in pairs]),
        "seconds": spread_of([run["train_s"] for run in runs.values()]),
        "planning_s": spread_of([_planning_s(run) for run in runs.values()]),
        "ratio": spread_of([run["train_s"] / other["train_s"] for run, other in pairs]),
        "ratio_without_planning": spread_of(
            [(run["train_s"] - _planning_s(run)) / other["train_s"] for run, other in pairs]
        ),
        "predicted_over_measured_s": spread_of([_predicted_share(run) for run in runs.values()]),
        "predicted_over_measured_peak": spread_of(
            [run["predicted_peak_bytes"] / run["measured_peak_bytes"] for run in runs.values()]
        ),
        "num_blocks": [len(run["plan"]["layers"]) for run in runs.values()],
    }


def _fastest(here: Sequence[Document]) -> tuple[str | None, dict[int, Document]]:
    """Returns the fp32 baseline with the shortest whole schedule, and its documents by seed."""
    by_method: dict[str, dict[int, Document]] = {}
    for document in here:
        method = method_named(document["cell"]["method"])
        if method.family != "pipeline" and method.precision == "fp32" and not method.changes:
            by_method.setdefault(document["cell"]["method"], {})[document["cell"]["seed"]] = document
    if not by_method:
        return None, {}
    name = min(by_method, key=lambda name: statistics.median(d["train_s"] for d in by_method[name].values()))
    return name, by_method[name]


def _planning_s(run: Document) -> float:
    return run["parts"]["profiling and planning"]


def _predicted_share(run: Document) -> float | None:
    predicted = run["plan"]["predicted_s"]
    return None if predicted is None else predicted / run["plan"]["measured_s"]
