"""summary.json: the facts of a finished run in one document, under the names that other people's scripts read."""

from typing import Any

from nf_pipeline.config import FORMAT_VERSION, RunConfig
from nf_pipeline.driver.early_end import EarlyEnd
from nf_pipeline.plans import Plan
from nf_pipeline.storage.manifest import StageManifest

BLOCK_FIELDS = (
    "block_idx",
    "layers",
    "source_block",
    "batch_size",
    "budget_bytes",
    "predicted_peak_bytes",
    "measured_peak_bytes",
    "train_s",
    "loader_wait_s",
    "write_s",
    "shard_bytes",
    "num_shards",
    "attempts",
    "worker",
)


def make_summary(
    config: RunConfig,
    plan: Plan,
    ingest: StageManifest,
    blocks: list[StageManifest],
    model: StageManifest,
    wall_s: float,
    early_end: EarlyEnd | None = None,
) -> dict[str, Any]:
    """Collects what the stages reported.

    Args:
        wall_s: seconds of this driver, and of training and writing the blocks that it found finished.
        early_end: why the plan's last blocks were not trained, None if they were.
    """
    return {
        "format_version": FORMAT_VERSION,
        "run": config.run,
        "model": plan.model,
        "dataset": ingest.facts["dataset"],
        "num_classes": plan.target.num_classes,
        "split_rows": ingest.facts["split_rows"],
        "num_skipped_images": ingest.facts["num_skipped"],
        "memory_budget_bytes": plan.budget_bytes,
        "executor": config.cluster.executor,
        "mode": config.train.mode,
        "workers_per_block": config.train.workers_per_block,
        "seed": config.train.seed,
        "profile_s": plan.profile_s,
        "wall_s": round(wall_s, 3),
        "blocks": [{field: block.facts[field] for field in BLOCK_FIELDS} for block in blocks],
        **model.facts,
        "weights_checksum": model.weights.checksum,
        "stopped_early": early_end is not None,
        "stopped_after_block": early_end.num_blocks - 1 if early_end else None,
        "stop_reason": early_end.reason if early_end else None,
        "num_blocks_planned": len(plan.blocks),
    }
