"""Measures what each process of a run takes of its host's memory, as the data grows, and prints one table.

    python workflows/benchmarks/host_memory.py --images 4000 --factors 1 4 16

For each size, images of noise are written as Parquet, the same for the same arguments. Then every stage runs alone in
a fresh process, as a worker would run it, and once more the whole run through a local Ray, whose driver is measured.
What is measured is VmHWM of that very process (/proc/self/status): the most physical memory that it ever had,
libraries that it shares with others included. "Idle" is what it had after its imports, before its stage began.
Linux only. Entry: `measure_sizes`.

The loader keeps up to two windows of four shards: shards are small by default here, so that its buffers are full at
the smallest size already and only what grows with the data is left to see. Ingest shuffles within windows of 16,384
images or 64 MiB: below so many it takes more memory for more images.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from measuring import add_settings, make_parser, report, run_script

from nf_pipeline.config import RunConfig, resolve_config, validate_config
from nf_pipeline.driver.run_record import open_run
from nf_pipeline.errors import NFError
from nf_pipeline.events import StageDone
from nf_pipeline.executors.base import load_stage
from nf_pipeline.plans import Plan
from nf_pipeline.storage.layout import RunLayout, new_attempt_id
from nf_pipeline.storage.store import open_store
from nf_pipeline.worker.tasks import (
    BLOCK_STAGE,
    INGEST_STAGE,
    MODEL_STAGE,
    PLAN_STAGE,
    AssembleTask,
    BlockTask,
    PrepareTask,
)

NUM_THREADS = 1
STAGE_TIMEOUT_S = 7200.0


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Host memory of one process.

    Attributes:
        process: "ingest", "plan", "block-000", ..., "model" or "driver".
        num_images: of the data set, all splits together.
        num_shards: that the ingested images take.
        idle_bytes: resident after the imports.
        peak_bytes: most that was ever resident.
        seconds: of the stage, or of the whole run.
    """

    process: str
    num_images: int
    num_shards: int
    idle_bytes: int
    peak_bytes: int
    seconds: float


def measure_sizes(arguments: argparse.Namespace) -> Iterator[Usage]:
    """Measures every process at every size, smallest first."""
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        for factor in arguments.factors:
            folder = Path(scratch, f"{factor}x")
            num_images = factor * arguments.images
            yield from measure_stages(arguments, folder, num_images)
            if not arguments.no_driver:
                yield _measure("driver", _config(arguments, folder, "driver"), folder, num_images)


def write_images(folder: Path, num_images: int, arguments: argparse.Namespace) -> None:
    """Writes images of noise, with one label each, as Parquet files of one row group each."""
    import io

    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    folder.mkdir(parents=True)
    side, rows = arguments.image_size, arguments.rows_per_file
    for start in range(0, num_images, rows):
        random = np.random.default_rng([0, start])
        encoded, labels = [], []
        for row in range(start, min(start + rows, num_images)):
            label = row % arguments.classes
            brightness = np.uint8(127 * label // arguments.classes)
            pixels = random.integers(0, 128, (side, side, 3), np.uint8) + brightness
            sink = io.BytesIO()
            Image.fromarray(pixels).save(sink, arguments.format)
            encoded.append({"bytes": sink.getvalue(), "path": None})
            labels.append(label)
        table = pa.table({"image": encoded, "label": labels})
        pq.write_table(table, folder / f"part-{start // rows:05d}.parquet", row_group_size=rows)


def measure_stages(
    arguments: argparse.Namespace, folder: Path, num_images: int, stages: Sequence[str] = ()
) -> Iterator[Usage]:
    """Measures the stages of one run on images that are written first.

    Args:
        arguments: see `parse_arguments`.
        folder: for the images and the run.
        num_images: all splits together.
        stages: those to run, in order; all of them when not given.
    """
    write_images(folder / "data", num_images, arguments)
    config = _config(arguments, folder, "stages")
    config = open_run(open_store(config.storage.uri), RunLayout(config.run), config, NUM_THREADS)
    for stage in stages or ("ingest", "plan"):
        yield _measure(stage, config, folder, num_images)
    if not stages:
        for block in _read_plan(folder).blocks:
            yield _measure(f"block-{block.block_idx:03d}", config, folder, num_images)
        yield _measure("model", config, folder, num_images)


def _measure(process: str, config: RunConfig, folder: Path, num_images: int) -> Usage:
    (folder / "config.json").write_text(config.model_dump_json(), encoding="utf8")
    done = subprocess.run(
        [sys.executable, __file__, "--measure", process, str(folder)],
        capture_output=True,
        text=True,
        timeout=STAGE_TIMEOUT_S,
        env=_environment(),
    )
    if done.returncode:
        raise NFError(f"{process} ended with exit code {done.returncode}: {done.stderr[-2000:]}")
    measured = json.loads(done.stdout.splitlines()[-1])
    shards = len(list(Path(config.storage.uri, config.run, "ingest").rglob("*.parquet")))
    return Usage(process=process, num_images=num_images, num_shards=shards, **measured)


def _environment() -> dict[str, str]:
    """Lets workers find this module, for its model; one thread."""
    folders = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "OMP_NUM_THREADS": str(NUM_THREADS), "PYTHONPATH": os.pathsep.join(folders)}


def small_net(num_classes: int, image_shape: tuple[int, int, int]) -> Any:
    """Builds four small convolutions: what training computes must not hide what reading and writing hold."""
    from torch import nn

    channels = [image_shape[0], 8, 8, 16, 16]
    layers = [
        nn.Sequential(nn.Conv2d(before, after, 3, 1 + idx % 2, 1), nn.BatchNorm2d(after), nn.ReLU())
        for idx, (before, after) in enumerate(itertools.pairwise(channels))
    ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels[-1], num_classes))


