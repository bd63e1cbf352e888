"""Trains one model block by block and by backpropagation on the same images and prints both in one table.

    python workflows/benchmarks/compare.py
    python workflows/benchmarks/compare.py --data DIR --model vgg11_bn --memory-budget 64MiB \\
        --max-train-images 8000 --bp-lr 0.05 0.02 0.01

A fair baseline has a learning rate of its own: every method of backpropagation is repeated with every `--bp-lr`.

One process, one after the other, the same threads. The pipeline's seconds contain everything after reading
the images up to the look at the test split: profiling, planning, training all blocks with a validation after
every epoch, writing and reading activations. Those of backpropagation contain training and the validation
after every epoch, not the choice of its batch.
Entry: `compare`.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from backprop import BackpropResult, Method, open_task, train_by_backprop

from nf_pipeline import RunConfig, train
from nf_pipeline.config import TrainConfig
from nf_pipeline.errors import NFError
from nf_pipeline.events import EpochDone, Event, StageDone
from nf_pipeline.units import format_bytes

METHODS = {
    "budget": Method(name="backprop"),
    "checkpointing": Method(name="backprop + checkpointing", checkpointing=True),
    "micro-batch": Method(name="backprop + micro-batches", micro_batch=True),
    "all-savings": Method(name="backprop + both", checkpointing=True, micro_batch=True),
    "no-budget": Method(name="backprop, no budget", within_budget=False),
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table; see the column titles in `TITLES`.

    Attributes:
        method: what trained.
        batch: samples per optimiser step, per block.
        epochs: passes over the train split, per block.
        measured_peak_bytes: largest over the blocks; None if nothing was trained.
        budget_bytes: None without a budget.
        train_s: wall seconds.
        val_accuracy, test_accuracy: in [0, 1].
        params: weights of the resulting model.
        note: what the numbers cannot say.
    """

    method: str
    batch: list[int]
    epochs: int
    measured_peak_bytes: int | None
    budget_bytes: int | None
    train_s: float | None
    val_accuracy: float | None
    test_accuracy: float | None
    params: int
    note: str


TITLES = (
    "method",
    "batch",
    "epochs",
    "measured peak",
    "budget",
    "train s",
    "val",
    "test",
    "parameters",
    "note",
)


def compare(config: RunConfig, methods: Sequence[Method], bp_epochs: int) -> dict[str, Any]:
    """Trains with the pipeline, then with every method of backpropagation.

    Args:
        config: of a run that does not exist yet.
        methods: from `METHODS`.
        bp_epochs: passes of backpropagation over the train split.

    Returns:
        A JSON document: settings, machine, the run's summary, every result and the table's `rows`.
    """
    clock = _Clock()
    began = time.monotonic()
    summary = train(config, on_event=clock.add)
    pipeline_s = time.monotonic() - began - clock.not_training_s
    uri = f"{config.storage.uri.rstrip('/')}/{config.run}"
    task = open_task(uri, epochs=bp_epochs, num_threads=config.cluster.num_threads)
    results = []
    for method in methods:
        print(method.name, file=sys.stderr, flush=True)
        results.append(train_by_backprop(task, method))
    rows = [pipeline_row(summary, config, pipeline_s), *(backprop_row(result) for result in results)]
    return {
        "settings": config.model_dump(mode="json"),
        "machine": _machine(config),
        "summary": summary,
        "backprop": [asdict(result) for result in results],
        "rows": [asdict(row) for row in rows],
    }


def pipeline_row(summary: dict[str, Any], config: RunConfig, train_s: float) -> Row:
    """Turns a run's summary into the table's first line."""
    blocks, chosen = summary["blocks"], summary["exits"][summary["chosen_exit"]]
    return Row(
        method="nf-pipeline",
        batch=[block["batch_size"] for block in blocks],
        epochs=config.train.epochs,
        measured_peak_bytes=max(block["measured_peak_bytes"] for block in blocks),
        budget_bytes=summary["memory_budget_bytes"],
        train_s=train_s,
        val_accuracy=summary["val_accuracy"],
        test_accuracy=summary["test_accuracy"],
        params=summary["params_final"],
        note=f"{len(blocks)} blocks, exit after {chosen['layer']}",
    )


def backprop_row(result: BackpropResult) -> Row:
    """Turns a baseline's result into a line of the table."""
    accumulates = result.fits and result.micro_batch_size < result.batch_size
    note = f"forward passes of {result.micro_batch_size}" if accumulates else ""
    if not result.fits:
        note = f"does not fit: batch 2 needs {format_bytes(result.predicted_peak_bytes)}"
    return Row(
        method=result.method,
        batch=[result.batch_size] if result.fits else [],
        epochs=result.epochs,
        measured_peak_bytes=result.measured_peak_bytes,
        budget_bytes=result.budget_bytes,
        train_s=result.train_s,
        val_accuracy=result.val_accuracy,
        test_accuracy=result.test_accuracy,
        params=result.params,
        note=note,
    )


