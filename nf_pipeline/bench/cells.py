"""What has to be measured: every method at every budget with every seed, each under a name of its own.

Pure: no processes, no files. Entries: `Cell`, `CellRequest`, `training_cells`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from nf_pipeline.bench.settings import BenchSettings


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One measurement, made by one process.

    Attributes:
        kind: "facts" of a model and its images, "budgets" that suit it, "search" for a learning rate, or "train".
        model: name of the network.
        method: key of `METHODS`; "" for facts and budgets.
        budget_bytes: 0 for facts and budgets.
        seed: of weights, split and order.
        lr: peak learning rate at batch 128, of a training.
    """

    kind: Literal["facts", "budgets", "search", "train"]
    model: str
    method: str = ""
    budget_bytes: int = 0
    seed: int = 0
    lr: float | None = None

    @property
    def name(self) -> str:
        """Names its files; the learning rate follows from the search and is left out."""
        model = re.sub(r"[^A-Za-z0-9_]+", "-", self.model)
        if not self.method:
            return f"{self.kind}-{model}"
        seed = f"-seed{self.seed}" if self.kind == "train" else ""
        return f"{self.kind}-{model}-{self.budget_bytes}-{self.method}{seed}"


@dataclass(frozen=True, kw_only=True)
class CellRequest:
    """What a process is asked to do.

    Attributes:
        settings: of the benchmark.
        cell: to measure.
        output: folder of the results.
        work: folder of runs and unfinished states; nothing in it is needed once all cells are finished.
        seconds: to spend; None takes as long as it takes.
    """

    settings: BenchSettings
    cell: Cell
    output: str
    work: str
    seconds: float | None = None


def training_cells(settings: BenchSettings, budgets: Mapping[str, Sequence[int]]) -> Iterator[Cell]:
    """Yields every training: seed by seed, so that repetitions are interleaved and a first full table comes early.

    Loose budgets come first: learning rates found there serve the tight ones, where steps are slow.

    Args:
        budgets: bytes, by model.
    """
    for seed in range(settings.num_seeds):
        for model in settings.models:
            for budget in sorted(budgets[model], reverse=True):
                for method in settings.methods:
                    yield Cell(kind="train", model=model, method=method, budget_bytes=budget, seed=seed)
