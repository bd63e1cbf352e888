"""Measures what a run takes besides training, as seconds and as parts of a run of ten minutes.

    python workflows/benchmarks/overheads.py --data DIR --max-train-images 4000 --epochs 2

Every repetition trains the same run twice, inline and on a local Ray, each in a fresh process, in turns which comes
first; the inline process then trains the same blocks once more from tensors in memory. Medians over the repetitions:

- start-up: from the command to the first training step, without reading images and without planning;
- profiling and planning: the plan stage;
- Ray: what the whole process takes longer than the inline one;
- storage: what the blocks take longer than in memory, which is reading, waiting, writing, checkpoints and manifests,
  counting bytes, reporting.

The first three do not grow with a run; storage does, and is given as its part of the blocks' time. Entry: `measure`.

Shapes: N batch, C channels, H, W.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from measuring import add_run_options, make_parser, report, run_script

TEN_MINUTES_S = 600.0
WANTED_PART = 0.05
COUNTED = ("start-up, inline", "profiling and planning", "Ray", "storage")
FIXED = "once per run: seconds / 600"
GROWING = "grows with the run: part of the blocks' seconds, an upper bound for longer epochs"
CHILD_TIMEOUT_S = 3600.0


def measure(arguments: argparse.Namespace) -> list[dict[str, dict[str, float]]]:
    """Runs all repetitions; returns per repetition and executor what the child measured."""
    repetitions = []
    for repetition in range(arguments.repetitions):
        order = ("inline", "ray") if repetition % 2 == 0 else ("ray", "inline")
        repetitions.append({executor: run_child(arguments, executor) for executor in order})
        print(f"repetition {repetition + 1} of {arguments.repetitions}", file=sys.stderr, flush=True)
    return repetitions


def run_child(arguments: argparse.Namespace, executor: str) -> dict[str, float]:
    """Trains one run in a fresh process and returns what it measured, with the seconds of the whole process.

    Raises:
        SystemExit: the process failed.
    """
    with tempfile.TemporaryDirectory(prefix="nf-overheads-") as folder:
        settings = {
            "data": {"source": arguments.data, "max_train_images": arguments.max_train_images},
            "model": {"name": arguments.model},
            "memory": {"budget_bytes": arguments.memory_budget},
            "train": {"epochs": arguments.epochs, "unit_layers": arguments.unit_layers, "device": "cpu"},
            "exits": {"patience": "never"},
            "storage": {"uri": folder, "cache": "shards"},
            "cluster": {"executor": executor, "num_threads": arguments.num_threads},
        }
        command = [sys.executable, __file__, "--child", json.dumps(settings)]
        began_s = time.time()
        done = subprocess.run(command, capture_output=True, text=True, timeout=CHILD_TIMEOUT_S)
    if done.returncode != 0:
        raise SystemExit(f"{executor}: exit code {done.returncode}\n{done.stderr}")
    measured = json.loads(done.stdout.splitlines()[-1])
    measured["first_step_s"] = measured.pop("first_step_at") - began_s
    measured["process_s"] = measured.pop("trained_at") - began_s
    return measured


def summarise(repetitions: Sequence[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Takes medians: per kind of overhead, seconds and the part of a run of ten minutes.

    What does not grow with the run counts with its seconds. Storage grows with it: its part of the blocks' time is
    what it takes of a longer run too, however short this one is.
    """

    def median(of: Any) -> float:
        return statistics.median(of(repetition["inline"], repetition["ray"]) for repetition in repetitions)

    seconds = {
        "start-up, inline": median(lambda inline, ray: _start_up(inline)),
        "profiling and planning": median(lambda inline, ray: inline["plan_s"]),
        "Ray": median(lambda inline, ray: ray["process_s"] - inline["process_s"]),
    }
    found = {name: {"seconds": spent, "part": spent / TEN_MINUTES_S} for name, spent in seconds.items()}
    found["storage"] = {
        "seconds": median(lambda inline, ray: inline["blocks_s"] - inline["memory_s"]),
        "part": median(lambda inline, ray: 1 - inline["memory_s"] / inline["blocks_s"]),
    }
    for name in ("loader_wait_s", "write_s"):
        found[f"of storage: {name}"] = {
            "seconds": median(lambda inline, ray, name=name: inline[name]),
            "part": median(lambda inline, ray, name=name: inline[name] / inline["blocks_s"]),
        }
    found["together"] = {key: sum(found[name][key] for name in COUNTED) for key in ("seconds", "part")}
    return found


def render_table(overheads: dict[str, dict[str, float]]) -> str:
    """Formats one row per overhead as Markdown, and how the sum comes about."""
    lines = ["| overhead | seconds, this run | of a run of ten minutes | because |", "| --- | --- | --- | --- |"]
    for name, found in overheads.items():
        why = "the sum of the counted ones" if name == "together" else FIXED if name in COUNTED[:-1] else GROWING
        lines.append(f"| {name} | {found['seconds']:.1f} | {found['part']:.1%} | {why} |")
    together = overheads["together"]["part"]
    verdict = "below" if together < WANTED_PART else "not below"
    text = (
        f"together {together:.1%} of a run of ten minutes, {verdict} {WANTED_PART:.0%}; counted: {', '.join(COUNTED)}"
    )
    return "\n".join([*lines, "", text])


