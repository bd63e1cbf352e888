"""The command that measures this project beside its baselines, and the hidden one that each of its processes runs."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import click

from nf_pipeline.cli.options import debug_option

_DEVICE_NAME = "{device}"
_INSTALL_PLOTS = (
    "plots skipped: matplotlib is not installed. Fix: pip install 'nf_pipeline[bench]', then run it again"
)


class _Listed(click.ParamType):
    """Names separated by commas."""

    name = "list"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """Returns the parts."""
        return value if isinstance(value, tuple) else tuple(part.strip() for part in value.split(",") if part.strip())


@click.command(
    "bench",
    short_help="Measure this project beside backpropagation.",
    epilog="Example: nf-pipeline bench --data digits --models convnet --epochs 2 --output ./bench-results/digits",
)
@click.option("--data", default="digits", show_default=True, metavar="D", help="As for train.")
@click.option(
    "--models", type=_Listed(), default="convnet", show_default=True, metavar="M,...", help="Names as for train."
)
@click.option(
    "--methods",
    type=_Listed(),
    metavar="NAME,...",
    help="Of nf, nf-layer, nf-block, nf-pipelined, bp, bp-ckpt, bp-micro, bp-both, bp-bf16, dgl.  [default: all but "
    "nf-layer and nf-block; nf-pipelined only with --address]  A name takes settings of its own: "
    "nf+train.unit_layers=3, bp+train.label_smoothing=0.1. Baselines take train.label_smoothing, mixup, loss (auto "
    "or cross_entropy), momentum, weight_decay and warmup_epochs, and refuse what they would ignore.",
)
@click.option(
    "--budgets",
    type=_Listed(),
    default="auto",
    show_default=True,
    metavar="SIZE,...",
    help="Memory budgets; auto computes them, from the smallest at which anything trains to the one at which "
    "backpropagation has the largest batch.",
)
@click.option("--seeds", type=click.IntRange(1, 100), default=1, show_default=True, help="Repetitions.")
@click.option(
    "--epochs", type=click.IntRange(1), default=8, show_default=True, help="Passes; of the pipeline, per block."
)
@click.option("--max-train-images", type=click.IntRange(2), metavar="N", help="Stratified subset.  [default: all]")
@click.option("--val-fraction", type=float, default=0.1, show_default=True, help="Of the train split.")
@click.option(
    "--augment",
    type=click.Choice(["none", "flip", "crop_flip", "color", "randaugment"]),
    default="none",
    show_default=True,
    help="Of images.",
)
@click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="SECTION.FIELD=VALUE",
    help="Train all methods with a setting that baselines take, such as train.mixup=0.2; may be repeated.",
)
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Where to train."
)
@click.option("--num-threads", type=click.IntRange(1, 1024), help="CPU threads.  [default: all]")
@click.option("--max-batch", type=click.IntRange(2, 65536), default=128, show_default=True, help="Largest batch.")
@click.option(
    "--search-seconds",
    type=click.FloatRange(0),
    default=8.0,
    show_default=True,
    help="Training of one try in the search for a learning rate, at least an epoch; 0 for no search.",
)
@click.option("--search-tries", type=click.IntRange(1, 20), default=5, show_default=True, help="Rates tried at most.")
@click.option(
    "--give-up",
    type=click.FloatRange(min=1),
    metavar="FACTOR",
    help="End a baseline that has taken so many times backpropagation's seconds and not reached its accuracy.  "
    "[default: train all to the end]",
)
@click.option("--address", metavar="A", help="Ray cluster for nf-pipelined.  [default: a local one]")
@click.option(
    "--output",
    required=True,
    metavar="FOLDER",
    help="For the results; {device} stands for the device's name. The same folder again goes on where it was.",
)
@click.option("--work", metavar="FOLDER", help="For runs and unfinished states.  [default: OUTPUT/work]")
@click.option(
    "--time-limit",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="End before starting what would not fit; the same command goes on.",
)
@click.option("--quiet", is_flag=True, help="No line per cell.")
@debug_option
def bench_command(*, output: str, work: str | None, time_limit: float | None, quiet: bool, **given: Any) -> None:
    """Measure this project beside backpropagation, its savings, and DGL, under the same memory budgets.

    Every method trains on the same images with the same seed and schedule, each in a process of its own, with the
    largest batch that fits and a learning rate searched on the validation split. Writes results.json, results.md and
    plots to FOLDER.
    """
    from nf_pipeline.bench.suite import run_suite

    folder = Path(output.replace(_DEVICE_NAME, _slug(given["device"])) if _DEVICE_NAME in output else output)
    outcome = run_suite(
        _settings(given),
        folder.absolute(),
        Path(work).absolute() if work else folder.absolute() / "work",
        time_limit_s=time_limit,
        tell=None if quiet else _tell,
    )
    plots = _draw(outcome.document, folder)
    print(outcome.table)
    print(f"{folder / 'results.json'}, results.md{', plots' if plots else ''}", file=sys.stderr)
    if outcome.num_missing:
        print(f"{outcome.num_missing} cells are still to be measured: run the same command again", file=sys.stderr)


@click.command("bench-cell", hidden=True)
@click.argument("request_json", metavar="REQUEST")
@click.option("--quiet", is_flag=True, help="No line per epoch.")
@debug_option
def bench_cell_command(request_json: str, quiet: bool) -> None:
    """Measure one cell of a benchmark; nf-pipeline bench starts this."""
    from nf_pipeline.bench.cells import CellRequest
    from nf_pipeline.documents import parse_json, read_fields
    from nf_pipeline.errors import ConfigError

    try:
        request = read_fields(CellRequest, parse_json(request_json.encode()))
    except ValueError as error:
        raise ConfigError(f"bench-cell: {error}", "run nf-pipeline bench, which starts this command") from None
    from nf_pipeline.bench.cell_process import measure_cell

    measure_cell(request, _ignore if quiet else lambda text: _tell(f"  {text}"))


def _settings(given: dict[str, Any]) -> Any:
    from nf_pipeline.bench.methods import DEFAULT_METHODS, NEEDS_CLUSTER
    from nf_pipeline.bench.settings import BenchSettings
    from nf_pipeline.data.sources import absolute_source
    from nf_pipeline.host import available_threads

    given = dict(given)
    sizes = given.pop("budgets")
    return BenchSettings(
        budgets=() if sizes == ("auto",) else tuple(_bytes(size) for size in sizes),
        methods=given.pop("methods") or (*DEFAULT_METHODS, *([NEEDS_CLUSTER] if given["address"] else [])),
        num_seeds=given.pop("seeds"),
        num_threads=given.pop("num_threads") or available_threads(),
        data=absolute_source(given.pop("data")),
        **given,
    )


def _bytes(size: str) -> int:
    from nf_pipeline.errors import ConfigError
    from nf_pipeline.units import parse_bytes

    try:
        return parse_bytes(size)
    except ValueError as error:
        raise ConfigError(f"--budgets: {error}", "--budgets auto, or sizes such as 100MiB,200MiB") from None


def _slug(device: str) -> str:
    from nf_pipeline.bench.machine import describe_machine

    return re.sub(r"[^a-z0-9]+", "-", describe_machine(device)["device"].lower()).strip("-")


def _draw(document: dict[str, Any], folder: Path) -> list[Path]:
    from nf_pipeline.bench.plots import draw_plots

    try:
        return draw_plots(document, folder)
    except ImportError:
        print(_INSTALL_PLOTS, file=sys.stderr)
        return []


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _ignore(_text: str) -> None:
    pass
