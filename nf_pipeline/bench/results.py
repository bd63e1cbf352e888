"""Puts the finished cells side by side: one row per model, budget and method, with medians over the seeds.

The target of a budget is the validation accuracy that plain backpropagation has at the end of its schedule there, or,
where it does not fit, at the smallest budget where it does. Pure: knows no files. Entry: `make_document`.
"""

import datetime
from collections.abc import Iterable, Sequence
from typing import Any

from nf_pipeline.bench.choices import compare_choices
from nf_pipeline.bench.curves import accuracy_at, spread_of, time_to
from nf_pipeline.bench.methods import REFERENCE, in_order
from nf_pipeline.bench.settings import BenchSettings

FORMAT_VERSION = 2
_MEDIANS = (
    "train_s",
    "cpu_s",
    "epoch_s",
    "images_per_s",
    "val_accuracy",
    "best_val_accuracy",
    "test_accuracy",
    "measured_peak_bytes",
    "predicted_peak_bytes",
    "stored_bytes",
    "read_bytes",
    "written_bytes",
    "params",
)

Document = dict[str, Any]


def make_document(settings: BenchSettings, machine: Document, finished: Sequence[Document]) -> Document:
    """Returns everything in one JSON document.

    Args:
        machine: see `describe_machine`.
        finished: documents of cells.
    """
    by_kind = {
        kind: [d for d in finished if d["cell"]["kind"] == kind] for kind in ("facts", "budgets", "search", "train")
    }
    order = in_order(document["cell"]["method"] for document in by_kind["train"])
    trained = sorted(by_kind["train"], key=lambda d: (d["cell"]["budget_bytes"], order.index(d["cell"]["method"])))
    return {
        "format_version": FORMAT_VERSION,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine,
        "settings": settings.public(),
        "models": [_model(document, by_kind["budgets"], trained) for document in by_kind["facts"]],
        "searches": by_kind["search"],
        "cells": trained,
    }


def _model(facts: Document, chosen: Iterable[Document], trained: Iterable[Document]) -> Document:
    name = facts["cell"]["model"]
    own = [document for document in trained if document["cell"]["model"] == name]
    named = [document["budgets"] for document in chosen if document["cell"]["model"] == name]
    budgets = sorted({document["cell"]["budget_bytes"] for document in own})
    return {
        "model": name,
        **{key: value for key, value in facts.items() if key not in ("cell", "status")},
        "budgets": named[0] if named else {},
        "rows": [row for budget in budgets for row in _rows(budget, own)],
        "choices": compare_choices(own),
    }


def _rows(budget: int, own: Sequence[Document]) -> list[Document]:
    here = [document for document in own if document["cell"]["budget_bytes"] == budget]
    methods = dict.fromkeys(document["cell"]["method"] for document in here)
    return [_row(budget, method, own) for method in methods]


def _row(budget: int, method: str, own: Sequence[Document]) -> Document:
    repeated = [d for d in own if d["cell"]["budget_bytes"] == budget and d["cell"]["method"] == method]
    first = repeated[0]
    row = {"budget_bytes": budget, "method": method, "status": first["status"], "num_seeds": len(repeated)}
    if first["status"] == "does not fit":
        return {**row, "needs": first["needs"], "needs_bytes": first["needs_bytes"]}
    row["epochs"] = [document["epochs"] for document in repeated if document["status"] == "given up"]
    done = [document for document in repeated if "curve" in document]
    targets = [target_of(document, own) for document in done]
    limits = [equal_time(document, own) for document in done]
    row |= {name: spread_of([document.get(name) for document in done]) for name in _MEDIANS}
    row |= {name: first.get(name) for name in ("lr", "batch_sizes", "micro_batch", "segment_layers", "exit_layer")}
    row["targets"] = targets
    row["equal_time_s"] = limits
    row["time_to_target_s"] = spread_of(
        [None if target is None else time_to(d["curve"], target) for d, target in zip(done, targets, strict=True)]
    )
    row["accuracy_after_equal_time"] = spread_of(
        [None if limit is None else accuracy_at(d["curve"], limit) for d, limit in zip(done, limits, strict=True)]
    )
    return row


def target_of(document: Document, own: Sequence[Document]) -> float | None:
    """Returns the accuracy that a training is to reach: backpropagation's, with the same seed."""
    reference = reference_for(document["cell"], own)
    return reference["val_accuracy"] if reference else None


def equal_time(document: Document, own: Sequence[Document]) -> float | None:
    """Returns the seconds after which the methods of a budget are compared: backpropagation's whole schedule."""
    reference = reference_for(document["cell"], own)
    return reference["train_s"] if reference else None


def reference_for(cell: Document, own: Sequence[Document]) -> Document | None:
    """Finds backpropagation with a cell's seed at the same budget, or at the smallest larger one where it trains.

    Args:
        cell: as it stands in its document.
        own: documents of the model.
    """
    trained = [
        other
        for other in own
        if (other["cell"]["kind"], other["cell"]["method"], other["cell"]["seed"])
        == ("train", REFERENCE, cell["seed"])
        and other["status"] == "done"
    ]
    same = [other for other in trained if other["cell"]["budget_bytes"] == cell["budget_bytes"]]
    larger = [other for other in trained if other["cell"]["budget_bytes"] > cell["budget_bytes"]]
    larger.sort(key=lambda other: other["cell"]["budget_bytes"])
    return (same or larger or [None])[0]
