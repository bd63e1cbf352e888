"""Measures what a run takes besides training, as seconds and as parts of a run of ten minutes.

    python workflows/benchmarks/overheads.py --data DIR --max-train-images 8000 --epochs 4

Every repetition trains one epoch per block twice, inline and on a local Ray, each in a fresh process, in turns which
comes first. Then one more process trains all epochs inline, and after each epoch the same one from tensors in memory:
taken in turns, both meet the same machine. Medians over the repetitions:

- start-up: from the command to the first training step, without reading images and without planning;
- profiling and planning: the plan stage;
- Ray: what the whole process takes longer than the inline one;

and from the process that trains all epochs:

- opening blocks, writing activations: once per block, the latter less the forward passes;
- epochs: what they take longer than in memory, which is reading, hashing, waiting, checkpoints and reports.

What comes once counts with its seconds. Epochs count with their part of their own time, as a run of ten minutes has
as many as fit in. Entry: `measure`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from measuring import add_run_options, make_parser, report, run_script

TEN_MINUTES_S = 600.0
WANTED_PART = 0.05
ONCE = ("start-up, inline", "profiling and planning", "Ray", "opening blocks", "writing activations")
EPOCHS = "epochs"
CHILD_TIMEOUT_S = 3600.0

Measured = dict[str, float]


def measure(arguments: argparse.Namespace) -> dict[str, list[Measured]]:
    """Runs all processes; returns what each measured, by kind: "inline" and "ray" per repetition, "beside" once."""
    found: dict[str, list[Measured]] = {"inline": [], "ray": [], "beside": []}
    for repetition in range(arguments.repetitions):
        for executor in ("inline", "ray") if repetition % 2 == 0 else ("ray", "inline"):
            found[executor].append(run_child(arguments, executor, epochs=1))
        print(f"repetition {repetition + 1} of {arguments.repetitions}", file=sys.stderr, flush=True)
    found["beside"].append(run_child(arguments, "inline", epochs=arguments.epochs, is_beside_memory=True))
    return found


def run_child(
    arguments: argparse.Namespace, executor: str, *, epochs: int, is_beside_memory: bool = False
) -> Measured:
    """Trains one run in a fresh process and returns what it measured, with the seconds of the whole process.

    Raises:
        SystemExit: the process failed.
    """
    with tempfile.TemporaryDirectory(prefix="nf-overheads-") as folder:
        settings = {
            "data": {"source": arguments.data, "max_train_images": arguments.max_train_images},
            "model": {"name": arguments.model},
            "memory": {"budget_bytes": arguments.memory_budget},
            "train": {"epochs": epochs, "unit_layers": arguments.unit_layers, "device": "cpu"},
            "exits": {"patience": "never"},
            "storage": {"uri": folder, "cache": "shards"},
            "cluster": {"executor": executor, "num_threads": arguments.num_threads},
        }
        command = [sys.executable, __file__, "--child", json.dumps(settings)]
        command += ["--beside-memory"] if is_beside_memory else []
        began_s = time.time()
        done = subprocess.run(command, capture_output=True, text=True, timeout=CHILD_TIMEOUT_S)
    if done.returncode != 0:
        raise SystemExit(f"{executor}: exit code {done.returncode}\n{done.stderr}")
    measured = json.loads(done.stdout.splitlines()[-1])
    measured["first_step_s"] = measured.pop("first_step_at") - began_s
    measured["process_s"] = measured.pop("trained_at") - began_s
    return measured


def summarise(found: dict[str, list[Measured]]) -> dict[str, dict[str, float]]:
    """Returns per kind of overhead its seconds and its part of a run of ten minutes; see the module's docstring."""

    def median(seconds_of: Callable[[Measured, Measured], float]) -> float:
        return statistics.median(map(seconds_of, found["inline"], found["ray"]))

    (beside,) = found["beside"]
    once = (
        median(lambda inline, ray: inline["first_step_s"] - inline["ingest_s"] - inline["plan_s"]),
        median(lambda inline, ray: inline["plan_s"]),
        median(lambda inline, ray: ray["process_s"] - inline["process_s"]),
        beside["opening_s"],
        beside["writing_s"] - beside["memory_writing_s"],
    )
    overheads = {
        name: {"seconds": spent, "part": spent / TEN_MINUTES_S} for name, spent in zip(ONCE, once, strict=True)
    }
    longer_s = beside["epochs_s"] - beside["memory_epochs_s"]
    overheads[EPOCHS] = {"seconds": longer_s, "part": longer_s / beside["epochs_s"]}
    overheads["together"] = {
        key: sum(overheads[name][key] for name in (*ONCE, EPOCHS)) for key in ("seconds", "part")
    }
    return overheads


def render_table(overheads: dict[str, dict[str, float]]) -> str:
    """Formats one row per overhead as Markdown, and how the sum comes about."""
    because = {**dict.fromkeys(ONCE, "once: seconds / 600"), EPOCHS: "part of the epochs' seconds", "together": "sum"}
    lines = ["| overhead | seconds, measured | of a run of ten minutes | because |", "| --- | --- | --- | --- |"]
    for name, found in overheads.items():
        lines.append(f"| {name} | {found['seconds']:.1f} | {found['part']:.1%} | {because[name]} |")
    together = overheads["together"]["part"]
    verdict = "below" if together < WANTED_PART else "not below"
    return "\n".join([*lines, "", f"together {together:.1%} of a run of ten minutes, {verdict} {WANTED_PART:.0%}"])


def _child(settings: dict[str, Any], *, is_beside_memory: bool) -> None:
    """Trains one run, from importing the package on, and prints what it measured."""
    from nf_pipeline import RunConfig, train
    from nf_pipeline.events import Event, StageDone, StageStarted

    config = RunConfig.model_validate(settings)
    spent: Measured = {}
    steps: list[float] = []
    beside = _beside_memory(config) if is_beside_memory else None

    def listen(event: Event) -> None:
        if isinstance(event, StageDone):
            spent[event.stage] = event.seconds
        elif isinstance(event, StageStarted) and event.stage == "block-000":
            steps.append(time.time())  # the worker has built its units and opened its input
        if beside is not None:
            beside.hear(event)

    train(config, on_event=listen)
    measured = {
        "first_step_at": steps[0],
        "trained_at": time.time(),
        "ingest_s": spent["ingest"],
        "plan_s": spent["plan"],
        **(beside.spent if beside else {}),
    }
    print(json.dumps(measured))


def _beside_memory(config: Any) -> Any:
    from in_memory import BesideMemory  # imports what a driver of a Ray cluster does without

    return BesideMemory(config)


def _parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__, "bench-results/overheads.json")
    size = {"model": "vgg11_bn", "memory_budget": "96MiB", "max_train_images": None, "epochs": 2, "unit_layers": None}
    add_run_options(parser, **size, num_threads=os.cpu_count())
    parser.add_argument("--repetitions", type=int, default=3, help="of the pair of short runs [%(default)s]")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--beside-memory", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def _main() -> None:
    arguments = _parse_arguments()
    if arguments.child is not None:
        _child(arguments.child, is_beside_memory=arguments.beside_memory)
        return
    found = measure(arguments)
    overheads = summarise(found)
    report(arguments, render_table(overheads), {"measured": found, "overheads": overheads})


if __name__ == "__main__":
    run_script(_main)
