"""What a benchmark compares, as plain numbers: stored beside its results and read by every process of it.

Knows nothing of torch, processes or tables. Entry class: `BenchSettings`.
"""

from dataclasses import asdict, dataclass
from typing import Any

# What may change between two calls that go on with the same results.
_FREE = ("models", "methods", "budgets", "num_seeds", "address")


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """One benchmark.

    Attributes:
        data: as for `data.source`.
        models: registry names or `package.module:factory`.
        methods: for `nf_pipeline.bench.methods.method_named`, in the order of the tables.
        budgets: bytes; empty computes them for every model from what fits.
        num_seeds: repetitions, with seeds 0, 1, ...
        epochs: passes over the train split: of a baseline, and of every block of the pipeline.
        max_train_images: stratified subset of the train split; None takes all.
        val_fraction: part of the train split that becomes the validation split, where the data brings none.
        augment: as `train.augment`.
        assignments: "section.field=value", for every method; see `nf_pipeline.bench.methods.shared_settings`.
        device: "cpu" or "cuda".
        num_threads: CPU threads of every method.
        max_batch: batches never grow beyond this.
        search_seconds: training of one try in the search for a learning rate, at least an epoch, at most the whole
            schedule; 0 searches nothing and takes the default.
        search_tries: learning rates tried at most, per search.
        give_up: a baseline ends when it has taken so many times the seconds of backpropagation's whole schedule at
            this budget and not reached its accuracy; None trains all to the end.
        address: Ray cluster of the methods that need one; None starts a local one.
    """

    data: str = "digits"
    models: tuple[str, ...] = ("convnet",)
    methods: tuple[str, ...] = ()
    budgets: tuple[int, ...] = ()
    num_seeds: int = 1
    epochs: int = 8
    max_train_images: int | None = None
    val_fraction: float = 0.1
    augment: str = "none"
    assignments: tuple[str, ...] = ()
    device: str = "cpu"
    num_threads: int = 1
    max_batch: int = 128
    search_seconds: float = 8.0
    search_tries: int = 5
    give_up: float | None = None
    address: str | None = None

    def public(self) -> dict[str, Any]:
        """Returns all settings for people; of the data its name: where it lies is nobody's business."""
        return {**asdict(self), "data": short_name(self.data), "address": None}

    def fixed(self) -> dict[str, Any]:
        """Returns what all cells of one folder of results have in common."""
        return {name: value for name, value in self.public().items() if name not in _FREE}


def short_name(name: str) -> str:
    """Returns the last part of a path, a URI or "module:name"; of "torchvision:NAME:ROOT" the data set's name."""
    if name.startswith("torchvision:"):
        return name.split(":")[1]
    return name.rstrip("/").rpartition("/")[2].rpartition(":")[2]
