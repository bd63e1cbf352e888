"""Configurations for runs that are large in one thing and tiny in all others."""

from pathlib import Path
from typing import Any

from nf_pipeline.config import RunConfig, resolve_config

SMALLEST = {
    "memory.budget_bytes": "4MiB",
    "train.epochs": 1,
    "exits.patience": "never",
    "cluster.executor": "inline",
    "cluster.num_threads": 1,
    "train.device": "cpu",
}


def make_config(store: Path | str, **changes: Any) -> RunConfig:
    """Makes a configuration that differs from the smallest one in the given fields, "__" for the dot."""
    changed = {key.replace("__", "."): value for key, value in changes.items()}
    return resolve_config(flags={**SMALLEST, "storage.uri": str(store), **changed})
