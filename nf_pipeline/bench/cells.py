"""What has to be measured: every method at every budget with every seed, each under a name of its own.

Pure: no processes, no files. Entries: `Cell`, `CellRequest`, `training_cells`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from nf_pipeline.bench.methods import REFERENCE
from nf_pipeline.bench.settings import BenchSettings

_NO_LETTERS = re.compile(r"[^A-Za-z0-9_]+")
_PLUS_OF_EXPONENT = re.compile(r"(?<=\de)\+(?=\d)")  # 1e+3 and 1e-3 are not to be one name


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One measurement, made by one process.

    Attributes:
        kind: "facts" of a model and its images, "budgets" that suit it, "fit" of a baseline's batch, "search" for a
            learning rate, or "train".
        model: name of the network.
        method: for `method_named`; "" for facts and budgets.
        budget_bytes: 0 for facts and budgets.
        seed: of weights, split and order.
        lr: peak learning rate at batch 128, of a training.
        limit_s: seconds after which a training ends that has not reached `target`; None trains to the end.
        target: validation accuracy.
    """

    kind: Literal["facts", "budgets", "fit", "search", "train"]
    model: str
    method: str = ""
    budget_bytes: int = 0
    seed: int = 0
    lr: float | None = None
    limit_s: float | None = None
    target: float | None = None

    @property
    def name(self) -> str:
        """Names its files; learning rate and limit follow from other cells and are left out."""
        model, method = (_NO_LETTERS.sub("-", _PLUS_OF_EXPONENT.sub("", name)) for name in (self.model, self.method))
        if not method:
            return f"{self.kind}-{model}"
        seed = f"-seed{self.seed}" if self.kind == "train" else ""
        return f"{self.kind}-{model}-{self.budget_bytes}-{method}{seed}"


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

    Loose budgets come first: learning rates found there serve the tight ones, where steps are slow. At every budget
    plain backpropagation comes first: what it takes and reaches limits the other baselines.

    Args:
        budgets: bytes, by model.
    """
    methods = sorted(settings.methods, key=lambda name: name != REFERENCE)
    for seed in range(settings.num_seeds):
        for model in settings.models:
            for budget in sorted(budgets[model], reverse=True):
                for method in methods:
                    yield Cell(kind="train", model=model, method=method, budget_bytes=budget, seed=seed)
