"""Trains the same layers with stored, recomputed and automatically chosen inputs, on a fast and on a slow store.

    python workflows/benchmarks/cache_policy.py --data FILE.parquet

Case "local folder": a ResNet-18, whose shards come from the machine's own disk: computing the wide maps of its first
layers again for every block, in every epoch, costs more than reading what they lead to. Case "slow S3": a small
network and a real S3 server behind a proxy that lets so many bytes a second pass per request. Every layer has a head
of its own; a run's seconds are those of training and writing of all its blocks, as its summary has them, and "waited"
is the part of them in which training waited for data. Policies take turns, so that a slow minute of the
machine does not hit one alone. S3 server and proxy are those of the tests (`pip install '.[test]'`), found beside
this file's folder. Entry: `compare`.
"""

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from measuring import add_run_options, make_parser, report, run_script

from nf_pipeline import train
from nf_pipeline.config import resolve_config
from nf_pipeline.driver.status import read_plan

POLICIES = ("shards", "recompute", "auto")
TESTS = Path(__file__).parents[2] / "tests"


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is trained where.

    Attributes:
        name: in the table.
        model, memory_budget, max_train_images, epochs: as for `nf-pipeline train`.
    """

    name: str
    model: str
    memory_budget: str
    max_train_images: int
    epochs: int


LOCAL = Case(name="local folder", model="resnet18", memory_budget="96MiB", max_train_images=120, epochs=6)
SLOW = Case(name="slow S3", model="convnet", memory_budget="40MiB", max_train_images=200, epochs=1)
CASES = {case.name: case for case in (LOCAL, SLOW)}


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
    """Runs every policy in every case, `--repeats` times."""
    results = []
    needs_s3 = SLOW.name in arguments.cases
    with slow_s3(folder, arguments.slow_bytes_per_s) if needs_s3 else contextlib.nullcontext("") as slow:
        for name in arguments.cases:
            case, store = CASES[name], slow if name == SLOW.name else str(folder / "runs")
            for repeat in range(arguments.repeats):
                for policy in POLICIES:
                    results.append(_run(arguments, case, policy, f"{store}/{policy}-{repeat}"))
                    print(f"{name}, {policy}: {results[-1].seconds:.1f} s", file=sys.stderr, flush=True)
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


def _run(arguments: argparse.Namespace, case: Case, policy: str, uri: str) -> Result:
    store, _, name = uri.rpartition("/")
    config = resolve_config(
        flags={
            "data.source": arguments.data,
            "data.image_size": arguments.image_size,
            "data.max_train_images": case.max_train_images,
            "model.name": case.model,
            "memory.budget_bytes": case.memory_budget,
            "memory.join_threshold": 0.0,
            "train.local": "layer",
            "train.epochs": case.epochs,
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
    plan = read_plan(uri)
    blocks = summary["blocks"]
    return Result(
        case=case.name,
        policy=policy,
        sources=[block.source_block for block in plan.blocks],
        stored_bytes=sum(block["shard_bytes"] for block in blocks),
        predicted_s=plan.predicted_s,
        seconds=sum(block["train_s"] + block["write_s"] for block in blocks),
        waited_s=sum(block["loader_wait_s"] for block in blocks),
        last_exit=summary["exits"][-1]["val_accuracy"],
    )


def table(results: Sequence[Result]) -> str:
    """Renders medians per case and policy, and per case a sentence on what `auto` took."""
    lines = [
        "| case | `--cache` | input of each block | stored MB | predicted s | measured s | waited s | last exit |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    cases = list(dict.fromkeys(result.case for result in results))
    for case in cases:
        lines += [_row([run for run in results if (run.case, run.policy) == (case, policy)]) for policy in POLICIES]
    return "\n".join([*lines, "", *(_sentence(case, results) for case in cases)])


def _row(runs: Sequence[Result]) -> str:
    last = runs[-1]
    inputs = " ".join("images" if source < 0 else str(source + 1) for source in last.sources)
    return (
        f"| {last.case} | {last.policy} | {inputs} | {last.stored_bytes / 1e6:.0f} "
        f"| {_median(runs, 'predicted_s'):.1f} | {_median(runs, 'seconds'):.1f} | {_median(runs, 'waited_s'):.1f} "
        f"| {100 * last.last_exit:.1f} % |"
    )


def _sentence(case: str, results: Sequence[Result]) -> str:
    of = {policy: [run for run in results if (run.case, run.policy) == (case, policy)] for policy in POLICIES}
    seconds = {policy: _median(runs, "seconds") for policy, runs in of.items()}
    slower, faster = sorted(("shards", "recompute"), key=lambda policy: -seconds[policy])
    num_same = sum(
        ours == theirs for ours, theirs in zip(of["auto"][-1].sources, of[faster][-1].sources, strict=True)
    )
    return (
        f"- {case}: {faster} is {seconds[slower] / seconds[faster]:.1f} times as fast as {slower}; auto takes the "
        f"input of {faster} for {num_same} of {len(of['auto'][-1].sources)} blocks and "
        f"{seconds['auto'] / seconds[faster]:.2f} of its time"
    )


def _median(runs: Sequence[Result], name: str) -> float:
    return statistics.median(getattr(run, name) for run in runs)


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = make_parser(__doc__, "bench-results/cache-policy.json")
    add_run_options(parser, num_threads=1)
    parser.add_argument("--image-size", type=int, default=32, help="pixels on both sides [%(default)s]")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), help="[%(default)s]")
    parser.add_argument(
        "--slow-bytes-per-s", type=float, default=4e6, help="of every request, in either direction [%(default)s]"
    )
    parser.add_argument("--repeats", type=int, default=1, help="of every run [%(default)s]")
    return parser.parse_args()


def main() -> None:
    """Compares and reports."""
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        results = compare(arguments, Path(folder))
    report(arguments, table(results), {"runs": [asdict(result) for result in results]})


if __name__ == "__main__":
    run_script(main)
