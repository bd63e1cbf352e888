"""The stages of a run by name, in order, and the object that commits each."""

from nf_pipeline.plans import Plan
from nf_pipeline.storage.layout import RunLayout


def block_stage(block_idx: int) -> str:
    """Names the stage that trains a block, "block-000"."""
    return f"block-{block_idx:03d}"


def stage_names(plan: Plan | None) -> list[str]:
    """Lists the stages in the order in which they run; without a plan the blocks are not known yet."""
    blocks = [block_stage(block.block_idx) for block in plan.blocks] if plan else []
    return ["ingest", "plan", *blocks, "model"]


def commit_key(layout: RunLayout, stage: str) -> str:
    """Returns the key whose existence means that the stage is done: its manifest, or the plan itself."""
    if stage.startswith("block-"):
        return layout.block_manifest(int(stage.removeprefix("block-")))
    return {"ingest": layout.ingest_manifest, "plan": layout.plan_json, "model": layout.model_manifest}[stage]
