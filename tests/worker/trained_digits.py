"""A small finished run on the shipped digits, whose shards hold what training computed, bit for bit."""

from typing import Any

from nf_pipeline.config import RunConfig, resolve_config
from nf_pipeline.driver.run import train

FLOAT32_DIGITS = {
    "memory.budget_bytes": "4MiB",
    "train.epochs": 2,
    "train.device": "cpu",
    "storage.dtype": "float32",
    "cluster.executor": "inline",
    "cluster.num_threads": 1,
}


def train_digits(uri: str, changes: dict[str, Any]) -> RunConfig:
    """Trains a run to its end.

    Args:
        uri: of the store.
        changes: settings by dotted field.
    """
    config = resolve_config(flags={**FLOAT32_DIGITS, "storage.uri": uri, **changes})
    train(config)
    return config
