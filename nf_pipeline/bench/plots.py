"""Draws the results: accuracy over seconds per budget, and time to the target over the budget.

matplotlib is an extra: it is imported here and nowhere else. Entry: `draw_plots`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nf_pipeline.bench.methods import in_order, method_named
from nf_pipeline.bench.settings import short_name
from nf_pipeline.units import format_bytes

Document = dict[str, Any]

_SIZE = (4.2, 3.2)  # inches of one panel
_MIB = 2**20


def draw_plots(document: Document, output: Path) -> list[Path]:
    """Writes two SVG files per model.

    Args:
        document: see `nf_pipeline.bench.results.make_document`.
        output: folder.

    Returns:
        The files.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("svg")
    # The same numbers give the same file: no date, no random ids.
    matplotlib.rcParams.update({"svg.hashsalt": "nf_pipeline", "font.size": 8, "axes.grid": True, "grid.alpha": 0.3})
    written = []
    for model in document["models"]:
        name = "".join(letter if letter.isalnum() else "-" for letter in short_name(model["model"]))
        cells = [cell for cell in document["cells"] if cell["cell"]["model"] == model["model"] and "curve" in cell]
        if not cells:
            continue
        written.append(_draw_curves(cells, output / f"accuracy-{name}.svg"))
        written.append(_draw_times(model["rows"], output / f"time-to-target-{name}.svg"))
    return written


def _draw_curves(cells: Sequence[Document], path: Path) -> Path:
    from matplotlib import pyplot

    budgets = sorted({cell["cell"]["budget_bytes"] for cell in cells})
    methods = in_order(cell["cell"]["method"] for cell in cells)
    figure, panels = pyplot.subplots(
        1, len(budgets), figsize=(_SIZE[0] * len(budgets), _SIZE[1]), squeeze=False, layout="constrained"
    )
    for budget, panel in zip(budgets, panels[0], strict=True):
        for cell in [cell for cell in cells if cell["cell"]["budget_bytes"] == budget]:
            seconds, accuracies = zip(*cell["curve"], strict=True)
            method, first = cell["cell"]["method"], cell["cell"]["seed"] == 0
            label = method_named(method).title if first else None
            panel.plot(seconds, [100 * value for value in accuracies], label=label, **_style(method, methods))
        panel.set(title=format_bytes(budget), xlabel="seconds", ylabel="validation accuracy, %", xlim=(0, None))
        panel.legend(fontsize=6)
    return _save(figure, path)


def _draw_times(rows: Sequence[Document], path: Path) -> Path:
    from matplotlib import pyplot

    figure, panel = pyplot.subplots(figsize=(1.5 * _SIZE[0], 1.2 * _SIZE[1]), layout="constrained")
    methods = in_order(row["method"] for row in rows)
    for method in methods:
        points = [row for row in rows if row["method"] == method and row.get("time_to_target_s")]
        if points:
            budgets = [row["budget_bytes"] / _MIB for row in points]
            seconds = [row["time_to_target_s"][0] for row in points]
            panel.plot(
                budgets, seconds, label=method_named(method).title, **{**_style(method, methods), "marker": "o"}
            )
    panel.set(xlabel="memory budget, MiB", ylabel="seconds to the target", xscale="log", yscale="log")
    if panel.lines:  # nobody may have reached it
        panel.legend(fontsize=6)
    return _save(figure, path)


def _style(method: str, methods: Sequence[str]) -> dict[str, Any]:
    is_own = method_named(method).family == "pipeline"
    return {
        "color": f"C{methods.index(method)}",
        "linewidth": 2.2 if is_own else 1.2,
        "marker": "." if is_own else None,
    }


def _save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return path
