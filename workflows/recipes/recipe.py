"""What the recipes share: their samples as Parquet, a run of the pipeline on it, and the result beside a baseline.

A recipe is a file with a `RECIPES` mapping and `run_recipes` as its command. Knows nothing of what samples mean.
Entries: `run_recipes` for commands, `run` for one recipe.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nf_pipeline import train
from nf_pipeline.config import resolve_config
from nf_pipeline.errors import NFError

BACKPROPAGATION = {"memory.budget_bytes": "4GiB", "train.unit_layers": 1000}
"""The whole network as one unit, with memory for it."""


@dataclass(frozen=True, kw_only=True)
class Samples:
    """One split.

    Attributes:
        inputs: [N, ...] channels first, int32 [N, L] for tokens, or N encoded images.
        labels: N whole numbers or texts for classes, float32 [N, K] for values.
    """

    inputs: np.ndarray | Sequence[bytes]
    labels: np.ndarray


Splits = Mapping[str, Samples]
"""Names "train", "val" and "test" to samples."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One task: its data, its network, and what its result is compared with.

    Attributes:
        load: makes the splits, given the rows of the train split and a seed.
        rows: of the train split, by default.
        model: factory of the network.
        budget: memory for training, small enough that the network does not fit as a whole.
        settings: of the run, by `section.field`, where the package's defaults do not suit.
        baseline: its name, and its result on the test split: accuracy, or error as in summary.json.
        follow_up: further lines of the report, given the run's URI and the model's name.
    """

    load: Callable[[int, int], Splits]
    rows: int
    model: str
    budget: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    baseline: Callable[[Splits], tuple[str, float]]
    follow_up: Callable[[str, str], list[str]] = lambda uri, model: []


def write_splits(folder: Path, splits: Splits) -> None:
    """Writes `SPLIT-0.parquet` with the columns `inputs` and `label` for each split."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, samples in splits.items():
        columns = {"inputs": _input_column(samples.inputs), "label": _label_column(samples.labels)}
        pq.write_table(pa.table(columns), folder / f"{name}-0.parquet", row_group_size=1024)


def majority_class(splits: Splits) -> tuple[str, float]:
    """Returns the test accuracy of always saying the class that train has most of."""
    names, counts = np.unique(splits["train"].labels, return_counts=True)
    return "majority class", float(np.mean(splits["test"].labels == names[counts.argmax()]))


def mean_of_train(splits: Splits) -> tuple[str, float]:
    """Returns the test error of always saying the mean of train."""
    return "mean of train", standardised_error(splits, splits["train"].labels.mean(axis=0))


def standardised_error(splits: Splits, guesses: np.ndarray) -> float:
    """Returns the mean squared test error of guesses in units of the variance of each value over train.

    Args:
        splits: with float32 [N, K] labels.
        guesses: broadcast to the labels of test.
    """
    residual_NK = (splits["test"].labels - guesses) / splits["train"].labels.std(axis=0)
    return float(np.mean(residual_NK**2))


def run(recipe: Recipe, output: Path, given: argparse.Namespace | None = None) -> dict[str, Any]:
    """Prepares the data of a recipe, trains its network, and returns summary.json with what was compared.

    Args:
        recipe: the task.
        output: folder for data and runs.
        given: options as `make_parser` reads them; None takes the defaults.

    Returns:
        The summary, and `report`: lines of text; `baseline`: its name and result.

    Raises:
        NFError: training failed, with what to do.
    """
    given = given or make_parser("", {"": recipe}).parse_args(["--output", str(output)])
    splits = recipe.load(given.rows or recipe.rows, given.seed)
    write_splits(output / "data", splits)
    summary = _train(recipe, output, given, "recipe", {})
    baseline = recipe.baseline(splits)
    report = [*_describe_run(splits, summary, given), f"baseline ({baseline[0]}): {_show(summary, baseline[1])}"]
    if given.compare:
        whole = _train(recipe, output, given, "backpropagation", BACKPROPAGATION)
        report.append(f"backpropagation of the whole network: {_describe_test(whole)}")
    report += recipe.follow_up(str(output / "runs" / "recipe"), recipe.model)
    return {**summary, "baseline": baseline, "report": report}


