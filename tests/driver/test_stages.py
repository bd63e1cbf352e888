"""Names and commits of stages."""

import pytest

from nf_pipeline.driver.stages import block_stage, commit_key, stage_names
from nf_pipeline.storage.layout import RunLayout


def test_stage_names_without_a_plan_have_no_blocks() -> None:
    assert stage_names(None) == ["ingest", "plan", "model"]


@pytest.mark.parametrize("stage", ["ingest", "block-000", "block-012", "model"])
def test_commit_of_a_stage_lies_beside_its_attempts(stage: str) -> None:
    layout = RunLayout("run")
    assert commit_key(layout, stage) == f"{layout.stage_prefix(stage)}/manifest.json"


def test_commit_of_the_plan_is_the_plan() -> None:
    assert commit_key(RunLayout("run"), "plan") == RunLayout("run").plan_json


def test_block_stage_is_what_the_layout_understands() -> None:
    assert RunLayout("run").stage_prefix(block_stage(7)) == RunLayout("run").block(7)
