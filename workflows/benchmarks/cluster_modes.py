"""Trains one model in every way a cluster allows, on the same images and workers, and prints one table.

    python workflows/benchmarks/cluster_modes.py --data DIR --max-train-images 4000 --memory-budget 24MiB

Starts a Ray of its own on this machine: a head without CPUs and `--workers` nodes of one CPU each, so that a worker
is a core. Every run uses one thread per worker. The order of the runs is seed by seed, mode by mode, so that a slow
minute of the machine does not hit one mode alone. Entry: `compare_modes`.

Seconds run from the first block's start to the last block's end: training, validation, writing and reading
activations, starting workers. "Slowest block" is what the pipeline could reach at best: the training and writing
seconds of the block that takes longest, as measured in that very run.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from measuring import add_run_options, add_settings, make_parser, report, run_script

from nf_pipeline import RunConfig, train
from nf_pipeline.config import resolve_config
from nf_pipeline.events import Event, StageDone, StageStarted

NUM_THREADS = 1


@dataclass(frozen=True, kw_only=True)
class Mode:
    """One way to use the workers.

    Attributes:
        name: in the table.
        settings: that differ from the other modes', by dotted field.
    """

    name: str
    settings: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Result:
    """One run.

    Attributes:
        mode, seed: which.
        batches: per worker, one per block.
        blocks_s: wall seconds from the first block's start to the last one's end.
        slowest_block_s: training and writing seconds of the block that took longest.
        all_blocks_s: the same of all blocks together.
        val_accuracy, test_accuracy: of the chosen exit, in [0, 1].
        last_exit: validation accuracy of the deepest exit, which no choice has touched.
    """

    mode: str
    seed: int
    batches: list[int]
    blocks_s: float
    slowest_block_s: float
    all_blocks_s: float
    val_accuracy: float
    test_accuracy: float
    last_exit: float


def modes(num_workers: int, round_epochs: int) -> list[Mode]:
    """Lists what is compared."""
    return [
        Mode(name="sequential, no overlap", settings={"cluster.overlap": False}),
        Mode(name="sequential", settings={}),
        Mode(name="pipelined", settings={"train.mode": "pipelined", "train.round_epochs": round_epochs}),
        Mode(name=f"{num_workers} workers per block", settings={"train.workers_per_block": num_workers}),
    ]


def compare_modes(arguments: argparse.Namespace) -> list[Result]:
    """Runs every mode with every seed on one cluster."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(arguments.workers):
            cluster.add_node(num_cpus=NUM_THREADS)
        cluster.wait_for_nodes()
        results = []
        for seed in range(arguments.seeds):
            for mode in modes(arguments.workers, arguments.round_epochs):
                results.append(_run(arguments, mode, seed, cluster.address))
                print(json.dumps(asdict(results[-1])), file=sys.stderr, flush=True)
        return results
    finally:
        cluster.shutdown()


def _run(arguments: argparse.Namespace, mode: Mode, seed: int, address: str) -> Result:
    events: list[Event] = []
    with tempfile.TemporaryDirectory() as folder:
        summary = train(_config(arguments, mode, seed, address, folder), on_event=events.append)
    blocks = [block["train_s"] + block["write_s"] for block in summary["blocks"]]
    return Result(
        mode=mode.name,
        seed=seed,
        batches=[block["batch_size"] for block in summary["blocks"]],
        blocks_s=_seconds_of_blocks(events),
        slowest_block_s=max(blocks),
        all_blocks_s=sum(blocks),
        val_accuracy=summary["val_accuracy"],
        test_accuracy=summary["test_accuracy"],
        last_exit=summary["exits"][-1]["val_accuracy"],
    )


def _config(arguments: argparse.Namespace, mode: Mode, seed: int, address: str, folder: str) -> RunConfig:
    settings = {
        "data.source": arguments.data,
        "data.max_train_images": arguments.max_train_images,
        "model.name": arguments.model,
        "memory.budget_bytes": arguments.memory_budget,
        "train.epochs": arguments.epochs,
        "train.seed": seed,
        "train.device": "cpu",
        "storage.uri": folder,
        "cluster.executor": "ray",
        "cluster.address": address,
        "cluster.num_threads": NUM_THREADS,
    }
    return resolve_config(assignments=arguments.set, flags={**settings, **mode.settings})


def _seconds_of_blocks(events: Sequence[Event]) -> float:
    of_blocks = [event for event in events if event.stage.startswith("block-")]
    began = min(event.time_s for event in of_blocks if isinstance(event, StageStarted))
    return max(event.time_s for event in of_blocks if isinstance(event, StageDone)) - began


def table(results: Sequence[Result]) -> str:
    """Renders medians of the times and means of the accuracies, one line per mode."""
    lines = [
        "| mode | seeds | batch per worker | blocks s | all blocks s | slowest block s | blocks / slowest "
        "| val | test | deepest exit, val |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(result.mode for result in results):
        lines.append(_row(name, [result for result in results if result.mode == name]))
    return "\n".join(lines)


def _row(name: str, runs: Sequence[Result]) -> str:
    cells = [
        name,
        str(len(runs)),
        ", ".join(map(str, runs[0].batches)),
        f"{statistics.median(run.blocks_s for run in runs):.0f}",
        f"{statistics.median(run.all_blocks_s for run in runs):.0f}",
        f"{statistics.median(run.slowest_block_s for run in runs):.0f}",
        f"{statistics.median(run.blocks_s / run.slowest_block_s for run in runs):.2f}",
        _spread([run.val_accuracy for run in runs]),
        _spread([run.test_accuracy for run in runs]),
        _spread([run.last_exit for run in runs]),
    ]
    return "| " + " | ".join(cells) + " |"


def _spread(parts: Sequence[float]) -> str:
    percents = [100 * part for part in parts]
    if len(percents) == 1:
        return f"{percents[0]:.1f} %"
    return f"{statistics.mean(percents):.1f} ± {statistics.stdev(percents):.1f} %"


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = make_parser(__doc__)
    size = {"model": "convnet", "memory_budget": "4MiB", "max_train_images": None, "epochs": 8}
    add_run_options(parser, **size, seeds=3)
    add_settings(parser)
    parser.add_argument("--round-epochs", type=int, default=1, help="epochs between rounds, pipelined [%(default)s]")
    parser.add_argument("--workers", type=int, default=2, help="nodes of one CPU each [%(default)s]")
    return parser.parse_args(given)


def main() -> None:
    """Compares and reports."""
    arguments = parse_arguments()
    results = compare_modes(arguments)
    report(arguments, table(results), {"results": [asdict(result) for result in results]})


if __name__ == "__main__":
    run_script(main)
