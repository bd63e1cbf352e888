"""Where tests find the real CIFAR-10 as Parquet, if this machine has it."""

import os
from pathlib import Path

import pytest


def find_cifar10() -> Path | None:
    """Returns the folder in NF_TEST_CIFAR10, else shared/data/cifar10 beside the checkout, if it is there."""
    given = os.environ.get("NF_TEST_CIFAR10")
    folder = Path(given) if given else Path(__file__).parents[2] / "shared/data/cifar10"
    return folder if folder.is_dir() and any(folder.glob("*.parquet")) else None


def require_cifar10() -> Path:
    """Returns the folder, or skips the test."""
    folder = find_cifar10()
    if folder is None:
        pytest.skip("no CIFAR-10: set NF_TEST_CIFAR10 to a folder with its Parquet files")
    return folder
