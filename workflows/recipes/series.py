"""Time series: forecast blood glucose, and tell six kinds of control charts apart.

    python -m workflows.recipes.series --task forecast
    python -m workflows.recipes.series --task classify

`forecast` reads half a year of one person's blood glucose, every five minutes, which bokeh_sampledata ships (public
domain): from three hours, as levels in mg/dl and as differences from the last value, the differences of the next half
hour, so that saying "no change" is the persistence forecast. The splits follow each other in time: 70, 15 and 15 per
cent; no window holds a gap or reaches into the next split. `classify` makes the charts of
Alcock and Manolopoulos (1999, "Time-series similarity queries employing a feature-based approach", the formulas of
UCI's Synthetic Control Chart set): normal, cyclic, rising, falling, and shifted up or down.
"""

import numpy as np
from torch import nn

from workflows.recipes.networks import convolutions
from workflows.recipes.recipe import Recipe, Samples, Splits, majority_class, run_recipes, standardised_error

PAST, FUTURE = 36, 6
STEP_S = 300
SHARES = {"train": (0.0, 0.7), "val": (0.7, 0.85), "test": (0.85, 1.0)}
CHARTS = ("normal", "cyclic", "rising", "falling", "shifted up", "shifted down")
CHART_LENGTH = 60


def read_glucose() -> tuple[np.ndarray, np.ndarray]:
    """Returns levels in mg/dl, and when they were measured, in seconds; both float64 [L]."""
    from bokeh_sampledata.glucose import data

    return data["glucose"].to_numpy(float), data.index.to_numpy().astype("datetime64[s]").astype(float)


def load_forecasts(rows: int, seed: int) -> Splits:
    """Cuts windows out of three spans of time, evenly, and at most `rows` of each; nothing is random."""
    levels_L, times_L = read_glucose()
    spans = {name: slice(*(int(len(levels_L) * end) for end in ends)) for name, ends in SHARES.items()}
    return {name: _windows(levels_L[span], times_L[span], rows) for name, span in spans.items()}


def _windows(levels_L: np.ndarray, times_L: np.ndarray, rows: int) -> Samples:
    size = PAST + FUTURE
    lasts_N = times_L[size - 1 :] - times_L[: -size + 1]
    starts = np.flatnonzero(np.abs(lasts_N - STEP_S * (size - 1)) < STEP_S / 2)
    starts = starts[:: max(1, -(-len(starts) // rows))]
    levels_NL = np.stack([levels_L[start : start + size] for start in starts])
    changes_NL = levels_NL - levels_NL[:, PAST - 1 : PAST]
    inputs_NCL = np.stack([levels_NL[:, :PAST], changes_NL[:, :PAST]], axis=1)
    return Samples(inputs=inputs_NCL.astype(np.float32), labels=changes_NL[:, PAST:].astype(np.float32))


def persistence(splits: Splits) -> tuple[str, float]:
    """Returns the test error of saying that nothing changes."""
    return "persistence", standardised_error(splits, np.zeros(FUTURE))


def make_chart(kind: str, rng: np.random.Generator) -> np.ndarray:
    """Draws one chart, float32 [CHART_LENGTH]; the numbers are those of the data set's description."""
    time_L = np.arange(1, CHART_LENGTH + 1)
    chart_L = 30 + 2 * rng.uniform(-3, 3, CHART_LENGTH)
    if kind == "cyclic":
        chart_L += rng.uniform(10, 15) * np.sin(2 * np.pi * time_L / rng.uniform(10, 15))
    elif kind in ("rising", "falling"):
        chart_L += (1 if kind == "rising" else -1) * rng.uniform(0.2, 0.5) * time_L
    elif kind != "normal":
        is_late_L = time_L >= rng.uniform(CHART_LENGTH / 3, 2 * CHART_LENGTH / 3)
        chart_L += (1 if kind == "shifted up" else -1) * rng.uniform(7.5, 20) * is_late_L
    return chart_L.astype(np.float32)


def load_charts(rows: int, seed: int) -> Splits:
    """Draws charts, as many of every kind."""
    rng = np.random.default_rng(seed)
    return {name: _charts(count, rng) for name, count in {"train": rows, "val": rows // 2, "test": rows // 2}.items()}


def _charts(count: int, rng: np.random.Generator) -> Samples:
    kinds = [CHARTS[i % len(CHARTS)] for i in range(count)]
    return Samples(inputs=np.stack([make_chart(kind, rng) for kind in kinds])[:, None], labels=np.array(kinds))


def convnet(input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
    """Builds three 1-D convolutions; the last linear layer sees four parts of the time."""
    return convolutions(input_shape, (32, 32, 32), num_outputs, bins=4)


RECIPES = {
    "forecast": Recipe(
        load=load_forecasts,
        rows=4000,
        model="workflows.recipes.series:convnet",
        budget="256KiB",
        settings={"memory.max_batch_size": 64, "train.lr": 0.01},
        baseline=persistence,
    ),
    "classify": Recipe(
        load=load_charts,
        rows=1200,
        model="workflows.recipes.series:convnet",
        budget="192KiB",
        settings={"memory.max_batch_size": 64},
        baseline=majority_class,
    ),
}

if __name__ == "__main__":  # worker processes import this file again
    run_recipes(__doc__, RECIPES)
