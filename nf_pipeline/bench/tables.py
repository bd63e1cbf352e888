"""Renders the results as Markdown; decides nothing. Entry: `render_results`."""

from collections.abc import Sequence
from typing import Any

from nf_pipeline.bench.methods import REFERENCE, in_order, method_named
from nf_pipeline.bench.notes import explain
from nf_pipeline.bench.settings import short_name
from nf_pipeline.units import format_bytes

Document = dict[str, Any]
Row = Sequence[str]


def render_results(document: Document) -> str:
    """Returns the whole report.

    Args:
        document: see `nf_pipeline.bench.results.make_document`.
    """
    parts = [*explain(document)]
    for model in document["models"]:
        cells = [cell for cell in document["cells"] if cell["cell"]["model"] == model["model"]]
        searches = [search for search in document["searches"] if search["cell"]["model"] == model["model"]]
        parts += [
            f"## {short_name(model['model'])}",
            _model_text(model),
            "### Seconds to the accuracy that backpropagation reaches",
            time_table(model["rows"]),
            "### The planner's choice beside the best baseline, whole schedules",
            choice_table(model["choices"]),
            *(part for budget in _budgets(model) for part in _budget_part(model, budget)),
            "### Where the pipeline's seconds go, and what was predicted",
            _pipeline_table(cells),
            "### The final model beside the full network",
            _inference_table(cells),
            "### Learning rates tried",
            _search_table(searches),
        ]
    return "\n\n".join(part for part in parts if part) + "\n"


def markdown_table(titles: Row, rows: Sequence[Row]) -> str:
    """Formats a table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (titles, ["---"] * len(titles), *rows))


def time_table(rows: Sequence[Document]) -> str:
    """Formats the time to the target: a line per budget, a column per method."""
    methods = in_order(row["method"] for row in rows)
    budgets = sorted({row["budget_bytes"] for row in rows})
    at = {(row["budget_bytes"], row["method"]): row for row in rows}
    lines = []
    for budget in budgets:
        here = [at.get((budget, name)) for name in methods]
        targets = next((row["targets"] for row in here if row and row.get("targets")), [])
        shown = "-" if not targets or targets[0] is None else " ".join(f"{100 * target:.1f} %" for target in targets)
        lines.append([_size(budget), shown, *(_time_cell(row) for row in here), *_speed_ups(here)])
    titles = (*(method_named(name).title for name in methods), "faster than backprop", "than the best other")
    return markdown_table(["budget", "target", *titles], lines)


def choice_table(choices: Sequence[Document]) -> str:
    """Formats seconds and ratios of the pipeline to the baseline with the shortest schedule: a line per budget."""
    lines = [
        [
            _size(choice["budget_bytes"]),
            ", ".join(map(str, dict.fromkeys(choice["num_blocks"]))),
            _spread(choice["seconds"], "{:.1f}"),
            _spread(choice["planning_s"], "{:.1f}"),
            method_named(choice["baseline"]).title if choice["baseline"] else "none runs",
            _spread(choice["baseline_s"], "{:.1f}") or "-",
            _spread(choice["ratio"], "{:.2f}") or "-",
            _spread(choice["ratio_without_planning"], "{:.2f}") or "-",
            _spread(choice["predicted_over_measured_s"], "{:.2f}") or "-",
            _spread(choice["predicted_over_measured_peak"], "{:.3f}") or "-",
        ]
        for choice in choices
    ]
    titles = (
        *("budget", "blocks", "nf-pipeline s", "of it planning", "best baseline", "its s", "ratio"),
        *("ratio without planning", "predicted / measured s", "predicted / measured peak"),
    )
    return markdown_table(titles, lines) if lines else "Nothing yet."


def _speed_ups(rows: Sequence[Document | None]) -> Row:
    """Returns how many times faster this project's default is than plain backpropagation and the fastest other."""
    cannot_run = any(row and row["method"] == REFERENCE and row["status"] == "does not fit" for row in rows)
    seconds = {row["method"]: row["time_to_target_s"][0] for row in rows if row and row.get("time_to_target_s")}
    others = [value for name, value in seconds.items() if method_named(name).family != "pipeline"]
    compared = (seconds.get(REFERENCE), min(others, default=None))
    own = seconds.get("nf")
    shown = ["-" if other is None or not own else f"{other / own:.2f}x" for other in compared]
    return ["backprop cannot run", shown[1]] if cannot_run else shown


