"""A run from beginning to end: ingest, plan, one stage per block, final model, summary.

Every stage is skipped when its manifest is there and verifies, so running again is resuming. The driver holds no
tensors and imports no torch: stages run where the executor puts them. Entries: `train`, `resume`.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from nf_pipeline.config import AUTO, RunConfig, validate_config
from nf_pipeline.data.handed_over import describe_files, drop_dataset, settle_dataset, with_dataset
from nf_pipeline.data.ingest import ingest_fingerprint_of
from nf_pipeline.driver.blocks import BlockRuns, memory_of
from nf_pipeline.driver.early_end import EarlyEnd
from nf_pipeline.driver.event_log import EventLog, Listener
from nf_pipeline.driver.repair import repair_while
from nf_pipeline.driver.retention import Retention
from nf_pipeline.driver.run_lock import RunLock, hold_run
from nf_pipeline.driver.run_record import load_run, open_run, plan_of, plan_record
from nf_pipeline.driver.stage_runner import StageRunner, StageWork
from nf_pipeline.driver.stages import block_stage
from nf_pipeline.driver.stop_request import StopRequest
from nf_pipeline.driver.summary import make_summary
from nf_pipeline.errors import AlreadyExists, ConfigError, StageOutdated
from nf_pipeline.events import Note, StageNotNeeded, StageSkipped
from nf_pipeline.executors import open_executor
from nf_pipeline.executors.base import Executor, Resources
from nf_pipeline.plans import Plan
from nf_pipeline.storage.layout import RunLayout
from nf_pipeline.storage.manifest import StageManifest, read_manifest
from nf_pipeline.storage.sealed import read_sealed, repair_command, repair_fix, seal
from nf_pipeline.storage.store import Store, open_store
from nf_pipeline.trust import confirm_factory
from nf_pipeline.worker.stage_input import read_ingest, read_model
from nf_pipeline.worker.tasks import (
    INGEST_STAGE,
    MODEL_STAGE,
    PLAN_STAGE,
    AssembleTask,
    PrepareTask,
    assemble_fingerprint,
    model_blocks,
    plan_fingerprint,
)

logger = logging.getLogger(__name__)


def train(
    config: RunConfig,
    *,
    dataset: Any = None,
    on_event: Listener | None = None,
    stop: StopRequest | None = None,
    repair: bool = False,
) -> dict[str, Any]:
    """Trains a model block by block under the memory budget; continues the run if it has begun.

    Args:
        config: the whole configuration; see `nf_pipeline.config.resolve_config`.
        dataset: images and labels in place of `data.source`: a `ray.data.Dataset`, a `pyarrow.dataset.Dataset`, a
            `pyarrow.Table`, or a mapping of "train", "val" and "test" to these; see `nf_pipeline.data.handed_over`.
        on_event: called with every event as it happens, one at a time, not always in the same thread.
        stop: through which the caller can ask the run to end after the epochs that are being trained.
        repair: read every byte of the run first, and run the stages again whose objects are damaged.

    Returns:
        The summary, as stored in summary.json.

    Raises:
        RunLocked: another driver works on the run.
        RunInterrupted: it ended because `stop` asked for that.
        RunConflict: the name is taken by a run with another configuration.
        DataError: the dataset cannot be used.
        NFError: any documented error of a stage; what is finished stays finished.
    """
    began = time.monotonic()
    config = with_dataset(config, dataset)
    store, layout = open_store(config.storage.uri), RunLayout(config.run)
    listeners = [on_event] if on_event else []
    with _held(store, layout, listeners) as lock:
        work = partial(_train_held, config, dataset, store, layout, lock, listeners, stop or StopRequest(), began)
        if not repair:
            return work()
        tell = partial(_tell_repair, store, layout, lock, listeners)
        patience = config.exits.patience
        return repair_while(store, layout, tell, work, has_dataset=dataset is not None, patience=patience)


def _train_held(
    config: RunConfig,
    dataset: Any,
    store: Store,
    layout: RunLayout,
    lock: RunLock,
    listeners: Sequence[Listener],
    stop: StopRequest,
    began: float,
) -> dict[str, Any]:
    with open_executor(config.cluster, config.run) as executor:
        config = open_run(store, layout, config, executor.default_threads(config.train.device))
        handed_over = settle_dataset(store, layout, config, dataset)
        log = EventLog(store, layout.events_jsonl, lambda _: lock.check(), executor.observe, *listeners)
        if handed_over:
            log.add(Note(stage="ingest", text=describe_files(handed_over)))
        elif dataset is not None:
            log.add(Note(stage="ingest", level="warning", text="the run has its images: the dataset was not read"))
        try:
            runner = StageRunner(store, log, executor, config.run, stop)
            summary = _Run(config, store, layout, log, runner, executor).all_stages(began)
            store.put(layout.summary_json, seal(summary))
        finally:
            if not lock.is_lost:  # else the log is another driver's
                log.flush()
    return summary


def resume(
    uri: str,
    *,
    on_event: Listener | None = None,
    cluster: Mapping[str, Any] | None = None,
    keep: str | None = None,
    patience: int | Literal["never"] | None = None,
    model: str | None = None,
    stop: StopRequest | None = None,
    repair: bool = False,
) -> dict[str, Any]:
    """Continues a run from its own record.

    Args:
        uri: STORE/NAME.
        on_event, stop, repair: see `train`.
        cluster: settings of the section `cluster` to change, such as {"executor": "inline"}.
        keep: replaces the recorded `storage.keep_activations`.
        patience: replaces the recorded `exits.patience`; "never" goes on with a run that ended early.
        model: the factory, where the run was started with one.

    Raises:
        ObjectMissing: there is no such run.
    """
    config = load_run(uri, cluster, model, keep, repair=repair)
    if patience is not None:
        document = config.model_dump()
        document["exits"]["patience"] = patience
        config = validate_config(document)
    return train(config, on_event=on_event, stop=stop, repair=repair)


def _tell_repair(
    store: Store, layout: RunLayout, lock: RunLock, listeners: Sequence[Listener], stage: str, text: str
) -> None:
    log = EventLog(store, layout.events_jsonl, lambda _: lock.check(), *listeners)
    log.add(Note(stage=stage, level="warning", text=f"repair: {text}"))
    log.flush()


def _held(store: Store, layout: RunLayout, listeners: Sequence[Listener]) -> AbstractContextManager[RunLock]:
    def tell(text: str) -> None:
        logger.info("%s", text)
        for listener in listeners:
            listener(Note(stage="run", level="warning", text=text))

    return hold_run(store, layout, on_wait=tell)


class _Run:
    """One pass over the stages of one run."""

    def __init__(
        self,
        config: RunConfig,
        store: Store,
        layout: RunLayout,
        log: EventLog,
        runner: StageRunner,
        executor: Executor,
    ) -> None:
        self.config = config
        self.store = store
        self.layout = layout
        self.log = log
        self.runner = runner
        self.executor = executor
        self.num_threads = config.cluster.num_threads
        self.worker_memory_bytes = self._worker_memory()
        self.placed_on = config.train.device

    def all_stages(self, began: float) -> dict[str, Any]:
        """Brings every stage to its commit, in order, and summarises."""
        self._check_workers()
        ingest = self.ingest()
        drop_dataset(self.store, self.layout)
        plan = self.plan(ingest)
        runs = BlockRuns(self.config, plan, self.layout, self.runner, self.executor, self.placed_on)
        blocks = runs.run(ingest)
        self._tell_early_end(plan, runs.early_end)
        model = self.model(plan, blocks)
        Retention(self.store, self.layout, self.config.storage.keep_activations, plan).run_done(len(blocks))
        wall_s = time.monotonic() - began + runs.skipped_s
        return make_summary(self.config, plan, ingest, blocks, model, wall_s, runs.early_end)

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
            done = read_ingest(self.store, self.layout)
        wanted = ingest_fingerprint_of(self.config, str(done.facts.get("source_fingerprint")))
        if done.fingerprint != wanted:
            key = self.layout.ingest_manifest
            what = f"{key} has fingerprint {done.fingerprint}, this run's settings of data give {wanted}"
            raise StageOutdated(what, self.store.uri, repair_fix(self.store, key), key)
        return done

    def plan(self, ingest: StageManifest) -> Plan:
        """Profile and partition, kept in plan.json."""
        fingerprint = plan_fingerprint(self.config, ingest.content_checksum)
        document = read_sealed(self.store, self.layout.plan_json)
        if document is None:
            document = self._make_plan(fingerprint)
        else:
            self.log.add(StageSkipped(stage="plan", note="finished before"))
        if document.get("fingerprint") != fingerprint:
            raise StageOutdated(
                f"{self.layout.plan_json} was made for another configuration or input",
                self.store.uri,
                f"{repair_command(self.store, self.layout.run)}: it is planned anew, blocks that fit are kept",
                self.layout.plan_json,
            )
        # Decided once: a resumed run does not make do with CPUs because the GPU nodes are not up yet.
        self.placed_on = document.get("placed_on", self.config.train.device)
        plan = plan_of(document, self.store.uri)
        confirm_factory(plan.model, self.config.model.name)
        return plan

    def _make_plan(self, fingerprint: str) -> dict[str, Any]:
        work = StageWork(
            name="plan", function=PLAN_STAGE, make_task=self._prepare_task, resources=self._plan_resources()
        )
        device = self.executor.device_for(self.config.train.device)
        document = plan_record(self.config, fingerprint, device, self.runner.run(work))
        try:
            self.store.create(self.layout.plan_json, seal(document))
        except AlreadyExists:
            # Measured profiles differ a little from time to time: everybody goes by the plan that came first.
            return read_sealed(self.store, self.layout.plan_json) or document
        return document

    def model(self, plan: Plan, blocks: list[StageManifest]) -> StageManifest:
        """Chooses the exit and assembles the final model, or takes the finished one."""
        key = self.layout.model_manifest
        checksums = [block.content_checksum for block in blocks]
        fingerprint = assemble_fingerprint(self.config, checksums)
        self._give_up_smaller_model(checksums)
        done = self.runner.committed("model", key, fingerprint)
        if done is not None:
            return done

        def make_task(attempt: str, num_attempts: int, shrunk: int) -> AssembleTask:
            threads = self.num_threads
            return AssembleTask(
                config=self.config, plan=plan, num_blocks=len(blocks), attempt=attempt, num_threads=threads
            )

        memory_bytes = max(memory_of(self.config, block) for block in plan.blocks[: len(blocks)])
        work = StageWork(
            name="model",
            function=MODEL_STAGE,
            make_task=make_task,
            resources=Resources(num_cpus=self.num_threads, device=self.placed_on, memory_bytes=memory_bytes),
            commit_key=key,
        )
        self.runner.run(work)
        return read_model(self.store, self.layout)

    def _give_up_smaller_model(self, checksums: list[str]) -> None:
        """Takes back a model of the first blocks only: the run ended early once, and was continued."""
        made = read_manifest(self.store, self.layout.model_manifest)
        num_blocks = None if made is None else model_blocks(self.config, checksums[:-1], made.fingerprint)
        if num_blocks is not None:
            text = f"the model of the first {num_blocks} blocks is replaced: {len(checksums)} are trained now"
            self.log.add(Note(stage="model", text=text))
            self.store.delete([self.layout.model_manifest])

    def _tell_early_end(self, plan: Plan, end: EarlyEnd | None) -> None:
        if end is None:
            return
        last = block_stage(end.num_blocks - 1)
        self.log.add(Note(stage=last, text=f"the run stops early (--stop never trains all blocks): {end.reason}"))
        for block in plan.blocks[end.num_blocks :]:
            note = f"the run stopped early after {last}"
            self.log.add(StageNotNeeded(stage=block_stage(block.block_idx), note=note))

    def _prepare_task(self, attempt: str, num_attempts: int, shrunk: int) -> PrepareTask:
        return PrepareTask(
            config=self.config,
            attempt=attempt,
            num_threads=self.num_threads,
            worker_memory_bytes=self.worker_memory_bytes,
        )

    def _check_workers(self) -> None:
        """Finds out before anything is read whether the workers could ever do what is asked of them."""
        if read_sealed(self.store, self.layout.plan_json) is not None:
            return  # every block is compared with what the plan needs
        planning = self._plan_resources()
        if self.config.memory.budget_bytes == AUTO and not planning.memory_bytes and planning.device == "cpu":
            raise ConfigError(
                "memory.budget_bytes is auto, but no worker says how much memory training may hold on its CPU",
                "--memory-budget 300MiB, or start workers with: ray start ... $(nf-pipeline worker-resources "
                "--memory 300MiB)",
            )
        self.executor.check("plan", planning)
        self.executor.check("training", replace(planning, num_workers=self.config.train.workers_per_block))

    def _plan_resources(self) -> Resources:
        """Asks for the largest worker that a block may get: a GPU's memory is measured there."""
        budget = self.config.memory.budget_bytes
        memory_bytes = max(self.worker_memory_bytes, default=0) if budget == AUTO else budget
        return Resources(num_cpus=self.num_threads, device=self.config.train.device, memory_bytes=memory_bytes)

    def _worker_memory(self) -> tuple[int, ...]:
        classes = self.executor.worker_classes(self.config.train.device)
        return tuple(kind.memory_bytes for kind in classes if kind.memory_bytes is not None)
