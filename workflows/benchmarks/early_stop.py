"""Trains with and without stopping early, seed by seed in one go, and prints what it saved and what it changed.

    python workflows/benchmarks/early_stop.py --data DIR --max-train-images 4000 --epochs 3

The network has thirteen layers that all cost about the same, in blocks of few layers: what a run saves is about the
part of the blocks that it does not train. Both runs of a seed are really trained, in turns which comes first. The
blocks they share are the same bit for bit, which is checked. Entry: `compare_seed`.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from nf_pipeline import RunConfig, train
from nf_pipeline.config import ExitsConfig
from nf_pipeline.core.early_stop import reason_to_stop
from nf_pipeline.errors import NFError
from nf_pipeline.storage.layout import RunLayout
from nf_pipeline.storage.manifest import read_manifest
from nf_pipeline.storage.store import open_store

WIDTHS = (24, 24, "pool", 48, 48, 48, "pool", 96, 96, 96, 96, 96, 96, 96, 96)


def make_network(num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """Builds thirteen 3x3 convolutions that cost the same: each pool quarters the pixels and doubles the width."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels = image_shape[0]
    for idx, width in enumerate(WIDTHS):
        if isinstance(width, str):
            layers[f"pool{idx}"] = nn.MaxPool2d(2)
            continue
        layers[f"conv{idx}"] = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        layers[f"bn{idx}"] = nn.BatchNorm2d(width)
        layers[f"relu{idx}"] = nn.ReLU(inplace=True)
        channels = width
    layers |= {"avgpool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
    layers["classifier"] = nn.Linear(channels, num_classes)
    return nn.Sequential(layers)


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one run took and found.

    Attributes:
        seed: of the run.
        patience: `exits.patience`; None trains all blocks.
        seconds: wall time of all stages.
        num_blocks, num_planned: blocks that were trained, and that the plan has.
        exit_layer: of the chosen exit.
        val_accuracy, test_accuracy: of the chosen exit, in [0, 1].
        params: weights of the final model.
        val_accuracies: of all exits.
        would_stop_after: number of blocks after which a patience of 1, 2 or 3 ends this very run; all for never.
    """

    seed: int
    patience: int | None
    seconds: float
    num_blocks: int
    num_planned: int
    exit_layer: str
    val_accuracy: float
    test_accuracy: float | None
    params: int
    val_accuracies: list[float]
    would_stop_after: dict[str, int]


def compare_seed(arguments: argparse.Namespace, seed: int) -> list[Run]:
    """Trains a seed to the end and with the rule; every other seed the other way round.

    Raises:
        SystemExit: the blocks that both runs trained differ.
    """
    order = [None, arguments.patience] if seed % 2 == 0 else [arguments.patience, None]
    runs = sorted((train_once(arguments, seed, patience) for patience in order), key=lambda run: run.patience or 0)
    whole, stopped = runs
    if whole.val_accuracies[: len(stopped.val_accuracies)] != stopped.val_accuracies:
        raise SystemExit(f"seed {seed}: the two runs differ in blocks that both trained")
    return runs


def train_once(arguments: argparse.Namespace, seed: int, patience: int | None) -> Run:
    """Trains one run in a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="nf-early-stop-") as folder:
        config = _config(arguments, seed, patience, folder)
        began = time.monotonic()
        summary = train(config)
        seconds = time.monotonic() - began
        facts = [_facts(folder, config.run, idx) for idx in range(len(summary["blocks"]))]
    chosen = summary["exits"][summary["chosen_exit"]]
    print(f"seed {seed}, patience {patience}: {seconds:.0f} s, exit {chosen['layer']}", file=sys.stderr, flush=True)
    return Run(
        seed=seed,
        patience=patience,
        seconds=seconds,
        num_blocks=len(summary["blocks"]),
        num_planned=summary["num_blocks_planned"],
        exit_layer=chosen["layer"],
        val_accuracy=summary["val_accuracy"],
        test_accuracy=summary["test_accuracy"],
        params=summary["params_final"],
        val_accuracies=[exit["val_accuracy"] for exit in summary["exits"]],
        would_stop_after={str(blocks): _stops_after(facts, blocks) for blocks in (1, 2, 3)},
    )


