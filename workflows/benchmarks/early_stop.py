"""Trains with stopping early, then goes on to the end, seed by seed, and prints what stopping saved and changed.

    python workflows/benchmarks/early_stop.py --data FILE.parquet

Every seed is trained with the rule. The very same run then continues with `--stop never`: the blocks that both have
are the same objects, so the two choices differ by nothing but the blocks that were left out. What the whole run would
have taken is what the ended one took, and the training and writing of these blocks. The network has seventeen layers
that all cost about the same, one unit of `--unit-layers` to a block. Of a data set that is one file, validation and
test images are split off; a test split of its own is read whole, twice a seed. Entry: `compare_seed`.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from deep_network import DEEP_NETWORK
from measuring import add_run_options, make_parser, report, run_script

from nf_pipeline import RunConfig, resume, train
from nf_pipeline.config import ExitsConfig
from nf_pipeline.core.early_stop import reason_to_stop
from nf_pipeline.core.hits import Hits
from nf_pipeline.storage.layout import RunLayout
from nf_pipeline.storage.manifest import read_manifest
from nf_pipeline.storage.store import open_store


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a run ended with.

    Attributes:
        num_blocks: that were trained.
        exit_layer: of the chosen exit.
        val_accuracy, test_accuracy: of the chosen exit, in [0, 1].
        params: weights of the final model.
    """

    num_blocks: int
    exit_layer: str
    val_accuracy: float
    test_accuracy: float | None
    params: int


@dataclass(frozen=True, kw_only=True)
class Seed:
    """One seed.

    Attributes:
        seed: of the run.
        stopped, whole: with the rule, and trained to the end.
        num_planned: blocks of the plan.
        seconds: wall time of the run with the rule, all stages and the final model included.
        left_out_s: training and writing of the blocks that it left out.
        num_val: validation images.
        val_accuracies: of all exits of the whole run.
        would_stop_after: number of blocks after which a patience of 1, 2 or 3 ends this very run; all for never.
    """

    seed: int
    stopped: Choice
    whole: Choice
    num_planned: int
    seconds: float
    left_out_s: float
    num_val: int
    val_accuracies: list[float]
    would_stop_after: dict[str, int]

    @property
    def saved(self) -> float:
        """The part of the whole run's seconds that stopping saved."""
        return self.left_out_s / (self.seconds + self.left_out_s)

    @property
    def has_same_exit(self) -> bool:
        """Whether the whole run chooses the exit that the rule ended with."""
        return self.stopped.exit_layer == self.whole.exit_layer


def compare_seed(arguments: argparse.Namespace, seed: int) -> Seed:
    """Trains a seed with the rule, then the blocks that it left out."""
    with tempfile.TemporaryDirectory(prefix="nf-early-stop-") as folder:
        config = _config(arguments, seed, folder)
        began = time.monotonic()
        stopped = train(config)
        seconds = time.monotonic() - began
        whole = resume(f"{folder}/{config.run}", patience="never", model=config.model.name)
        facts = [_facts(folder, config.run, idx) for idx in range(len(whole["blocks"]))]
    left_out = whole["blocks"][len(stopped["blocks"]) :]
    found = Seed(
        seed=seed,
        stopped=_choice(stopped),
        whole=_choice(whole),
        num_planned=whole["num_blocks_planned"],
        seconds=seconds,
        left_out_s=sum(block["train_s"] + block["write_s"] for block in left_out),
        num_val=whole["split_rows"]["val"],
        val_accuracies=[exit["val_accuracy"] for exit in whole["exits"]],
        would_stop_after={str(patience): _stops_after(facts, patience) for patience in (1, 2, 3)},
    )
    print(f"seed {seed}: {seconds:.0f} s and {found.left_out_s:.0f} s", file=sys.stderr, flush=True)
    return found


def render_table(seeds: Sequence[Seed]) -> str:
    """Formats one row per run as Markdown, and the sentence that sums them up."""
    titles = ("seed", "stop", "seconds", "blocks", "exit", "val", "test", "parameters", "same exit")
    lines = [f"| {' | '.join(titles)} |", "|" + " --- |" * len(titles)]
    for one in seeds:
        lines.append(_row(one, "early", one.stopped, one.seconds, "yes" if one.has_same_exit else "no"))
        lines.append(_row(one, "never", one.whole, one.seconds + one.left_out_s, ""))
    saved, num_same = [one.saved for one in seeds], sum(one.has_same_exit for one in seeds)
    text = (
        f"{statistics.mean(saved):.0%} of the time saved ({', '.join(f'{part:.0%}' for part in saved)}); the same "
        f"exit in {num_same} of {len(seeds)} seeds ({seeds[0].num_val:,} validation images)"
    )
    return "\n".join([*lines, "", text])


def _row(one: Seed, stop: str, choice: Choice, seconds: float, same: str) -> str:
    cells = (
        str(one.seed),
        stop,
        f"{seconds:.0f}",
        f"{choice.num_blocks} of {one.num_planned}",
        choice.exit_layer,
        f"{choice.val_accuracy:.1%}",
        "-" if choice.test_accuracy is None else f"{choice.test_accuracy:.1%}",
        f"{choice.params:,}",
        same,
    )
    return f"| {' | '.join(cells)} |"


def _choice(summary: dict[str, Any]) -> Choice:
    return Choice(
        num_blocks=len(summary["blocks"]),
        exit_layer=summary["exits"][summary["chosen_exit"]]["layer"],
        val_accuracy=summary["val_accuracy"],
        test_accuracy=summary["test_accuracy"],
        params=summary["params_final"],
    )


def _stops_after(facts: Sequence[dict[str, Any]], patience: int) -> int:
    blocks = [[Hits.from_text(text, block["num_val"]) for text in block["val_hits"]] for block in facts]
    found = (stop for stop in range(1, len(facts)) if reason_to_stop(blocks[:stop], patience))
    return next(found, len(facts))


def _facts(folder: str, run: str, block_idx: int) -> dict[str, Any]:
    return read_manifest(open_store(folder), RunLayout(run).block_manifest(block_idx)).facts


def _config(arguments: argparse.Namespace, seed: int, folder: str) -> RunConfig:
    return RunConfig(
        data={
            "source": arguments.data,
            "max_train_images": arguments.max_train_images,
            "val_fraction": arguments.val_fraction,
        },
        model={"name": DEEP_NETWORK},
        memory={"budget_bytes": arguments.memory_budget, "join_threshold": 0.0},  # a block is one unit
        train={
            "epochs": arguments.epochs,
            "unit_layers": arguments.unit_layers,
            "seed": seed,
            "device": "cpu",
        },
        exits={"patience": arguments.patience},
        storage={"uri": folder},
        cluster={"executor": "inline", "num_threads": arguments.num_threads},
    )


def _parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__, "bench-results/early-stop.json")
    size = {"max_train_images": 7000, "epochs": 3, "memory_budget": "10MiB", "unit_layers": 2}
    add_run_options(parser, **size, num_threads=os.cpu_count(), seeds=3)
    parser.add_argument("--val-fraction", type=float, default=0.5, help="of the train split [%(default)s]")
    parser.add_argument("--patience", type=int, default=ExitsConfig().patience, help="of the rule [%(default)s]")
    return parser.parse_args()


def _main() -> None:
    arguments = _parse_arguments()
    seeds = [compare_seed(arguments, seed) for seed in range(arguments.seeds)]
    report(arguments, render_table(seeds), {"seeds": [{**asdict(one), "saved": one.saved} for one in seeds]})


if __name__ == "__main__":
    run_script(_main)
