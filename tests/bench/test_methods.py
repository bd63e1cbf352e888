"""Methods by name, and with settings of their own or of all."""

from pathlib import Path

import pytest

from nf_pipeline.bench.cells import Cell
from nf_pipeline.bench.methods import BASELINE_SETTINGS, in_order, method_named, shared_settings
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


@pytest.mark.parametrize(
    "name", ["nf+train.lr", "nf+train.lr=", "nf+", "bp+x", "nf+x+train.lr=1", "nfx", "nfx+train.lr=1", ""]
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="--methods"):
        method_named(name)


@pytest.mark.parametrize("value", ["1e+3", "a+b", "a+b.c", "+", "x=y"])
def test_a_plus_within_a_value_does_not_end_the_setting(value: str) -> None:
    method = method_named(f"nf+train.head={value}+train.weight_decay=1e+0")
    assert method.changes == {"train.head": value, "train.weight_decay": "1e+0"}


def test_exponents_of_different_signs_make_different_file_names() -> None:
    names = {Cell(kind="train", model="m", method=f"nf+train.lr=1e{sign}3").name for sign in ("", "+", "-")}
    assert len(names) == 2  # 1e3 is 1e+3


HONOURED = {"train.label_smoothing": "0.1", "train.mixup": "0.2", "train.loss": "cross_entropy"}


@pytest.mark.parametrize("base", ["bp", "bp-micro", "dgl", "nf"])
@pytest.mark.parametrize("is_shared", [False, True], ids=["in its name", "for all"])
def test_baselines_train_with_the_settings_that_the_pipeline_may_have_too(base: str, is_shared: bool) -> None:
    assignments = [f"{name}={value}" for name, value in HONOURED.items()]
    cell = Cell(kind="train", model="convnet", method=base if is_shared else "+".join([base, *assignments]))
    settings = BenchSettings(assignments=tuple(assignments) if is_shared else ())
    train = config_for(settings, cell, Path("store")).train
    assert (train.label_smoothing, train.mixup, train.loss) == (0.1, 0.2, "cross_entropy")


def test_a_methods_own_setting_counts_more_than_that_of_all() -> None:
    cell = Cell(kind="train", model="convnet", method="bp+train.mixup=0")
    assert config_for(BenchSettings(assignments=("train.mixup=0.2",)), cell, Path("store")).train.mixup == 0.0


IGNORED = [
    *("train.head=linear", "train.loss=predsim", "train.loss=infopro", "train.context=sample", "train.local=layer"),
    *("train.unit_layers=3", "train.views=2", "train.feature_augment=flip", "storage.dtype=uint8", "train.lr=1"),
    *("train.precision=bf16", "exits.patience=1", "memory.safety_margin=0", "train.label_smoothin=1"),
]


@pytest.mark.parametrize("assignment", IGNORED)
@pytest.mark.parametrize("base", ["bp", "bp-both", "dgl"])
def test_setting_that_a_baseline_would_ignore_is_refused_in_its_name_and_for_all(base: str, assignment: str) -> None:
    name = assignment.partition("=")[0]
    with pytest.raises(ConfigError, match=r"--methods .*backpropagation and DGL do not") as own:
        method_named(f"{base}+{assignment}")
    with pytest.raises(ConfigError, match=f"--set {assignment}: .*backpropagation and DGL do not") as shared:
        shared_settings([assignment])
    assert all(name in str(refused.value) for refused in (own, shared))


@pytest.mark.parametrize("assignment", ["train.mixup", "train.mixup=", "=1", ""])
def test_setting_for_all_without_a_value_is_refused(assignment: str) -> None:
    with pytest.raises(ConfigError, match=f"--set {assignment}"):
        shared_settings([assignment])


def test_every_setting_of_baselines_is_one_of_the_pipelines() -> None:
    defaults = config_for(BenchSettings(), Cell(kind="train", model="convnet", method="bp"), Path("store"))
    for name in BASELINE_SETTINGS:
        section, _, field = name.partition(".")
        assert hasattr(getattr(defaults, section), field)
