"""Plans that leave a setting without effect say so, and others say nothing."""

import pytest

from nf_pipeline.config import RunConfig
from nf_pipeline.core.planner import make_plan
from nf_pipeline.plans import Plan
from nf_pipeline.samples import InputSpec, TargetSpec

FACTS = {
    "inputs": InputSpec(shape=(3, 16, 16)),
    "target": TargetSpec(size=10),
    "split_rows": {"train": 900, "val": 100},
}
VIEWS = {"augment": "flip", "views": 2, "feature_augment": "flip"}
LOCAL = {"loss": "predsim", "head": "linear"}


def plan_with(cache: str, target: TargetSpec = FACTS["target"], **train: object) -> Plan:
    document = {
        "model": {"name": "convnet"},
        "memory": {"budget_bytes": "6MiB", "join_threshold": 0.0},
        "train": {"device": "cpu", **train},
        "storage": {"cache": cache},
    }
    return make_plan(RunConfig.model_validate(document), **{**FACTS, "target": target})


@pytest.mark.parametrize(
    ("cache", "train", "unused"),
    [
        ("recompute", {"unit_layers": 3, **VIEWS}, {"views 2", "feature_augment flip"}),
        ("shards", {"unit_layers": 3, **VIEWS}, set()),
        ("shards", {"unit_layers": 6, **VIEWS}, {"views 2", "feature_augment flip"}),
        ("shards", {"unit_layers": 6, **LOCAL}, {"loss predsim", "head linear"}),
        ("shards", {"unit_layers": 3, **LOCAL}, set()),
        ("shards", {"unit_layers": 6, "loss": "infopro"}, {"loss infopro"}),
        ("shards", {"unit_layers": 6, "head": "auto"}, set()),
        ("shards", {"unit_layers": 6}, set()),
        ("shards", {"unit_layers": 6, "context": "sample"}, {"context sample"}),
        ("shards", {"unit_layers": 3, "context": "sample"}, set()),
    ],
)
def test_first_block_names_the_settings_that_its_plan_leaves_without_effect(
    cache: str, train: dict[str, object], unused: set[str]
) -> None:
    first, *others = plan_with(cache, **train).blocks
    parts = [part for part in first.reason.split("; ") if "without effect" in part]
    assert {part.partition(" without")[0].removeprefix("train.") for part in parts} == unused
    assert not any("without effect" in block.reason for block in others)


def test_loss_of_values_counts_for_a_single_unit_too() -> None:
    (block,) = plan_with("shards", TargetSpec(kind="values", size=2), unit_layers=6, loss="mae").blocks
    assert "without effect" not in block.reason