def _model_text(model: Document) -> str:
    rows = model["split_rows"]
    peaks = [f"{_size(peak)} at batch {size}" for size, peak in model.get("backprop_peaks", {}).items()]
    return (
        f"{model['params']:,} weights, {rows['train']:,} images to train, {rows['val']:,} to validate, "
        f"{rows.get('test', 0):,} to test." + (f" Backpropagation holds {', '.join(peaks)}." if peaks else "")
    )


def _budgets(model: Document) -> list[int]:
    return sorted({row["budget_bytes"] for row in model["rows"]})


def _budget_part(model: Document, budget: int) -> list[str]:
    rows = [row for row in model["rows"] if row["budget_bytes"] == budget]
    names = [name for name, num_bytes in model["budgets"].items() if num_bytes == budget]
    title = f"### {_size(budget)}" + (f" ({names[0]})" if names else "")
    return [title, _detail_table(rows)]


def _detail_table(rows: Sequence[Document]) -> str:
    titles = (
        *("method", "batch", "lr", "peak", "seconds", "to target", "at equal time", "val", "test"),
        *("s/epoch", "images/s", "stored", "read", "written", "parameters"),
    )
    return markdown_table(titles, [_detail(row) for row in rows])


def _detail(row: Document) -> Row:
    title = method_named(row["method"]).title
    if row["status"] == "does not fit":
        return [title, f"does not fit: {row['needs']} needs {_size(row['needs_bytes'])}", *[""] * 13]
    if row["train_s"] is None:
        return [title, row["status"], *[""] * 13]
    return [
        title,
        _batch(row),
        f"{row['lr']:g}",
        f"{_size(row['measured_peak_bytes'][0])}, {row['measured_peak_bytes'][0] / row['budget_bytes']:.0%}",
        _spread(row["train_s"], "{:.1f}"),
        _spread(row["time_to_target_s"], "{:.1f}") or ("not reached" if _has_target(row) else "-"),
        _percent(row["accuracy_after_equal_time"]),
        _percent(row["val_accuracy"]) + _given_up(row),
        _percent(row["test_accuracy"]),
        _spread(row["epoch_s"], "{:.2f}"),
        _spread(row["images_per_s"], "{:,.0f}"),
        *(_moved(row[name]) for name in ("stored_bytes", "read_bytes", "written_bytes")),
        f"{row['params'][0]:,.0f}",
    ]


def _given_up(row: Document) -> str:
    epochs = sorted(set(row["epochs"]))
    return f", given up after {' or '.join(map(str, epochs))} epochs" if epochs else ""


def _moved(values: Sequence[float] | None) -> str:
    return "-" if values is None else _size(values[0])


def _batch(row: Document) -> str:
    sizes = ", ".join(map(str, row["batch_sizes"]))
    parts = row.get("micro_batch")
    return f"{sizes} in parts of {parts}" if parts and row["batch_sizes"] != [parts] else sizes


def _time_cell(row: Document | None) -> str:
    if row is None:
        return ""
    if row["status"] == "does not fit":
        return f"needs {_size(row['needs_bytes'])}"
    reached = _spread(row.get("time_to_target_s"), "{:.1f} s")
    if reached or not row.get("train_s"):
        return reached or row["status"]
    return f"not in {row['train_s'][0]:.1f} s" if _has_target(row) else "-"


def _has_target(row: Document) -> bool:
    return any(target is not None for target in row["targets"])