def measure_this_process(process: str, folder: Path) -> dict[str, float]:
    """Runs a stage, or a whole run as its driver, in this process and reads what it took."""
    config = validate_config(json.loads((folder / "config.json").read_text(encoding="utf8")))
    run = _drive if process == "driver" else _load(process, config, folder)
    idle, began = _resident_bytes("VmRSS"), time.monotonic()
    run(config, folder)
    seconds = round(time.monotonic() - began, 1)
    return {"idle_bytes": idle, "peak_bytes": _resident_bytes("VmHWM"), "seconds": seconds}


def _load(process: str, config: RunConfig, folder: Path) -> Any:
    name, task = _task(process, config, folder)
    stage = load_stage(name)

    def run(config: RunConfig, folder: Path) -> None:
        for event in stage(task):
            if isinstance(event, StageDone) and process == "plan":
                (folder / "plan.json").write_text(json.dumps(event.result), encoding="utf8")

    return run


def _task(process: str, config: RunConfig, folder: Path) -> tuple[str, Any]:
    shared = {"config": config, "attempt": new_attempt_id(), "num_threads": NUM_THREADS}
    if process in ("ingest", "plan"):
        return INGEST_STAGE if process == "ingest" else PLAN_STAGE, PrepareTask(**shared)
    plan = _read_plan(folder)
    if process == "model":
        return MODEL_STAGE, AssembleTask(plan=plan, num_blocks=len(plan.blocks), **shared)
    block = plan.blocks[int(process.removeprefix("block-"))]
    task = BlockTask(plan=plan, block_idx=block.block_idx, batch_size=block.batch_size, num_attempts=1, **shared)
    return BLOCK_STAGE, task


def _drive(config: RunConfig, folder: Path) -> None:
    from nf_pipeline import train

    train(config)
    if "torch" in sys.modules:
        raise NFError("the driver has imported torch")


def _read_plan(folder: Path) -> Plan:
    return Plan.from_json(json.loads((folder / "plan.json").read_text(encoding="utf8")))


def _resident_bytes(field: str) -> int:
    # https://man7.org/linux/man-pages/man5/proc_pid_status.5.html: kB there are KiB
    lines = Path("/proc/self/status").read_text(encoding="utf8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _config(arguments: argparse.Namespace, folder: Path, run: str) -> RunConfig:
    settings = {
        "run": run,
        "data.source": str(folder / "data"),
        "model.name": arguments.model,
        "memory.budget_bytes": arguments.memory_budget,
        "train.epochs": 1,
        "train.device": "cpu",
        "storage.uri": str(folder / "runs"),
        "storage.shard_bytes": arguments.shard_bytes,
        "cluster.executor": "ray",
        "cluster.num_threads": NUM_THREADS,
    }
    return resolve_config(assignments=arguments.set, flags=settings)


def table(usages: Sequence[Usage]) -> str:
    """Renders one line per process, one column per size."""
    sizes = sorted({usage.num_images for usage in usages})
    lines = [
        "| process | idle | " + " | ".join(f"{size:,} images" for size in sizes) + " | last - first |",
        "|---" * (len(sizes) + 3) + "|",
    ]
    for process in dict.fromkeys(usage.process for usage in usages):
        own = sorted((usage for usage in usages if usage.process == process), key=lambda usage: usage.num_images)
        peaks = [usage.peak_bytes for usage in own]
        cells = [own[0].idle_bytes, *peaks, peaks[-1] - peaks[0]]
        lines.append(f"| {process} | " + " | ".join(f"{cell / 2**20:.0f} MiB" for cell in cells) + " |")
    return "\n".join(lines)


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--images", type=int, default=4000, help="at the smallest size, all splits [%(default)s]")
    parser.add_argument("--factors", type=int, nargs="+", default=[1, 4, 16], help="of --images [%(default)s]")
    parser.add_argument("--image-size", type=int, default=32, help="pixels per side [%(default)s]")
    parser.add_argument("--rows-per-file", type=int, default=500, help="of the stored images [%(default)s]")
    parser.add_argument("--classes", type=int, default=10, help="number of labels [%(default)s]")
    parser.add_argument("--format", choices=("JPEG", "PNG", "BMP"), default="JPEG", help="[%(default)s]")
    parser.add_argument("--model", default="host_memory:small_net", help="as for nf-pipeline train [%(default)s]")
    parser.add_argument("--memory-budget", default="3MiB", help="as for nf-pipeline train [%(default)s]")
    parser.add_argument("--shard-bytes", default="512KiB", help="storage.shard_bytes [%(default)s]")
    add_settings(parser)
    parser.add_argument("--no-driver", action="store_true", help="measure the stages only, without Ray")
    parser.add_argument("--scratch", type=Path, help="where images and runs go, and are removed again")
    parser.add_argument("--measure", nargs=2, metavar=("PROCESS", "FOLDER"), help=argparse.SUPPRESS)
    return parser.parse_args(given)


def main() -> None:
    """Measures and reports."""
    arguments = parse_arguments()
    if arguments.measure:
        process, folder = arguments.measure
        print(json.dumps(measure_this_process(process, Path(folder))))
        return
    usages = []
    for usage in measure_sizes(arguments):
        usages.append(usage)
        print(json.dumps(asdict(usage)), file=sys.stderr, flush=True)
    report(arguments, table(usages), {"usages": [asdict(usage) for usage in usages]})


if __name__ == "__main__":
    run_script(main)
