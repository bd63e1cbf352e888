"""Shared by the driver's tests: a small, fast configuration on the shipped digits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from damaged_runs import Run, finish
from driver_config import DIGITS

from nf_pipeline.config import RunConfig, resolve_config


@pytest.fixture
def digits_config(tmp_path: Path) -> Callable[..., RunConfig]:
    """Returns a maker of configurations that differ from the fast one in the given dotted fields."""

    def make(**changes: Any) -> RunConfig:
        flags = {"storage.uri": str(tmp_path / "runs"), **DIGITS}
        return resolve_config(flags={**flags, **{key.replace("__", "."): v for key, v in changes.items()}})

    return make


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A small finished run that nobody may change."""
    return finish(tmp_path_factory.mktemp("finished"))


@pytest.fixture(scope="session")
def other_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run of the same name with another seed."""
    return finish(tmp_path_factory.mktemp("other"), train__seed=1, train__epochs=1)
