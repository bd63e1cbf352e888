"""The plan of a run that has not begun: reads labels and one image, stores nothing.

Joins a Ray cluster only if the configuration names one, to see what its workers have. Entries: `preview`,
`preview_plan`.
"""

import math
from dataclasses import dataclass
from typing import Any

from nf_pipeline.config import RunConfig
from nf_pipeline.core.planner import make_plan
from nf_pipeline.data.survey import survey
from nf_pipeline.driver.blocks import memory_of
from nf_pipeline.dtypes import ITEM_BYTES
from nf_pipeline.errors import ConfigError
from nf_pipeline.executors import open_executor
from nf_pipeline.executors.base import WorkerClass
from nf_pipeline.plans import Plan
from nf_pipeline.storage.reader import reader_bytes
from nf_pipeline.storage.shard_writer import writer_bytes


@dataclass(frozen=True, kw_only=True)
class Preview:
    """A plan, and where its blocks could run.

    Attributes:
        config: that it was made for.
        plan: the plan.
        workers: classes of workers of the cluster, smallest memory first; empty if none was named.
        image_bytes: pixels of the train and validation split.
    """

    config: RunConfig
    plan: Plan
    workers: tuple[WorkerClass, ...]
    image_bytes: int

    @property
    def buffer_bytes(self) -> int:
        """Bytes of host memory that reading and writing shards takes of a worker at most."""
        reading, writing = (
            reader_bytes(self.config.storage.shard_bytes),
            writer_bytes(self.config.storage.shard_bytes),
        )
        blocks = self.plan.blocks
        stored = {-1: self.image_bytes, **{block.block_idx: block.shard_bytes for block in blocks}}
        most = 0
        for block in blocks:
            # Twice: what is there is held as stored and as decoded.
            source_bytes, written_bytes = 2 * stored[block.source_block], 2 * block.shard_bytes
            # While one epoch is validated the next one's first shards are there already; nothing is written then.
            training = min(2 * reading, source_bytes)
            caching = min(reading, source_bytes) + min(writing, written_bytes)
            most = max(most, training, caching)
        return most

    @property
    def placement(self) -> dict[str, Any]:
        """Describes as a JSON document where the run would take place and which workers could hold each block."""
        cluster, train = self.config.cluster, self.config.train
        needed = [memory_of(self.config, block) for block in self.plan.blocks]
        return {
            "executor": cluster.executor,
            "address": cluster.address,
            "device": train.device,
            "mode": train.mode,
            "workers_per_block": train.workers_per_block,
            "block_memory_bytes": needed,
            "host_buffer_bytes": self.buffer_bytes,
            "workers_that_fit": [self._count_fitting(bytes_needed) for bytes_needed in needed],
        }

    def _count_fitting(self, needed_bytes: int) -> int | None:
        """Counts the workers that could hold a block; None if nothing is known of them."""
        if not self.workers:
            return None
        threads = self.config.cluster.num_threads or min(worker.num_cpus for worker in self.workers)
        return sum(
            worker.count
            for worker in self.workers
            if worker.num_cpus >= threads and (worker.memory_bytes is None or worker.memory_bytes >= needed_bytes)
        )


def preview(config: RunConfig) -> Preview:
    """Decides blocks and batch sizes as `train` would, and counts the workers that could hold them.

    Nothing is stored, so the store is not measured: where storage decides, `train` may choose otherwise.

    Raises:
        DataError: the data set cannot be used.
        PlanError: the budget is too small; names the layer and the smallest budget.
        ConfigError: there is no cluster at the address.
    """
    workers = _worker_classes(config)
    surveyed = survey(config)
    if surveyed.inputs.num_tokens and config.data.num_tokens is None:
        what = f"{surveyed.source.name} holds tokens, and plan reads one sample, not the largest token of all"
        raise ConfigError(what, "--set data.num_tokens=N, one more than the largest")
    plan = make_plan(
        config,
        inputs=surveyed.inputs,
        target=surveyed.target,
        split_rows=surveyed.split_rows,
        is_exhaustive=True,
        worker_memory_bytes=[w.memory_bytes for w in workers if w.memory_bytes is not None],
    )
    rows, inputs = surveyed.split_rows["train"] + surveyed.split_rows["val"], surveyed.inputs
    image_bytes = rows * math.prod(inputs.shape) * ITEM_BYTES[inputs.dtype]
    return Preview(config=config, plan=plan, workers=workers, image_bytes=image_bytes)


def preview_plan(config: RunConfig) -> Plan:
    """Decides blocks and batch sizes as `train` would; see `preview`."""
    return preview(config).plan


def _worker_classes(config: RunConfig) -> tuple[WorkerClass, ...]:
    if config.cluster.executor == "inline" or config.cluster.address is None:
        return ()
    with open_executor(config.cluster) as executor:
        return tuple(executor.worker_classes(config.train.device))
