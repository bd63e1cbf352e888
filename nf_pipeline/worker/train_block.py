"""The stage that trains one round of a block: read shards, train its units, checkpoint, write activations, commit.

A sequential run has one round of all epochs. Several workers may share the work (`Gang`): each reads its part of the
shards, gradients and statistics are those of all. Deliberately knows nothing of Ray, of other blocks' weights, or of
who renders its events. Entry: `train_block`.
"""

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace
from functools import cached_property, partial

import torch

from nf_pipeline.core.layers import cut
from nf_pipeline.core.local_unit import LocalUnit, build_units
from nf_pipeline.core.memory import measure_peak
from nf_pipeline.core.metrics import results_kind
from nf_pipeline.core.mixup import draw_mix
from nf_pipeline.core.models import build_model
from nf_pipeline.core.results import Results
from nf_pipeline.core.train_step import make_optimizer, resolve_device, train_step
from nf_pipeline.core.user_code import user_code
from nf_pipeline.errors import OutOfBudget, WorkerLost
from nf_pipeline.events import EpochDone, Event, Progress, StageDone, StageStarted
from nf_pipeline.host import worker_name
from nf_pipeline.storage.layout import RunLayout
from nf_pipeline.storage.manifest import ObjectInfo
from nf_pipeline.storage.parts import Part
from nf_pipeline.storage.shards import ShardInfo, TensorSpec
from nf_pipeline.storage.store import Store
from nf_pipeline.storage.views import view_split
from nf_pipeline.units import format_bytes
from nf_pipeline.worker.block_commit import Made, commit_block, merge_parts
from nf_pipeline.worker.block_input import BlockInput
from nf_pipeline.worker.checkpoint import CheckpointRecord, restore, save_record, save_tensors
from nf_pipeline.worker.data_parallel import Replicas
from nf_pipeline.worker.evaluate import find_results
from nf_pipeline.worker.feed import Feed
from nf_pipeline.worker.frozen_prefix import load_prefix
from nf_pipeline.worker.loss_guard import LossGuard
from nf_pipeline.worker.progress_clock import ProgressClock
from nf_pipeline.worker.runtime import cap_device_memory, seed_everything, set_threads
from nf_pipeline.worker.schedule import peak_learning_rate, set_learning_rate
from nf_pipeline.worker.stage_input import open_run_store
from nf_pipeline.worker.tasks import BlockTask, block_fingerprint, num_rounds
from nf_pipeline.worker.write_activations import ActivationWriter

METERED_STEPS = 8


def train_block(task: BlockTask) -> Iterator[Event]:
    """Trains one round of a block and commits its weights and activations.

    Yields:
        StageStarted, Progress and EpochDone as it works, Publishing when activations begin to be written, StageDone
        at the end (result: the block's entry of summary.json, and what `Results.total_fact` names and `num_val` for
        the choice of the exit).

    Raises:
        Diverged: a loss became NaN, infinite or exploded, or activations do not fit the storage type.
        OutOfBudget: the measured peak passed the memory budget.
        InputReplaced: the block before failed while its activations were being read; they are written anew.
        WorkerLost: another worker of the gang died.
        StorageError: input shards are missing or corrupt, or the store cannot be written.
    """
    clock = ProgressClock()
    set_threads(task.num_threads)
    device = resolve_device(task.plan.device)  # what the batch was planned for
    cap_device_memory(device, task.block.budget_bytes)
    try:
        with Replicas(task.stage, task.gang, device) as replicas:
            attempt = _Attempt(task, device, replicas, *open_run_store(task.config))
            yield attempt.started()
            with closing(attempt.train_feed):
                for epoch in range(attempt.record.epoch, task.epochs[1]):
                    yield from attempt.train_epoch(epoch)
            shards = yield from attempt.write()
            result = attempt.commit(shards)
    except torch.OutOfMemoryError as error:
        # The allocator enforces the budget on a GPU: this is the same fact as a measured peak above it.
        raise OutOfBudget(
            task.stage,
            f"the device ran out of memory at batch {task.batch_size}, "
            f"budget {format_bytes(task.block.budget_bytes)}: {error}",
            "raise --set memory.safety_margin",
        ) from None
    yield StageDone(stage=task.stage, result=result, seconds=clock.seconds)