def render_table(rows: Sequence[dict[str, Any]]) -> str:
    """Formats rows as a Markdown table."""
    cells = [TITLES, tuple("---" for _ in TITLES), *(_cells(Row(**row)) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _cells(row: Row) -> tuple[str, ...]:
    def optional(value: float | None, template: str) -> str:
        return "-" if value is None else template.format(value)

    return (
        row.method,
        ", ".join(map(str, row.batch)) or "-",
        str(row.epochs) if row.batch else "-",
        "-" if row.measured_peak_bytes is None else format_bytes(row.measured_peak_bytes),
        "-" if row.budget_bytes is None else format_bytes(row.budget_bytes),
        optional(row.train_s, "{:.0f}"),
        optional(row.val_accuracy, "{:.1%}"),
        optional(row.test_accuracy, "{:.1%}"),
        f"{row.params:,}",
        row.note,
    )


class _Clock:
    """Listens to a run: how long reading images and testing the final model took, and a line per epoch."""

    def __init__(self) -> None:
        self.not_training_s = 0.0

    def add(self, event: Event) -> None:
        if isinstance(event, StageDone) and event.stage in ("ingest", "model"):
            self.not_training_s += event.seconds
        elif isinstance(event, EpochDone):
            accuracies = ", ".join(f"{100 * accuracy:.1f}" for accuracy in event.val_accuracies)
            print(
                f"{event.stage} epoch {event.epoch}/{event.num_epochs} | loss {event.losses[-1]:.3f} "
                f"| val {accuracies} % | peak {format_bytes(event.peak_bytes)}",
                file=sys.stderr,
                flush=True,
            )


def _with_rate(method: Method, lr: float | None) -> Method:
    return method if lr is None else replace(method, name=f"{method.name}, lr {lr:g}", lr=lr)


def _machine(config: RunConfig) -> dict[str, Any]:
    cuda = torch.cuda.is_available() and config.train.device != "cpu"
    return {
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "num_threads": config.cluster.num_threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="as for nf-pipeline train [default: digits]")
    parser.add_argument("--model", default="convnet", help="as for nf-pipeline train [default: convnet]")
    parser.add_argument("--memory-budget", default="4MiB", help="of pipeline and backprop [default: 4MiB]")
    parser.add_argument("--max-train-images", type=int, help="stratified, seeded subset [default: all]")
    parser.add_argument("--epochs", type=int, default=8, help="of the pipeline, per block [default: 8]")
    parser.add_argument("--bp-epochs", type=int, help="of backpropagation [default: as --epochs]")
    parser.add_argument("--bp-lr", type=float, nargs="+", help="of backprop, at batch 128 [default: the pipeline's]")
    parser.add_argument(
        "--unit-layers", type=int, default=TrainConfig().unit_layers, help="layers per local unit [%(default)s]"
    )
    parser.add_argument("--seed", type=int, default=0, help="[default: 0]")
    parser.add_argument("--device", default="cpu", choices=["auto", "cpu", "cuda"], help="[default: cpu]")
    parser.add_argument(
        "--methods", nargs="*", choices=list(METHODS), default=list(METHODS), help="baselines [default: all]"
    )
    parser.add_argument("--num-threads", type=int, default=os.cpu_count(), help="CPU threads [default: all]")
    parser.add_argument("--store", help="folder or s3://... that keeps the run [default: a temporary folder]")
    parser.add_argument("--output", type=Path, help="JSON file [default: bench-results/compare-MODEL.json]")
    return parser.parse_args()


def _make_config(arguments: argparse.Namespace, store_uri: str) -> RunConfig:
    return RunConfig(
        run=f"compare-{arguments.model}-{time.time_ns()}",  # a run that was there would be resumed, not timed
        data={"source": arguments.data, "max_train_images": arguments.max_train_images},
        model={"name": arguments.model},
        memory={"budget_bytes": arguments.memory_budget},
        train={
            "epochs": arguments.epochs,
            "unit_layers": arguments.unit_layers,
            "seed": arguments.seed,
            "device": arguments.device,
        },
        storage={"uri": store_uri},
        cluster={"executor": "inline", "num_threads": arguments.num_threads},
    )


def _main() -> int:
    arguments = _parse_arguments()
    output = arguments.output or Path("bench-results") / f"compare-{arguments.model}.json"
    methods = [_with_rate(METHODS[name], lr) for name in arguments.methods for lr in arguments.bp_lr or [None]]
    with tempfile.TemporaryDirectory(prefix="nf-compare-") as folder:
        config = _make_config(arguments, arguments.store or folder)
        try:
            document = compare(config, methods, arguments.bp_epochs or arguments.epochs)
        except NFError as error:
            print(f"Error: {error}", file=sys.stderr)
            return error.exit_code
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(document, indent=2) + "\n", encoding="utf8")
    print(render_table(document["rows"]))
    print(f"\n{output}")
    return 0


if __name__ == "__main__":
    sys.exit(_main())
