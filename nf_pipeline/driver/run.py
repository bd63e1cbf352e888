"""A run from beginning to end: ingest, plan, one stage per block, final model, summary.

Every stage is skipped when its manifest is there and verifies, so running again is resuming. The driver holds no
tensors and imports no torch: stages run where the executor puts them. Entries: `train`, `resume`.
"""

import json
import time
from collections.abc import Mapping
from typing import Any

from nf_pipeline.config import FORMAT_VERSION, RunConfig
from nf_pipeline.driver.event_log import EventLog, Listener
from nf_pipeline.driver.run_record import load_run, open_run, plan_of, read_json
from nf_pipeline.driver.stage_runner import StageRunner, StageWork
from nf_pipeline.driver.summary import make_summary
from nf_pipeline.errors import AlreadyExists, ObjectCorrupt
from nf_pipeline.events import StageSkipped
from nf_pipeline.executors import open_executor
from nf_pipeline.executors.base import Resources
from nf_pipeline.plans import Plan
from nf_pipeline.retry import shrink_batch
from nf_pipeline.storage.layout import RunLayout
from nf_pipeline.storage.manifest import StageManifest
from nf_pipeline.storage.store import Store, open_store
from nf_pipeline.trust import confirm_factory
from nf_pipeline.worker.stage_input import read_block, read_ingest, read_model
from nf_pipeline.worker.tasks import (
    BLOCK_STAGE,
    INGEST_STAGE,
    MODEL_STAGE,
    PLAN_STAGE,
    AssembleTask,
    BlockTask,
    PrepareTask,
    assemble_fingerprint,
    block_fingerprint,
    plan_fingerprint,
)


def train(config: RunConfig, *, on_event: Listener | None = None) -> dict[str, Any]:
    """Trains a model block by block under the memory budget; continues the run if it has begun.

    Args:
        config: the whole configuration; see `nf_pipeline.config.resolve_config`.
        on_event: called with every event as it happens.

    Returns:
        The summary, as stored in summary.json.

    Raises:
        RunConflict: the name is taken by a run with another configuration.
        NFError: any documented error of a stage; what is finished stays finished.
    """
    began = time.monotonic()
    store, layout = open_store(config.storage.uri), RunLayout(config.run)
    config = open_run(store, layout, config)
    log = EventLog(store, layout.events_jsonl, on_event)
    try:
        with open_executor(config.cluster) as executor:
            run = _Run(config, store, layout, log, StageRunner(store, log, executor))
            summary = run.all_stages(began)
    finally:
        log.flush()
    store.put(layout.summary_json, json.dumps(summary, indent=2).encode())
    return summary


def resume(
    uri: str,
    *,
    on_event: Listener | None = None,
    cluster: Mapping[str, Any] | None = None,
    model: str | None = None,
) -> dict[str, Any]:
    """Continues a run from its own record.

    Args:
        uri: STORE/NAME.
        on_event: called with every event as it happens.
        cluster: settings of the section `cluster` to change, such as {"executor": "inline"}.
        model: the factory, where the run was started with one.

    Raises:
        ObjectMissing: there is no such run.
    """
    return train(load_run(uri, cluster, model), on_event=on_event)