def _size(num_bytes: float) -> str:
    return format_bytes(int(num_bytes))


def _pipeline_table(cells: Sequence[Document]) -> str:
    titles = (
        *("profiling and planning", "training", "caching", "loading", "other"),
        *("predicted s", "measured s", "predicted peak", "measured peak", "layers x units", "exit"),
    )
    return _run_table(titles, [(document, _parts(document)) for document in cells if "parts" in document])


def _parts(document: Document) -> Row:
    plan = document["plan"]
    predicted = plan["predicted_s"]
    return [
        *(f"{seconds:.1f}" for seconds in document["parts"].values()),
        "-" if predicted is None else f"{predicted:.1f}",
        f"{plan['measured_s']:.1f}",
        _size(document["predicted_peak_bytes"]),
        _size(document["measured_peak_bytes"]),
        _blocks(plan),
        f"{document['exit_layer']}{', stopped early' if document['stopped_early'] else ''}",
    ]


def _blocks(plan: Document) -> str:
    pairs = zip(plan["layers"], plan["units"], strict=True)
    return ", ".join(f"{first}-{stop - 1} x {units}" for (first, stop), units in pairs)


def _inference_table(cells: Sequence[Document]) -> str:
    titles = ("parameters", "full", "fewer", "images/s at batch 128", "at batch 1", "points from the best exit")
    return _run_table(titles, [(document, _inference(document)) for document in cells if "inference" in document])


def _inference(document: Document) -> Row:
    rates, full = document["inference"], document["params_full"]
    return [
        f"{document['params']:,}",
        f"{full:,}",
        f"{full / document['params']:.1f}x",
        *(_rate_text(rates[size]) for size in ("batch 128", "batch 1")),
        f"{100 * (document['val_accuracy'] - document['best_val_accuracy']):+.1f}",
    ]


def _run_table(titles: Row, runs: Sequence[tuple[Document, Row]]) -> str:
    """Formats a table with a line per run: which one it was, then what is to be said of it."""
    lines = []
    for document, values in runs:
        cell = document["cell"]
        lines.append([method_named(cell["method"]).title, _size(cell["budget_bytes"]), str(cell["seed"]), *values])
    return markdown_table(["method", "budget", "seed", *titles], lines) if lines else "Nothing yet."


def _rate_text(rates: Document) -> str:
    return f"{rates['final']:,.0f} / {rates['full']:,.0f} = {rates['final'] / rates['full']:.2f}x"


def _search_table(searches: Sequence[Document]) -> str:
    lines = []
    for search in sorted(searches, key=lambda found: (found["cell"]["method"], found["cell"]["budget_bytes"])):
        if search["status"] != "done":
            continue
        trials = sorted(search["trials"], key=lambda trial: trial["lr"])
        lines.append(
            [
                method_named(search["cell"]["method"]).title,
                _size(search["cell"]["budget_bytes"]),
                str(search["batch_size"] or "by plan"),
                search["group"] or "this one",
                str(search["epochs"]),
                ", ".join(f"{trial['lr']:g}: {100 * trial['val_accuracy']:.1f} %" for trial in trials),
                f"{search['lr']:g}",
                f"{sum(trial['train_s'] for trial in trials):.0f}",
            ]
        )
    titles = (
        *("searched with", "budget", "batch", "serves", "epochs of a try"),
        *("rate at batch 128: validation accuracy", "taken", "seconds, not counted"),
    )
    return markdown_table(titles, lines) if lines else "None: all methods train at the default rate."


def _percent(values: Sequence[float] | None) -> str:
    return _spread(None if values is None else [100 * value for value in values], "{:.1f} %") or "-"


def _spread(values: Sequence[float] | None, template: str) -> str:
    if values is None:
        return ""
    middle, low, high = values
    shown = template.format(middle)
    return shown if low == high else f"{shown} ({template.format(low)} to {template.format(high)})"
