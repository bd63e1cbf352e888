"""The descriptions of all stages' work: picklable, no tensors, no torch; the driver makes them, workers read them.

A stage is named by where its generator function stands, so that the driver need not import what workers need.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from nf_pipeline.config import RunConfig, fingerprint_of
from nf_pipeline.gang import ALONE, Gang
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
        worker_memory_bytes: what the workers that train may hold, one entry per class, for a budget of "auto".
    """

    config: RunConfig
    attempt: str
    num_threads: int
    worker_memory_bytes: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class BlockTask:
    """Everything a worker needs to train one round of a block: all epochs at once unless the run is pipelined.

    Attributes:
        config, plan: of the run.
        block_idx, round_idx: 0-based.
        batch_size: the plan's, or less after an attempt that ran out of memory.
        attempt: id under which this attempt stores its objects.
        num_attempts: attempts at this block so far, this one included.
        num_threads: CPU threads to compute with.
        gang: this worker's place among those that train the block together.
    """

    config: RunConfig
    plan: Plan
    block_idx: int
    round_idx: int = 0
    batch_size: int
    attempt: str
    num_attempts: int
    num_threads: int
    gang: Gang = ALONE

    @property
    def stage(self) -> str:
        """Name of the stage, "block-000"."""
        return f"block-{self.block_idx:03d}"

    @property
    def block(self) -> BlockPlan:
        """The block's part of the plan."""
        return self.plan.blocks[self.block_idx]

    @property
    def epochs(self) -> tuple[int, int]:
        """Half-open range of the round's epochs, counted through all rounds."""
        return round_epochs(self.config, self.round_idx)

    @property
    def stores_activations(self) -> bool:
        """Whether a later block reads this one's activations."""
        return self.plan.stores(self.block_idx)

    @property
    def is_last_round(self) -> bool:
        """Whether the block is trained after this round."""
        return self.round_idx == num_rounds(self.config) - 1


@dataclass(frozen=True, kw_only=True)
class AssembleTask:
    """What the last stage needs.

    Attributes:
        config, plan: of the run.
        num_blocks: that are trained, the first of the plan.
        attempt: id of this attempt.
        num_threads: CPU threads to compute with.
    """

    config: RunConfig
    plan: Plan
    num_blocks: int
    attempt: str
    num_threads: int


def num_rounds(config: RunConfig) -> int:
    """Returns how often a block publishes its activations: once, unless the run is pipelined."""
    return config.train.num_rounds


def round_epochs(config: RunConfig, round_idx: int) -> tuple[int, int]:
    """Returns the half-open range of epochs of a round; only the last one can be shorter than the others."""
    train = config.train
    if train.mode == "sequential":
        return 0, train.epochs
    first = round_idx * train.round_epochs
    return first, min(first + train.round_epochs, train.epochs)


def chain_checksum(parts: Sequence[str]) -> str:
    """Identifies what a block trains on.

    Args:
        parts: content checksums of its source (images or a block) and of every block after it that is run again.
    """
    return parts[0] if len(parts) == 1 else fingerprint_of(list(parts))


def block_fingerprint(config: RunConfig, plan: Plan, block_idx: int, round_idx: int, input_checksum: str) -> str:
    """Identifies a round of a block: configuration, its units and their heads, and the very input it reads.

    The batch size is left out on purpose: a finished block that had to shrink it is as good for the next one.
    """
    block = plan.blocks[block_idx]
    units = [[unit.start, unit.stop, unit.head] for unit in plan.units_of(block)]
    planned = {"block_idx": block_idx, "first_unit": block.units[0], "units": units}
    work = {"config": config.fingerprint, "block": planned, "round": round_idx, "input": input_checksum}
    return fingerprint_of(work)


def plan_fingerprint(config: RunConfig, input_checksum: str) -> str:
    """Identifies a plan: configuration and the ingested images it was made for."""
    return fingerprint_of({"config": config.fingerprint, "input": input_checksum})


def assemble_fingerprint(config: RunConfig, block_checksums: list[str]) -> str:
    """Identifies the final model: configuration and every block that went into it."""
    return fingerprint_of({"config": config.fingerprint, "blocks": block_checksums})


def model_blocks(config: RunConfig, block_checksums: list[str], fingerprint: str) -> int | None:
    """Returns how many of the first blocks went into the model with a fingerprint; None if it is of other work."""
    counts = range(len(block_checksums), 0, -1)
    return next((n for n in counts if assemble_fingerprint(config, block_checksums[:n]) == fingerprint), None)
