"""The pipeline's configuration for a cell: data, optimiser and schedule of every method come from here.

Entry: `config_for`.
"""

from pathlib import Path
from typing import Any

from nf_pipeline.bench.cells import Cell
from nf_pipeline.bench.methods import method_named, shared_settings
from nf_pipeline.bench.settings import BenchSettings
from nf_pipeline.config import RunConfig, resolve_config

RUN = "bench"
"""Name of every run; what tells them apart is their store. So ingested images are the same files for all."""


def config_for(settings: BenchSettings, cell: Cell, store: Path, *, epochs: int | None = None) -> RunConfig:
    """Returns the configuration of a cell.

    Args:
        cell: its method may be none; then only the images are meant.
        store: folder of the run.
        epochs: None takes those of the settings.

    Raises:
        ConfigError: a setting cannot be used.
    """
    flags: dict[str, Any] = {
        "run": RUN,
        "data.source": settings.data,
        "data.max_train_images": settings.max_train_images,
        "data.val_fraction": settings.val_fraction,
        "model.name": cell.model,
        "memory.budget_bytes": max(1, cell.budget_bytes),
        "memory.max_batch_size": settings.max_batch,
        "train.epochs": epochs or settings.epochs,
        "train.augment": settings.augment,
        "train.device": settings.device,
        "train.seed": cell.seed,
        "train.lr": cell.lr,
        "storage.uri": str(store),
        "cluster.executor": "inline",
        "cluster.address": settings.address,
        "cluster.num_threads": settings.num_threads,
    }
    flags |= shared_settings(settings.assignments)
    if cell.method:
        method = method_named(cell.method)
        flags["train.precision"] = method.precision
        flags |= method.changes
    return resolve_config(flags=flags)