def render_table(runs: Sequence[Run]) -> str:
    """Formats one row per run as Markdown."""
    titles = ("seed", "stop", "seconds", "blocks", "exit", "val", "test", "parameters", "same choice")
    lines = [f"| {' | '.join(titles)} |", "|" + " --- |" * len(titles)]
    whole = {run.seed: run for run in runs if run.patience is None}
    for run in runs:
        cells = (
            str(run.seed),
            "never" if run.patience is None else f"patience={run.patience}",
            f"{run.seconds:.0f}",
            f"{run.num_blocks} of {run.num_planned}",
            run.exit_layer,
            f"{run.val_accuracy:.1%}",
            "-" if run.test_accuracy is None else f"{run.test_accuracy:.1%}",
            f"{run.params:,}",
            "yes" if run.exit_layer == whole[run.seed].exit_layer else "no",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _stops_after(facts: Sequence[dict[str, Any]], patience: int) -> int:
    counts = [block["val_correct"] for block in facts]
    found = (stop for stop in range(1, len(facts)) if reason_to_stop(counts[:stop], facts[0]["num_val"], patience))
    return next(found, len(facts))


def _facts(folder: str, run: str, block_idx: int) -> dict[str, Any]:
    return read_manifest(open_store(folder), RunLayout(run).block_manifest(block_idx)).facts


def _config(arguments: argparse.Namespace, seed: int, patience: int | None, folder: str) -> RunConfig:
    return RunConfig(
        data={
            "source": arguments.data,
            "max_train_images": arguments.max_train_images,
            "val_fraction": arguments.val_fraction,
        },
        model={"name": f"{Path(__file__).stem}:make_network"},
        memory={"budget_bytes": arguments.memory_budget},
        train={
            "epochs": arguments.epochs,
            "unit_layers": arguments.unit_layers,
            "seed": seed,
            "device": arguments.device,
        },
        exits={"patience": patience},
        storage={"uri": folder},
        cluster={"executor": "inline", "num_threads": arguments.num_threads},
    )


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="as for nf-pipeline train [%(default)s]")
    parser.add_argument("--max-train-images", type=int, help="stratified, seeded subset [all]")
    parser.add_argument("--val-fraction", type=float, default=0.2, help="of the train split [%(default)s]")
    parser.add_argument("--epochs", type=int, default=3, help="per block [%(default)s]")
    parser.add_argument("--memory-budget", default="5MiB", help="[%(default)s]")
    parser.add_argument("--unit-layers", type=int, default=2, help="layers per unit [%(default)s]")
    parser.add_argument("--patience", type=int, default=ExitsConfig().patience, help="of the rule [%(default)s]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="[%(default)s]")
    parser.add_argument("--device", default="cpu", choices=["auto", "cpu", "cuda"], help="[%(default)s]")
    parser.add_argument("--num-threads", type=int, default=os.cpu_count(), help="CPU threads [%(default)s]")
    parser.add_argument("--output", type=Path, default=Path("bench-results/early-stop.json"), help="[%(default)s]")
    return parser.parse_args()


def _main() -> int:
    arguments = _parse_arguments()
    try:
        runs = [run for seed in arguments.seeds for run in compare_seed(arguments, seed)]
    except NFError as error:
        print(f"Error: {error}", file=sys.stderr)
        return error.exit_code
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "settings": {name: str(value) for name, value in vars(arguments).items()},
        "machine": platform.processor() or platform.machine(),
        "date": time.strftime("%Y-%m-%d"),
        "runs": [asdict(run) for run in runs],
    }
    arguments.output.write_text(json.dumps(document, indent=2) + "\n", encoding="utf8")
    print(render_table(runs))
    saved = sum(run.seconds if run.patience is None else -run.seconds for run in runs)
    whole_s = sum(run.seconds for run in runs if run.patience is None)
    print(f"\nsaved {saved:.0f} of {whole_s:.0f} s ({saved / whole_s:.0%})\n{arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(_main())
