"""Renders the results as Markdown; decides nothing. Entry: `render_results`."""

from collections.abc import Sequence
from typing import Any

from nf_pipeline.bench.methods import METHODS
from nf_pipeline.bench.settings import short_name
from nf_pipeline.units import format_bytes

Document = dict[str, Any]
Row = Sequence[str]


def render_results(document: Document) -> str:
    """Returns the whole report.

    Args:
        document: see `nf_pipeline.bench.results.make_document`.
    """
    parts = [_heading(document)]
    for model in document["models"]:
        cells = [cell for cell in document["cells"] if cell["cell"]["model"] == model["model"]]
        searches = [search for search in document["searches"] if search["cell"]["model"] == model["model"]]
        parts += [
            f"## {short_name(model['model'])}",
            _model_text(model),
            "### Seconds to the accuracy that backpropagation reaches",
            time_table(model["rows"]),
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
    methods = [name for name in METHODS if any(row["method"] == name for row in rows)]
    budgets = sorted({row["budget_bytes"] for row in rows})
    at = {(row["budget_bytes"], row["method"]): row for row in rows}
    lines = []
    for budget in budgets:
        here = [at.get((budget, name)) for name in methods]
        targets = next((row["targets"] for row in here if row and row.get("targets")), [])
        shown = "-" if not targets or targets[0] is None else " ".join(f"{100 * target:.1f} %" for target in targets)
        lines.append([format_bytes(budget), shown, *(_time_cell(row) for row in here), *_speed_ups(here)])
    titles = (*(METHODS[name].title for name in methods), "faster than backprop", "than the best other")
    return markdown_table(["budget", "target", *titles], lines)


def _speed_ups(rows: Sequence[Document | None]) -> Row:
    """Returns how many times faster this project's default is than plain backpropagation and the fastest other."""
    seconds = {row["method"]: row["time_to_target_s"][0] for row in rows if row and row.get("time_to_target_s")}
    others = [value for name, value in seconds.items() if METHODS[name].family != "pipeline"]
    compared = (seconds.get("bp"), min(others, default=None))
    own = seconds.get("nf")
    return ["-" if other is None or not own else f"{other / own:.2f}x" for other in compared]


def _heading(document: Document) -> str:
    machine, settings = document["machine"], document["settings"]
    lines = [
        f"# Benchmark: {machine['device']}",
        f"{document['date']}, {machine['cpu']}, {settings['num_threads']} of {machine['cores']} cores, "
        f"python {machine['python']}, torch {machine['torch']}, nf_pipeline {machine['nf_pipeline']}.",
        f"Data {short_name(settings['data'])}, {settings['max_train_images'] or 'all'} training images, "
        f"augmentation {settings['augment']}, {settings['epochs']} epochs (the pipeline: per block), "
        f"{settings['num_seeds']} seeds; medians, smallest and largest in brackets.",
        "Seconds hold training and a validation after every epoch; the pipeline's hold profiling, planning, caching "
        "and loading too. Reading the data set, the search for a learning rate and the test are in nobody's. The "
        "pipeline's accuracy at a time is that of its best exit so far; the exit that it keeps may be up to "
        "`exits.tolerance` (0.5 points) below. Bytes read leave out what is mapped: shards after the first epoch.",
    ]
    return "\n\n".join(lines)


def _model_text(model: Document) -> str:
    rows = model["split_rows"]
    return (
        f"{model['params']:,} weights, {rows['train']:,} images to train, {rows['val']:,} to validate, "
        f"{rows.get('test', 0):,} to test."
    )


def _budgets(model: Document) -> list[int]:
    return sorted({row["budget_bytes"] for row in model["rows"]})


def _budget_part(model: Document, budget: int) -> list[str]:
    rows = [row for row in model["rows"] if row["budget_bytes"] == budget]
    names = [name for name, num_bytes in model["budgets"].items() if num_bytes == budget]
    title = f"### {format_bytes(budget)}" + (f" ({names[0]})" if names else "")
    return [title, _detail_table(rows)]


def _detail_table(rows: Sequence[Document]) -> str:
    titles = (
        *("method", "batch", "lr", "peak", "seconds", "to target", "at equal time", "val", "test"),
        *("s/epoch", "images/s", "stored", "read + written", "parameters"),
    )
    return markdown_table(titles, [_detail(row) for row in rows])


def _detail(row: Document) -> Row:
    title = METHODS[row["method"]].title
    if row["status"] == "does not fit":
        return [title, f"does not fit: {row['needs']} needs {format_bytes(row['needs_bytes'])}", *[""] * 12]
    if row["train_s"] is None:
        return [title, row["status"], *[""] * 12]
    moved = [(row[name] or [0])[0] for name in ("read_bytes", "written_bytes")]
    return [
        title,
        _batch(row),
        f"{row['lr']:g}",
        format_bytes(row["measured_peak_bytes"][0]),
        _spread(row["train_s"], "{:.1f}"),
        _spread(row["time_to_target_s"], "{:.1f}") or "not reached",
        _percent(row["accuracy_after_equal_time"]),
        _percent(row["val_accuracy"]),
        _percent(row["test_accuracy"]),
        _spread(row["epoch_s"], "{:.2f}"),
        _spread(row["images_per_s"], "{:,.0f}"),
        format_bytes((row["stored_bytes"] or [0])[0]),
        format_bytes(sum(moved)),
        f"{row['params'][0]:,.0f}",
    ]


def _batch(row: Document) -> str:
    sizes = ", ".join(map(str, row["batch_sizes"]))
    parts = row.get("micro_batch")
    return f"{sizes} in parts of {parts}" if parts and row["batch_sizes"] != [parts] else sizes


def _time_cell(row: Document | None) -> str:
    if row is None:
        return ""
    if row["status"] == "does not fit":
        return f"needs {format_bytes(row['needs_bytes'])}"
    return _spread(row.get("time_to_target_s"), "{:.1f} s") or "not reached"


def _pipeline_table(cells: Sequence[Document]) -> str:
    lines = []
    for document in cells:
        if "parts" not in document:
            continue
        cell, plan = document["cell"], document["plan"]
        predicted = plan["predicted_s"]
        lines.append(
            [
                METHODS[cell["method"]].title,
                format_bytes(cell["budget_bytes"]),
                str(cell["seed"]),
                *(f"{seconds:.1f}" for seconds in document["parts"].values()),
                "-" if predicted is None else f"{predicted:.1f}",
                f"{plan['measured_s']:.1f}",
                format_bytes(document["predicted_peak_bytes"]),
                format_bytes(document["measured_peak_bytes"]),
                _blocks(plan),
                f"{document['exit_layer']}{', stopped early' if document['stopped_early'] else ''}",
            ]
        )
    titles = (
        *("method", "budget", "seed", "profiling and planning", "training", "caching", "loading", "other"),
        *("predicted s", "measured s", "predicted peak", "measured peak", "layers x units", "exit"),
    )
    return markdown_table(titles, lines) if lines else "Nothing yet."


def _blocks(plan: Document) -> str:
    pairs = zip(plan["layers"], plan["units"], strict=True)
    return ", ".join(f"{first}-{stop - 1} x {units}" for (first, stop), units in pairs)


def _inference_table(cells: Sequence[Document]) -> str:
    lines = []
    for document in cells:
        if "inference" not in document:
            continue
        cell, full = document["cell"], document["params_full"]
        rates = document["inference"]
        lines.append(
            [
                METHODS[cell["method"]].title,
                format_bytes(cell["budget_bytes"]),
                str(cell["seed"]),
                f"{document['params']:,}",
                f"{full:,}",
                f"{full / document['params']:.1f}x",
                *(_rate_text(rates[size]) for size in ("batch 128", "batch 1")),
                f"{100 * (document['val_accuracy'] - document['best_val_accuracy']):+.1f}",
            ]
        )
    titles = (
        *("method", "budget", "seed", "parameters", "full", "fewer"),
        *("images/s at batch 128", "at batch 1", "points from the best exit"),
    )
    return markdown_table(titles, lines) if lines else "Nothing yet."


def _rate_text(rates: Document) -> str:
    return f"{rates['final']:,.0f} / {rates['full']:,.0f} = {rates['final'] / rates['full']:.2f}x"


def _search_table(searches: Sequence[Document]) -> str:
    lines = []
    for search in sorted(searches, key=lambda found: (found["cell"]["method"], found["cell"]["budget_bytes"])):
        if search["status"] != "done" or "same_as" in search:
            continue
        trials = sorted(search["trials"], key=lambda trial: trial["lr"])
        lines.append(
            [
                METHODS[search["cell"]["method"]].title,
                format_bytes(search["cell"]["budget_bytes"]),
                str(search["batch_size"] or "by plan"),
                ", ".join(f"{trial['lr']:g}: {100 * trial['val_accuracy']:.1f} %" for trial in trials),
                f"{search['lr']:g}",
                f"{sum(trial['train_s'] for trial in trials):.0f}",
            ]
        )
    titles = ("method", "budget", "batch", "rate at batch 128: validation accuracy", "taken", "seconds, not counted")
    return markdown_table(titles, lines) if lines else "None: all methods train at the default rate."


def _percent(values: Sequence[float] | None) -> str:
    return _spread(None if values is None else [100 * value for value in values], "{:.1f} %") or "-"


def _spread(values: Sequence[float] | None, template: str) -> str:
    if values is None:
        return ""
    middle, low, high = values
    shown = template.format(middle)
    return shown if low == high else f"{shown} ({template.format(low)} to {template.format(high)})"