def make_parser(description: str, recipes: Mapping[str, Recipe]) -> argparse.ArgumentParser:
    """Returns the options of a recipe's command.

    Args:
        description: the module's docstring.
        recipes: by name; the first one is the default.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=list(recipes), default=next(iter(recipes)), help="which one [%(default)s]")
    parser.add_argument("--output", type=Path, default=Path("./nf-runs/recipes"), help="folder [%(default)s]")
    parser.add_argument("--rows", type=int, help="samples of the train split; default: what suits the task")
    parser.add_argument("--memory-budget", help="what training may hold; default: what suits the task")
    parser.add_argument("--epochs", type=int, help="per block; default: what suits the task")
    parser.add_argument("--seed", type=int, default=0, help="of the samples and the weights [%(default)s]")
    parser.add_argument("--executor", default="inline", help="inline, or ray with PYTHONPATH=. [%(default)s]")
    parser.add_argument("--num-threads", type=int, help="CPU threads of training")
    parser.add_argument("--compare", action="store_true", help="also train the whole network by backpropagation")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="any other setting")
    return parser


def run_recipes(description: str, recipes: Mapping[str, Recipe]) -> None:
    """Runs the recipe that the command line names and prints its report; a documented error ends the process."""
    given = make_parser(description, recipes).parse_args()
    try:
        print("\n".join(run(recipes[given.task], given.output / given.task, given)["report"]))
    except NFError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def _train(
    recipe: Recipe, output: Path, given: argparse.Namespace, name: str, changes: Mapping[str, Any]
) -> dict[str, Any]:
    flags = {
        **recipe.settings,
        "data.source": str(output / "data"),
        "model.name": recipe.model,
        "memory.budget_bytes": given.memory_budget or recipe.budget,
        "storage.uri": str(output / "runs"),
        "cluster.executor": given.executor,
        **{"train.seed": given.seed, "cluster.num_threads": given.num_threads},
        **changes,
        "run": name,
    }
    if given.epochs is not None:
        flags["train.epochs"] = given.epochs
    return train(resolve_config(assignments=given.set, flags=flags))


def _input_column(inputs: np.ndarray | Sequence[bytes]) -> pa.Array:
    if not isinstance(inputs, np.ndarray):
        return pa.array([{"bytes": image, "path": None} for image in inputs], _ENCODED)
    # FixedShapeTensorArray.from_numpy_ndarray confuses the order of axes with those of length 1 (pyarrow 26.0).
    kind = pa.fixed_shape_tensor(pa.from_numpy_dtype(inputs.dtype), inputs.shape[1:])
    numbers = pa.array(np.ascontiguousarray(inputs).reshape(-1))
    return pa.ExtensionArray.from_storage(kind, pa.FixedSizeListArray.from_arrays(numbers, inputs[0].size))


_ENCODED = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def _label_column(labels: np.ndarray) -> pa.Array:
    is_values = labels.dtype.kind == "f"
    return pa.array(labels.tolist(), pa.list_(pa.float32()) if is_values else None)


def _describe_run(splits: Splits, summary: dict[str, Any], given: argparse.Namespace) -> list[str]:
    rows = ", ".join(f"{len(samples.labels):,} {name}" for name, samples in splits.items())
    budget = summary["memory_budget_bytes"] / 2**20
    lines = [f"{given.task}: {rows} samples; {len(summary['blocks'])} blocks in {budget:.2f} MiB"]
    for idx, one in enumerate(summary["exits"]):
        mark = "*" if idx == summary["chosen_exit"] else " "
        val = one[f"val_{summary['metric']}"]
        lines.append(
            f"{mark} exit {idx}  {one['layer']:<12} validation {_show(summary, val)}  {one['params']:,} weights"
        )
    return [*lines, f"the chosen exit: {_describe_test(summary)}"]


def _describe_test(summary: dict[str, Any]) -> str:
    peak = max(block["measured_peak_bytes"] for block in summary["blocks"]) / 2**20
    test = _show(summary, summary[f"test_{summary['metric']}"])
    return f"test {test}, peak {peak:.2f} MiB, {summary['wall_s']:.0f} s"


def _show(summary: dict[str, Any], value: float) -> str:
    return f"accuracy {value:.1%}" if summary["metric"] == "accuracy" else f"error {value:.3f}"