class _Attempt:
    """One attempt at a round: its units, its input, and the record of what it has done so far."""

    def __init__(
        self, task: BlockTask, device: torch.device, replicas: Replicas, store: Store, layout: RunLayout
    ) -> None:
        self.task = task
        self.device = device
        self.replicas = replicas
        self.store = store
        self.layout = layout
        self.train_config = task.config.train
        self.input = BlockInput(store, layout, task)
        self.peak_lr = peak_learning_rate(self.train_config.lr, task.batch_size * task.gang.size)
        recomputed, units = units_of(task)
        self.input.frozen = load_prefix(store, task, self.input.recomputed, recomputed, device)
        self.units = [unit.to(device) for unit in units]
        replicas.convert(self.units)
        self.optimizers = [make_optimizer(unit, self.train_config, self.peak_lr) for unit in self.units]
        self.train_feed = self.input.open_train(task.batch_size, device)
        self.stored_spec: TensorSpec | None = None
        self.record = self._restore()
        self.resumed_epochs = self.record.epoch
        self._check_same_state()
        self.meter = measure_peak(device)
        self.meter.track(*self.units, *self.optimizers, *([self.input.frozen] if self.input.frozen else []))

    @property
    def results_kind(self) -> type[Results]:
        """What validation measures."""
        return results_kind(self.task.plan.target)

    @property
    def peak_bytes(self) -> int:
        """Largest measured so far, earlier attempts' epochs included."""
        return max(self.record.peak_bytes, self.meter.peak_bytes)

    @cached_property
    def val_feed(self) -> Feed:
        """The validation split, of an input that is committed; opened once, so that its shards are hashed once."""
        return self.input.open_val(self.task.batch_size, self.device)

    def started(self) -> StageStarted:
        """Tells who works on what."""
        task = self.task
        first, stop = task.block.layers
        rounds = num_rounds(task.config)
        in_rounds = f"round {task.round_idx + 1}/{rounds}, " if rounds > 1 else ""
        workers = f" on each of {task.gang.size} workers" if task.gang.size > 1 else ""
        return StageStarted(
            stage=task.stage,
            attempt=task.attempt,
            worker=worker_name(),
            resumed_epochs=self.resumed_epochs,
            round_idx=task.round_idx,
            num_rounds=rounds,
            note=f"{in_rounds}layers {first}-{stop - 1}, batch {task.batch_size}{workers}",
        )

    def train_epoch(self, epoch: int) -> Iterator[Event]:
        """Trains, validates and checkpoints one epoch."""
        clock, waited = ProgressClock(), self.train_feed.wait_s
        # Members of a gang draw different dropout masks, as the samples of one batch do.
        members = [self.task.gang.rank] if self.task.gang.size > 1 else []
        seed_everything(self.train_config.seed, self.task.block_idx, epoch, *members)
        objectives = [unit.objective for unit in self.units]
        guard = LossGuard(self.task.stage, objectives, self.task.plan.target.size, epoch)
        yield from self._train_batches(epoch, guard)
        images_per_s = clock.rate(self.train_feed.num_rows * self.task.gang.size)
        yield from self.input.wait_committed()
        # The weights stay as they are while they are validated: what is slow about a checkpoint is done meanwhile.
        with ThreadPoolExecutor(1, thread_name_prefix="checkpoint") as beside:
            saving = beside.submit(self._save_tensors, epoch + 1)
            results = yield from self._validate(epoch)
        self._check_budget()
        done = EpochDone(
            stage=self.task.stage,
            epoch=epoch + 1,
            num_epochs=self.train_config.epochs,
            losses=guard.mean_losses(),
            images_per_s=images_per_s,
            loader_wait_s=self.train_feed.wait_s - waited,
            peak_bytes=self.replicas.largest(self.peak_bytes),
            **{self.results_kind.epoch_field: [one.mean for one in results]},
        )
        self._checkpoint(saving.result(), done, results, clock.seconds)
        yield done

    def write(self) -> Generator[Event, None, dict[str, list[ShardInfo]]]:
        """Writes what a later block reads: the activations of train's views and of val; nothing where none does."""
        if not self.task.stores_activations:
            return {}
        clock = ProgressClock()
        yield from self.input.wait_committed()
        writer = ActivationWriter(self.store, self.layout, self.task, self.units, self.meter)
        self.replicas.barrier()  # every member's record is this attempt's before anybody reads
        yield writer.announce()
        batch_size, shards = self.task.batch_size, {}
        views = range(self.train_config.views)
        opened = (self.input.open_view(batch_size, self.device, view) for view in views)
        yield from writer.calibrate(opened, self.replicas)
        self.stored_spec = writer.spec
        for view in views:
            feed = self.input.open_view(batch_size, self.device, view)
            shards[view_split(view)] = yield from writer.write(view_split(view), feed)
            writer.finish_publication()
        shards["val"] = yield from writer.write("val", self.val_feed)
        yield from writer.clipped()
        self._check_budget()
        self.record = replace(self.record, write_s=self.record.write_s + clock.seconds)
        return shards

    def commit(self, shards: dict[str, list[ShardInfo]]) -> dict[str, object]:
        """Stores the manifest: from there on the round is finished for everybody."""
        self.record = replace(self.record, peak_bytes=self.replicas.largest(self.peak_bytes))
        shards = merge_parts(self.store, self.layout, self.task, shards, self.replicas)
        if self.task.gang.rank > 0:
            return {}
        made, units = Made(spec=self.stored_spec, shards=shards), [unit.trained() for unit in self.units]
        return commit_block(self.store, self.layout, self.task, units, self.record, self.input.checksum, made)

    def _train_batches(self, epoch: int, guard: LossGuard) -> Iterator[Progress]:
        feed, clock, num_images = self.train_feed, ProgressClock(), 0
        sizes = feed.step_sizes()
        order = {"seed": self.train_config.seed, "shuffle": True, "even": True}
        batches = feed.batches(epoch=epoch, shuffle_shards=self._may_shuffle(epoch), **order)
        for step, batch in enumerate(batches):
            at = epoch * len(sizes) + step
            set_learning_rate(self.optimizers, self.train_config, at, len(sizes), self.peak_lr)
            num_local, num_total = len(batch.y_N), sizes[step]
            num_images += num_total
            with self._meter(step), self._own_model(epoch, step):
                batch.track(self.meter)
                # take_x: no name here may keep the inputs alive while the later units train.
                losses = train_step(
                    self.units,
                    self.optimizers,
                    batch.take_x(),
                    batch.y_N,
                    self.train_config.precision,
                    reduce=self.replicas.averaging(num_local, num_total),
                    mix=draw_mix(self.train_config.mixup, num_local, self.device),
                    sample_N=batch.sample_N,
                )
            guard.add(self.replicas.mean_losses(losses, num_local, num_total))
            if step < METERED_STEPS:
                self._check_budget()
            if clock.is_due():
                rate = clock.rate(num_images)
                yield self._progress("train", epoch, num_images, sum(sizes), rate, guard.last_loss())
        guard.check()
        if epoch + 1 < self.task.epochs[1]:  # while this one is validated
            feed.prefetch(epoch=epoch + 1, shuffle_shards=self._may_shuffle(epoch + 1), **order)

    def _may_shuffle(self, epoch: int) -> bool:
        # Fresh activations are read in the order in which they are written; see block_input.
        return not self.input.is_fresh or epoch > self.task.epochs[0]

    def _validate(self, epoch: int) -> Generator[Progress, None, list[Results]]:
        """Returns what every unit makes of the samples of the whole split."""
        feed, clock, gang = self.val_feed, ProgressClock(), self.task.gang
        finding = find_results(self.units, feed, self.train_config.precision, self.meter, self.results_kind)
        while True:
            try:
                done = next(finding)
            except StopIteration as finished:
                rows = Part(index=gang.rank, count=gang.size).rows(feed.num_rows_total)
                return self.replicas.union(finished.value, rows.start, feed.num_rows_total)
            if clock.is_due():
                yield self._progress("validate", epoch, done, feed.num_rows, clock.rate(done))

    def _progress(
        self, phase: str, epoch: int, done: int, total: int, rate: float, loss: float | None = None
    ) -> Progress:
        return Progress(
            stage=self.task.stage,
            phase=phase,
            done=done,
            total=total,
            epoch=epoch + 1,
            num_epochs=self.train_config.epochs,
            loss=loss,
            images_per_s=rate,
            peak_bytes=self.peak_bytes,
        )

    def _meter(self, step: int) -> AbstractContextManager[object]:
        # Every step of an epoch holds the same tensors. Counting them costs a CPU step up to 5 %, so only the
        # first of each epoch are counted; a GPU's allocator counts for nothing.
        return self.meter if step < METERED_STEPS or self.device.type == "cuda" else nullcontext()

    def _own_model(self, epoch: int, step: int) -> AbstractContextManager[object]:
        # A registry model that fails is a bug of this program; a factory's is for its author.
        name = self.task.plan.model
        where = f"model {name}: training fails in epoch {epoch + 1}, step {step + 1}"
        return user_code(where, "correct the model") if ":" in name else nullcontext()

    @property
    def _prefix(self) -> str:
        return self.layout.block_attempt(self.task.block_idx, self.task.attempt)

    @property
    def _fingerprint(self) -> str:
        task = self.task
        return block_fingerprint(task.config, task.plan, task.block_idx, task.round_idx, self.input.checksum)

    def _restore(self) -> CheckpointRecord:
        # As long as its input is being written, nothing of this round can have been stored.
        fingerprint = self._fingerprint if self.input.manifest is not None else None
        return restore(self.store, self.layout, self.task, fingerprint, self.units, self.optimizers)

    def _check_same_state(self) -> None:
        """Compares what the members have restored; nobody moves the checkpoint on before all have read it.

        Raises:
            WorkerLost: an attempt that was given up for lost stored another epoch in between.
        """
        epoch = self.record.epoch
        if self.replicas.largest(epoch) != -self.replicas.largest(-epoch):
            raise WorkerLost(self.task.stage, "its workers found checkpoints of different epochs", "resume the run")

    def _save_tensors(self, epoch: int) -> ObjectInfo | None:
        if self.task.gang.rank > 0:
            return None
        key = self.layout.checkpoint_tensors(self._prefix, epoch)
        return save_tensors(self.store, key, self.units, self.optimizers)

    def _checkpoint(
        self, tensors: ObjectInfo | None, done: EpochDone, results: list[Results], seconds: float
    ) -> None:
        self.record = replace(
            self.record,
            fingerprint=self._fingerprint,
            batch_size=self.task.batch_size,
            epoch=done.epoch,
            num_val=results[0].num_samples,
            val_results=[one.to_text() for one in results],
            peak_bytes=done.peak_bytes,
            train_s=self.record.train_s + seconds,
            loader_wait_s=self.record.loader_wait_s + done.loader_wait_s,
        )
        if tensors is not None:
            self.record = save_record(self.store, self.layout, self._prefix, self.record, tensors)

    def _check_budget(self) -> None:
        block = self.task.block
        if self.peak_bytes > block.budget_bytes:
            raise OutOfBudget(
                self.task.stage,
                f"measured peak {format_bytes(self.peak_bytes)} at batch {self.task.batch_size}, "
                f"budget {format_bytes(block.budget_bytes)}, "
                f"predicted {format_bytes(block.predicted_peak_bytes)}",
                "raise --set memory.safety_margin",
            )


def units_of(task: BlockTask) -> tuple[list[LocalUnit], list[LocalUnit]]:
    """Builds the units of the blocks that are run again, and those of the block itself, which are to train."""
    plan, train = task.plan, task.config.train
    model = build_model(plan.model, inputs=plan.inputs, num_outputs=plan.target.size, seed=train.seed)
    first, stop = task.block.units
    begin = first if not task.block.recomputed else plan.blocks[task.block.source_block + 1].units[0]
    build = partial(build_units, cut(model, plan.inputs), train.head, plan.spans, plan.target, train.seed)
    again = [unit.trained() for unit in build(units=range(begin, first), train=train)]
    return again, build(units=range(first, stop), train=train)