class _Run:
    """One pass over the stages of one run."""

    def __init__(
        self, config: RunConfig, store: Store, layout: RunLayout, log: EventLog, runner: StageRunner
    ) -> None:
        self.config = config
        self.store = store
        self.layout = layout
        self.log = log
        self.runner = runner
        self.num_threads = config.cluster.num_threads
        self.resources = Resources(num_cpus=self.num_threads, device=config.train.device)
        self.skipped_s = 0.0

    def all_stages(self, began: float) -> dict[str, Any]:
        """Brings every stage to its commit, in order, and summarises."""
        ingest = self.ingest()
        plan = self.plan(ingest)
        blocks: list[StageManifest] = []
        for block_idx in range(len(plan.blocks)):
            blocks.append(self.block(plan, block_idx, blocks[-1] if blocks else ingest))
        model = self.model(plan, blocks)
        wall_s = time.monotonic() - began + self.skipped_s
        return make_summary(self.config, plan, ingest, blocks, model, wall_s)

    def ingest(self) -> StageManifest:
        """Stage 0. A finished one is a snapshot: it counts even if the data set has changed or gone since."""
        done = self.runner.committed("ingest", self.layout.ingest_manifest, None)
        if done is None:
            work = StageWork(
                name="ingest",
                function=INGEST_STAGE,
                make_task=self._prepare_task,
                resources=Resources(num_cpus=self.num_threads, device="cpu"),
                commit_key=self.layout.ingest_manifest,
            )
            self.runner.run(work)
        return done or read_ingest(self.store, self.layout)

    def plan(self, ingest: StageManifest) -> Plan:
        """Profile and partition, kept in plan.json."""
        fingerprint = plan_fingerprint(self.config, ingest.content_checksum)
        document = read_json(self.store, self.layout.plan_json)
        if document is None:
            document = self._make_plan(fingerprint)
        else:
            self.log.add(StageSkipped(stage="plan", note="finished before"))
        if (document.get("fingerprint"), document.get("format_version")) != (fingerprint, FORMAT_VERSION):
            raise ObjectCorrupt(
                f"{self.layout.plan_json} was made for another configuration or input",
                self.store.uri,
                f"delete {self.layout.plan_json} and resume: it is planned anew",
            )
        plan = plan_of(document, self.store.uri)
        confirm_factory(plan.model, self.config.model.name)
        return plan

    def _make_plan(self, fingerprint: str) -> dict[str, Any]:
        work = StageWork(name="plan", function=PLAN_STAGE, make_task=self._prepare_task, resources=self.resources)
        document = {"format_version": FORMAT_VERSION, "fingerprint": fingerprint, **self.runner.run(work)}
        try:
            self.store.create(self.layout.plan_json, json.dumps(document, indent=2).encode())
        except AlreadyExists:
            # Measured profiles differ a little from time to time: everybody goes by the plan that came first.
            return read_json(self.store, self.layout.plan_json) or document
        return document

    def block(self, plan: Plan, block_idx: int, stage_input: StageManifest) -> StageManifest:
        """Trains one block, or takes the finished one."""
        block, key = plan.blocks[block_idx], self.layout.block_manifest(block_idx)
        stage_name = f"block-{block_idx:03d}"
        fingerprint = block_fingerprint(self.config, block, stage_input.content_checksum)
        done = self.runner.committed(stage_name, key, fingerprint)
        if done is not None:
            self.skipped_s += done.facts["train_s"] + done.facts["write_s"]
            return done

        def make_task(attempt: str, num_attempts: int, shrunk: int) -> BlockTask:
            batch_size = block.batch_size
            for _ in range(shrunk):
                batch_size = shrink_batch(stage_name, batch_size)
            return BlockTask(
                config=self.config,
                plan=plan,
                block_idx=block_idx,
                batch_size=batch_size,
                attempt=attempt,
                num_attempts=num_attempts,
                num_threads=self.num_threads,
            )

        work = StageWork(
            name=stage_name,
            function=BLOCK_STAGE,
            make_task=make_task,
            resources=self.resources,
            commit_key=key,
            attempts_before=self._count_attempts(self.layout.block(block_idx)),
        )
        self.runner.run(work)
        return read_block(self.store, self.layout, block_idx)

    def model(self, plan: Plan, blocks: list[StageManifest]) -> StageManifest:
        """Chooses the exit and assembles the final model, or takes the finished one."""
        key = self.layout.model_manifest
        fingerprint = assemble_fingerprint(self.config, [block.content_checksum for block in blocks])
        done = self.runner.committed("model", key, fingerprint)
        if done is not None:
            return done

        def make_task(attempt: str, num_attempts: int, shrunk: int) -> AssembleTask:
            return AssembleTask(config=self.config, plan=plan, attempt=attempt, num_threads=self.num_threads)

        work = StageWork(
            name="model", function=MODEL_STAGE, make_task=make_task, resources=self.resources, commit_key=key
        )
        self.runner.run(work)
        return read_model(self.store, self.layout)

    def _prepare_task(self, attempt: str, num_attempts: int, shrunk: int) -> PrepareTask:
        return PrepareTask(config=self.config, attempt=attempt, num_threads=self.num_threads)

    def _count_attempts(self, prefix: str) -> int:
        depth = prefix.count("/") + 1
        names = {key.split("/")[depth] for key, _ in self.store.list(prefix)}
        return sum(name.startswith("attempt-") for name in names)