def train_in_memory(config: Any, num_threads: int) -> float:
    """Trains the blocks of a finished run again, from tensors in memory, and returns the seconds.

    The same units, batch sizes, steps and validations; rows are drawn by a permutation per epoch, nothing is stored.
    Reading the images into memory is not counted.
    """
    import torch

    from nf_pipeline.driver.run_record import load_plan
    from nf_pipeline.storage.layout import RunLayout
    from nf_pipeline.storage.store import open_store
    from nf_pipeline.worker.feed import open_feed
    from nf_pipeline.worker.stage_input import read_ingest

    store, layout = open_store(config.storage.uri), RunLayout(config.run)
    plan, ingest = load_plan(store, layout), read_ingest(store, layout)
    splits = {}
    for split in ("train", "val"):
        feed = open_feed(store, ingest, split, batch_size=128, device=torch.device("cpu"))
        batches = [(batch.take_x(), batch.y_N) for batch in feed.batches()]
        splits[split] = tuple(torch.cat(parts) for parts in zip(*batches, strict=True))
    began = time.perf_counter()
    for block_idx in range(len(plan.blocks)):
        splits = _block_in_memory(config, plan, block_idx, num_threads, splits)
    return time.perf_counter() - began


def _block_in_memory(config: Any, plan: Any, block_idx: int, num_threads: int, splits: dict[str, Any]) -> dict:
    import torch

    from nf_pipeline.core.train_step import forward_block, make_optimizer, train_step
    from nf_pipeline.worker.evaluate import set_training
    from nf_pipeline.worker.schedule import peak_learning_rate, set_learning_rate
    from nf_pipeline.worker.tasks import BlockTask
    from nf_pipeline.worker.train_block import units_of

    batch_size = plan.blocks[block_idx].batch_size
    task = BlockTask(
        config=config,
        plan=plan,
        block_idx=block_idx,
        batch_size=batch_size,
        attempt="memory",
        num_attempts=1,
        num_threads=num_threads,
    )
    units = units_of(task)[1]
    peak_lr = peak_learning_rate(config.train.lr, batch_size)
    optimizers = [make_optimizer(unit, config.train, peak_lr) for unit in units]
    x_NCHW, y_N = splits["train"]
    set_training(units, True)
    for epoch in range(config.train.epochs):
        parts = [rows for rows in torch.randperm(len(y_N)).split(batch_size) if len(rows) > 1]  # batch norm
        for step, rows in enumerate(parts):
            set_learning_rate(optimizers, config.train, epoch * len(parts) + step, len(parts), peak_lr)
            train_step(units, optimizers, x_NCHW[rows], y_N[rows], config.train.precision)
        set_training(units, False)
        for rows in torch.arange(len(splits["val"][1])).split(batch_size):
            forward_block(units, splits["val"][0][rows], config.train.precision, with_heads=True)
        set_training(units, True)
    if block_idx == len(plan.blocks) - 1:
        return splits
    set_training(units, False)
    return {split: (_outputs(units, x, batch_size, config), y) for split, (x, y) in splits.items()}


def _outputs(units: Sequence[Any], x_NCHW: Any, batch_size: int, config: Any) -> Any:
    import torch

    from nf_pipeline.core.train_step import forward_block

    parts = x_NCHW.split(batch_size)
    return torch.cat([forward_block(units, x, config.train.precision, with_heads=False)[0] for x in parts])


def _start_up(measured: dict[str, float]) -> float:
    return measured["first_step_s"] - measured["ingest_s"] - measured["plan_s"]


def _child(settings: dict[str, Any]) -> None:
    """Trains one run, from importing the package on, and prints what it measured."""
    from nf_pipeline import RunConfig, train
    from nf_pipeline.events import Event, StageDone, StageStarted

    config = RunConfig.model_validate(settings)
    spent: dict[str, float] = {}
    steps: list[float] = []

    def listen(event: Event) -> None:
        if isinstance(event, StageDone):
            spent[event.stage] = event.seconds
        elif isinstance(event, StageStarted) and event.stage == "block-000":
            steps.append(time.time())  # the worker has built its units and opened its input

    summary = train(config, on_event=listen)
    trained_at = time.time()
    measured = {
        "first_step_at": steps[0],
        "trained_at": trained_at,
        "ingest_s": spent["ingest"],
        "plan_s": spent["plan"],
        "blocks_s": sum(seconds for stage, seconds in spent.items() if stage.startswith("block-")),
        "loader_wait_s": sum(block["loader_wait_s"] for block in summary["blocks"]),
        "write_s": sum(block["write_s"] for block in summary["blocks"]),
    }
    if config.cluster.executor == "inline":
        measured["memory_s"] = train_in_memory(config, config.cluster.num_threads)
    print(json.dumps(measured))


def _parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__, "bench-results/overheads.json")
    size = {"model": "vgg11_bn", "memory_budget": "96MiB", "max_train_images": None, "epochs": 2, "unit_layers": None}
    add_run_options(parser, **size, num_threads=os.cpu_count())
    parser.add_argument("--repetitions", type=int, default=3, help="of all measurements [%(default)s]")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args()


def _main() -> None:
    arguments = _parse_arguments()
    if arguments.child is not None:
        _child(arguments.child)
        return
    repetitions = measure(arguments)
    overheads = summarise(repetitions)
    report(arguments, render_table(overheads), {"repetitions": repetitions, "overheads": overheads})


if __name__ == "__main__":
    run_script(_main)
