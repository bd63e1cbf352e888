"""Trains one model with every type of stored activations, on the same images and seeds, and prints one table.

    python workflows/benchmarks/shard_types.py --data DIR --output shard_types.json

Every run is the same but for `storage.dtype` and `storage.codec`; the first block, which reads images, is the same
bit for bit whatever its outputs are stored as. Seeds are the outer loop and types the inner one, so that a slow
minute of the machine does not hit one type alone. Accuracies are those of the deepest exit, which has read through
the most stored activations and which no choice has touched, on the validation split, and of the chosen one on the
test split. The difference is to float32 with the same seed: its spread says what noise is. Entry: `compare_types`.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

from nf_pipeline import RunConfig, train
from nf_pipeline.bench.settings import short_name
from nf_pipeline.config import resolve_config
from nf_pipeline.errors import NFError

TYPES = (
    ("float32", "none"),
    ("float16", "none"),
    ("bfloat16", "none"),
    ("uint8", "none"),
    ("float16", "zstd"),
    ("uint8", "zstd"),
)
REFERENCE = "float32, none"


@dataclass(frozen=True, kw_only=True)
class Result:
    """One run.

    Attributes:
        kind: type and codec.
        seed: of the run.
        shard_bytes: stored activations of all blocks.
        write_s, loader_wait_s, train_s: sums over the blocks.
        fed_wait_s, fed_train_s: waiting and training seconds of the blocks that read activations.
        run_s: of the whole run.
        last_val, chosen_test: accuracies in [0, 1].
    """

    kind: str
    seed: int
    shard_bytes: int
    write_s: float
    loader_wait_s: float
    train_s: float
    fed_wait_s: float
    fed_train_s: float
    run_s: float
    last_val: float
    chosen_test: float


def compare_types(arguments: argparse.Namespace) -> list[Result]:
    """Runs every type with every seed."""
    results = []
    for seed in range(arguments.seeds):
        for dtype, codec in TYPES:
            results.append(_run(arguments, dtype, codec, seed))
            print(json.dumps(asdict(results[-1])), file=sys.stderr, flush=True)
    return results


def _run(arguments: argparse.Namespace, dtype: str, codec: str, seed: int) -> Result:
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        start = time.perf_counter()
        summary = train(_config(arguments, dtype, codec, seed, folder))
        run_s = time.perf_counter() - start
    blocks = summary["blocks"]
    return Result(
        kind=f"{dtype}, {codec}",
        seed=seed,
        shard_bytes=sum(block["shard_bytes"] for block in blocks),
        write_s=sum(block["write_s"] for block in blocks),
        loader_wait_s=sum(block["loader_wait_s"] for block in blocks),
        train_s=sum(block["train_s"] for block in blocks),
        fed_wait_s=sum(block["loader_wait_s"] for block in blocks[1:]),
        fed_train_s=sum(block["train_s"] for block in blocks[1:]),
        run_s=run_s,
        last_val=summary["exits"][-1]["val_accuracy"],
        chosen_test=summary["test_accuracy"],
    )


def _config(arguments: argparse.Namespace, dtype: str, codec: str, seed: int, folder: str) -> RunConfig:
    settings = {
        "data.source": arguments.data,
        "data.max_train_images": arguments.max_train_images,
        "data.image_size": arguments.image_size,
        "data.val_fraction": 0.2,
        "model.name": arguments.model,
        "memory.budget_bytes": arguments.memory_budget,
        "train.unit_layers": arguments.unit_layers,
        "train.epochs": arguments.epochs,
        "train.seed": seed,
        "train.device": "cpu",
        "exits.patience": "never",
        "storage.uri": folder,
        "storage.dtype": dtype,
        "storage.codec": codec,
        "storage.cache": "shards",
        "cluster.executor": "inline",
        "cluster.num_threads": arguments.threads,
    }
    return resolve_config(assignments=arguments.set, flags=settings)


def render_table(results: Sequence[Result]) -> str:
    """Formats one row per type as Markdown: medians of times, means and standard deviations of accuracies."""
    lines = [
        "| stored as | bytes | write s | loader wait s | of training, blocks that read activations | blocks s "
        "| deepest exit, val | to float32, points | chosen exit, test | to float32, points |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    reference = {result.seed: result for result in results if result.kind == REFERENCE}
    for kind in dict.fromkeys(result.kind for result in results):
        runs = [result for result in results if result.kind == kind]
        lines.append(_row(kind, runs, [reference[run.seed] for run in runs if run.seed in reference]))
    return "\n".join(lines)


def _row(kind: str, runs: Sequence[Result], references: Sequence[Result]) -> str:
    pairs = list(zip(runs, references, strict=len(references) > 0)) if references else []
    cells = [
        kind,
        f"{runs[0].shard_bytes / 2**20:.1f} MiB",
        f"{statistics.median(run.write_s for run in runs):.2f}",
        f"{statistics.median(run.loader_wait_s for run in runs):.2f}",
        f"{statistics.median(run.fed_wait_s / run.fed_train_s for run in runs):.1%}",
        f"{statistics.median(run.train_s + run.write_s for run in runs):.1f}",
        _spread([run.last_val for run in runs]),
        _spread([run.last_val - base.last_val for run, base in pairs], sign="+"),
        _spread([run.chosen_test for run in runs]),
        _spread([run.chosen_test - base.chosen_test for run, base in pairs], sign="+"),
    ]
    return "| " + " | ".join(cells) + " |"


def _spread(parts: Sequence[float], sign: str = "") -> str:
    percents = [100 * part for part in parts]
    if len(percents) < 2:
        return "".join(f"{percent:{sign}.1f}" for percent in percents)
    return f"{statistics.mean(percents):{sign}.2f} ± {statistics.stdev(percents):.2f}"


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="as for nf-pipeline train")
    parser.add_argument("--model", default="convnet", help="as for nf-pipeline train")
    parser.add_argument("--memory-budget", default="8MiB", help="what training may hold")
    parser.add_argument("--max-train-images", type=int, default=2500, help="stratified, seeded subset")
    parser.add_argument("--image-size", type=int, default=16, help="pixels on both sides")
    parser.add_argument("--unit-layers", type=int, default=2, help="layers per head: fixes the plan")
    parser.add_argument("--epochs", type=int, default=4, help="per block")
    parser.add_argument("--seeds", type=int, default=3, help="runs per type")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of training")
    parser.add_argument("--folder", help="where runs are stored meanwhile; by default that of temporary files")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="any other setting")
    parser.add_argument("--output", type=Path, help="JSON with all results; the table goes beside it as .md")
    return parser.parse_args(given)


def main() -> None:
    """Compares, prints the table and writes both files."""
    arguments = parse_arguments()
    results = compare_types(arguments)
    processor = platform.processor() or platform.machine()
    title = (
        f"{arguments.model}, {arguments.max_train_images:,} images, {arguments.epochs} epochs per block, "
        f"{arguments.seeds} seeds, {arguments.threads} thread; {date.today()}, {processor}, "
        f"Python {platform.python_version()}"
    )
    table = f"{title}\n\n{render_table(results)}\n"
    print(table)
    if arguments.output:
        settings = {name: str(value) for name, value in vars(arguments).items() if name not in ("folder", "output")}
        settings["data"] = short_name(arguments.data)
        document = {"title": title, "settings": settings, "results": [asdict(result) for result in results]}
        arguments.output.write_text(json.dumps(document, indent=2) + "\n", encoding="utf8")
        arguments.output.with_suffix(".md").write_text(table, encoding="utf8")


if __name__ == "__main__":
    try:
        main()
    except NFError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
