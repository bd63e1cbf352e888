"""Trains the same layers with stored, recomputed and automatically chosen inputs, on a fast and on a slow store.

    python workflows/benchmarks/cache_policy.py --data DIR --output cache_policy.json

Case "local folder": shards come from the machine's own disk, and computing the layers before a block again costs more
than reading. Case "slow S3": a real S3 server behind a proxy that lets so many bytes a second pass per request. Both
train one block per layer, as the tight budget wants it, on the same images; a run's seconds are those of training and
writing of all its blocks, as its summary has them. Policies take turns, so that a slow minute of the machine does not
hit one alone. S3 server and proxy are those of the tests (`pip install '.[test]'`), found beside this file's folder.
Entry: `compare`.
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from nf_pipeline import train
from nf_pipeline.config import resolve_config
from nf_pipeline.driver.status import read_plan
from nf_pipeline.errors import NFError

POLICIES = ("shards", "recompute", "auto")
TESTS = Path(__file__).parents[2] / "tests"


@dataclass(frozen=True, kw_only=True)
class Result:
    """One run.

    Attributes:
        case, policy: which.
        sources: of every block: -1 is the images.
        stored_bytes: of all activations.
        predicted_s: by the plan, for all blocks.
        seconds: of training and writing, measured.
        waited_s: of these, seconds in which training waited for data.
        last_exit: validation accuracy of the deepest exit.
    """

    case: str
    policy: str
    sources: list[int]
    stored_bytes: int
    predicted_s: float
    seconds: float
    waited_s: float
    last_exit: float


def compare(arguments: argparse.Namespace, folder: Path) -> list[Result]:
    """Runs every policy in both cases, `--repeats` times."""
    results = []
    with slow_s3(folder, arguments.slow_bytes_per_s) as slow:
        for case, store, epochs in (
            ("local folder", str(folder / "runs"), arguments.epochs),
            ("slow S3", slow, arguments.slow_epochs),
        ):
            if arguments.case not in ("both", case):
                continue
            for repeat in range(arguments.repeats):
                for policy in POLICIES:
                    name = f"{policy}-{repeat}"
                    results.append(_run(arguments, case, policy, store, name, epochs))
                    print(f"{case}, {policy}: {results[-1].seconds:.1f} s", file=sys.stderr)
    return results


@contextlib.contextmanager
def slow_s3(folder: Path, bytes_per_s: float) -> Iterator[str]:
    """Starts an S3 server and the proxy in front of it; the environment names the proxy meanwhile."""
    sys.path[:0] = [str(TESTS), str(TESTS / "faults")]
    from fault_proxy import Rule, Throttle, running_proxy
    from s3_servers import find_juicefs, minio_server, moto_server

    juicefs, place = find_juicefs(), folder / "server"
    place.mkdir()
    with (
        minio_server(place, juicefs) if juicefs else moto_server(place) as server,
        running_proxy(server.endpoint) as proxy,
    ):
        proxy.add(Rule(fault=Throttle(bytes_per_s=bytes_per_s), times=None))
        os.environ.update({**server.environment, "AWS_ENDPOINT_URL": proxy.endpoint})
        yield f"s3://{server.make_bucket()}"


def _run(arguments: argparse.Namespace, case: str, policy: str, store: str, name: str, epochs: int) -> Result:
    config = resolve_config(
        flags={
            "data.source": arguments.data,
            "data.image_size": arguments.image_size,
            "data.max_train_images": arguments.max_train_images,
            "model.name": arguments.model,
            "memory.budget_bytes": arguments.memory_budget,
            "memory.join_threshold": 0.0,
            "train.local": "layer",
            "train.epochs": epochs,
            "train.device": "cpu",
            "exits.patience": "never",
            "cluster.executor": "inline",
            "cluster.num_threads": arguments.num_threads,
            "storage.uri": store,
            "storage.cache": policy,
            "run": name,
        }
    )
    summary = train(config)
    plan = read_plan(f"{store}/{name}")
    blocks = summary["blocks"]
    return Result(
        case=case,
        policy=policy,
        sources=[block.source_block for block in plan.blocks],
        stored_bytes=sum(block["shard_bytes"] for block in blocks),
        predicted_s=plan.predicted_s,
        seconds=sum(block["train_s"] + block["write_s"] for block in blocks),
        waited_s=sum(block["loader_wait_s"] for block in blocks),
        last_exit=summary["exits"][-1]["val_accuracy"],
    )


def table(results: Sequence[Result]) -> str:
    """Renders medians per case and policy."""
    lines = [
        "| case | `--cache` | input of each block | stored MB | predicted s | measured s | waited s | last exit |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for case in dict.fromkeys(result.case for result in results):
        for policy in POLICIES:
            runs = [result for result in results if (result.case, result.policy) == (case, policy)]
            seconds, waited = (
                statistics.median(getattr(run, name) for run in runs) for name in ("seconds", "waited_s")
            )
            last = runs[-1]
            inputs = " ".join("images" if source < 0 else str(source + 1) for source in last.sources)
            lines.append(
                f"| {case} | {policy} | {inputs} | {last.stored_bytes / 1e6:.0f} "
                f"| {statistics.median(run.predicted_s for run in runs):.1f} | {seconds:.1f} | {waited:.1f} "
                f"| {100 * last.last_exit:.1f} % |"
            )
    return "\n".join(lines)


def main() -> None:
    """Compares and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="digits")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--max-train-images", type=int, default=300)
    parser.add_argument("--model", default="convnet")
    parser.add_argument("--memory-budget", default="40MiB")
    parser.add_argument("--case", choices=("both", "local folder", "slow S3"), default="both")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--slow-epochs", type=int, default=2)
    parser.add_argument("--slow-bytes-per-s", type=float, default=4e6, help="of every request, in either direction")
    parser.add_argument("--num-threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        try:
            results = compare(arguments, Path(folder))
        except NFError as error:
            sys.exit(f"error: {error}")
    versions = {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.processor()}
    if arguments.output is not None:
        settings = {name: str(value) for name, value in vars(arguments).items()}
        document = {"settings": settings, "versions": versions, "runs": [asdict(result) for result in results]}
        arguments.output.write_text(json.dumps(document, indent=1))
    print(table(results))


if __name__ == "__main__":
    main()
