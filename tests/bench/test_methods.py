"""Methods by name, and with settings of their own."""

from pathlib import Path

import pytest

from nf_pipeline.bench.cells import Cell
from nf_pipeline.bench.methods import in_order, method_named
from nf_pipeline.bench.run_config import config_for
from nf_pipeline.bench.settings import BenchSettings
from nf_pipeline.errors import ConfigError

VARIANT = "nf-layer+train.head=linear+exits.patience=never"


def test_settings_in_a_methods_name_reach_the_runs_configuration() -> None:
    cell = Cell(kind="train", model="convnet", method=VARIANT, budget_bytes=2**20)
    config = config_for(BenchSettings(), cell, Path("store"))
    assert (config.train.local, config.train.head, config.exits.patience) == ("layer", "linear", None)
    assert method_named(VARIANT).title == "nf-pipeline, layer by layer, head=linear, patience=never"


def test_methods_with_other_settings_have_files_of_their_own() -> None:
    names = {Cell(kind="train", model="m", method=name).name for name in ("nf", "nf-layer", VARIANT)}
    assert len(names) == 3
    assert all(name.replace("-", "").replace("_", "").isalnum() for name in names)


def test_methods_are_listed_once_and_variants_after_what_they_vary() -> None:
    assert in_order(["dgl", "nf+train.lr=1", "bp", "nf", "bp"]) == ["nf", "nf+train.lr=1", "bp", "dgl"]


@pytest.mark.parametrize("name", ["bp+train.lr=1", "nf+train.lr", "nf+", "nfx", ""])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="--methods"):
        method_named(name)
