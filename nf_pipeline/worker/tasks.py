"""The descriptions of all stages' work: picklable, no tensors, no torch; the driver makes them, workers read them.

A stage is named by where its generator function stands, so that the driver need not import what workers need.
"""

from dataclasses import dataclass

from nf_pipeline.config import RunConfig, fingerprint_of
from nf_pipeline.plans import BlockPlan, Plan

INGEST_STAGE = "nf_pipeline.worker.prepare:ingest_images"
PLAN_STAGE = "nf_pipeline.worker.prepare:make_run_plan"
BLOCK_STAGE = "nf_pipeline.worker.train_block:train_block"
MODEL_STAGE = "nf_pipeline.worker.assemble:assemble_model"


@dataclass(frozen=True, kw_only=True)
class PrepareTask:
    """What ingest and planning need.

    Attributes:
        config: of the run.
        attempt: id of this attempt.
        num_threads: CPU threads to compute with.
    """

    config: RunConfig
    attempt: str
    num_threads: int


@dataclass(frozen=True, kw_only=True)
class BlockTask:
    """Everything a worker needs to train a block.

    Attributes:
        config, plan: of the run.
        block_idx: 0-based.
        batch_size: the plan's, or less after an attempt that ran out of memory.
        attempt: id under which this attempt stores its objects.
        num_attempts: attempts at this block so far, this one included.
        num_threads: CPU threads to compute with.
    """

    config: RunConfig
    plan: Plan
    block_idx: int
    batch_size: int
    attempt: str
    num_attempts: int
    num_threads: int

    @property
    def stage(self) -> str:
        """Name of the stage, "block-000"."""
        return f"block-{self.block_idx:03d}"

    @property
    def block(self) -> BlockPlan:
        """The block's part of the plan."""
        return self.plan.blocks[self.block_idx]

    @property
    def is_last(self) -> bool:
        """Whether no block reads this one's activations."""
        return self.block_idx == len(self.plan.blocks) - 1


@dataclass(frozen=True, kw_only=True)
class AssembleTask:
    """What the last stage needs.

    Attributes:
        config, plan: of the run.
        attempt: id of this attempt.
        num_threads: CPU threads to compute with.
    """

    config: RunConfig
    plan: Plan
    attempt: str
    num_threads: int


def block_fingerprint(config: RunConfig, block: BlockPlan, input_checksum: str) -> str:
    """Identifies a block's work: configuration, its part of the plan, and the very input it reads.

    The batch size is left out on purpose: a finished block that had to shrink it is as good for the next one.
    """
    planned = {"block_idx": block.block_idx, "units": list(block.units), "layers": list(block.layers)}
    return fingerprint_of({"config": config.fingerprint, "block": planned, "input": input_checksum})


def plan_fingerprint(config: RunConfig, input_checksum: str) -> str:
    """Identifies a plan: configuration and the ingested images it was made for."""
    return fingerprint_of({"config": config.fingerprint, "input": input_checksum})


def assemble_fingerprint(config: RunConfig, block_checksums: list[str]) -> str:
    """Identifies the final model: configuration and every block that went into it."""
    return fingerprint_of({"config": config.fingerprint, "blocks": block_checksums})
