"""The stage that trains one block: read shards, train its units, checkpoint, write activations, commit.

Deliberately knows nothing of Ray, of other blocks' weights, or of who renders its events. Entry: `train_block`.
"""

from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import safetensors.torch
import torch

from nf_pipeline.core.layers import cut
from nf_pipeline.core.local_unit import LocalUnit, build_units
from nf_pipeline.core.memory import measure_peak
from nf_pipeline.core.models import build_model
from nf_pipeline.core.train_step import make_optimizer, resolve_device, train_step
from nf_pipeline.errors import ObjectMissing, OutOfBudget
from nf_pipeline.events import EpochDone, Event, Progress, StageDone, StageStarted
from nf_pipeline.host import worker_name
from nf_pipeline.storage.layout import RunLayout
from nf_pipeline.storage.manifest import ObjectInfo, StageManifest, checksum_of, commit_manifest
from nf_pipeline.storage.shards import ShardInfo
from nf_pipeline.storage.store import Store
from nf_pipeline.units import format_bytes
from nf_pipeline.worker.checkpoint import (
    CheckpointRecord,
    delete_quietly,
    find_checkpoint,
    load_checkpoint,
    pack_units,
    save_checkpoint,
)
from nf_pipeline.worker.evaluate import count_correct
from nf_pipeline.worker.feed import Feed, open_feed
from nf_pipeline.worker.loss_guard import LossGuard
from nf_pipeline.worker.progress_clock import ProgressClock
from nf_pipeline.worker.runtime import cap_device_memory, seed_everything, set_threads
from nf_pipeline.worker.schedule import learning_rate, peak_learning_rate, warmup_steps
from nf_pipeline.worker.stage_input import open_run_store, read_input
from nf_pipeline.worker.tasks import BlockTask, block_fingerprint
from nf_pipeline.worker.write_activations import activation_spec, shards_bytes, write_activations

METERED_STEPS = 8
RESTORE_TRIES = 3


def train_block(task: BlockTask) -> Iterator[Event]:
    """Trains one block and commits its weights and activations.

    Yields:
        StageStarted, Progress and EpochDone as it works, StageDone at the end (result: the block's entry of
        summary.json, and `val_correct` and `num_val` for the choice of the exit).

    Raises:
        Diverged: a loss became NaN, infinite or exploded, or activations do not fit the storage type.
        OutOfBudget: the measured peak passed the memory budget.
        StorageError: input shards are missing or corrupt, or the store cannot be written.
    """
    clock = ProgressClock()
    set_threads(task.num_threads)
    try:
        attempt = _Attempt(task, *open_run_store(task.config))
        yield attempt.started()
        for epoch in range(attempt.record.epoch, task.config.train.epochs):
            yield from attempt.train_epoch(epoch)
        shards = yield from attempt.write()
    except torch.OutOfMemoryError as error:
        # The allocator enforces the budget on a GPU: this is the same fact as a measured peak above it.
        raise OutOfBudget(
            task.stage,
            f"the device ran out of memory at batch {task.batch_size}, "
            f"budget {format_bytes(task.plan.budget_bytes)}: {error}",
            "raise --set memory.safety_margin",
        ) from None
    result = attempt.commit(shards)
    yield StageDone(stage=task.stage, result=result, seconds=clock.seconds)


class _Attempt:
    """One attempt at a block: its units, its feeds, and the record of what it has done so far."""

    def __init__(self, task: BlockTask, store: Store, layout: RunLayout) -> None:
        self.task = task
        self.store = store
        self.layout = layout
        self.train_config = task.config.train
        self.prefix = self.layout.block_attempt(task.block_idx, task.attempt)
        self.device = resolve_device(self.train_config.device)
        cap_device_memory(self.device, task.plan.budget_bytes)
        self.input = read_input(store, self.layout, task.block_idx)
        self.peak_lr = peak_learning_rate(self.train_config.lr, task.batch_size)
        self.units = [unit.to(self.device) for unit in _build_units(task)]
        self.optimizers = [make_optimizer(unit, self.train_config, self.peak_lr) for unit in self.units]
        self.feeds = {split: self._open_feed(split) for split in ("train", "val")}
        self.write_s = 0.0
        self.record = self._restore()
        self.resumed_epochs = self.record.epoch
        self.meter = measure_peak(self.device)
        self.meter.track(*self.units, *self.optimizers)

    @property
    def peak_bytes(self) -> int:
        """Largest measured so far, earlier attempts' epochs included."""
        return max(self.record.peak_bytes, self.meter.peak_bytes)

    def started(self) -> StageStarted:
        """Tells who works on what."""
        first, stop = self.task.block.layers
        return StageStarted(
            stage=self.task.stage,
            attempt=self.task.attempt,
            worker=worker_name(),
            resumed_epochs=self.resumed_epochs,
            note=f"layers {first}-{stop - 1}, batch {self.task.batch_size}",
        )

    def train_epoch(self, epoch: int) -> Iterator[Event]:
        """Trains, validates and checkpoints one epoch."""
        clock, waited = ProgressClock(), self.feeds["train"].wait_s
        seed_everything(self.train_config.seed, self.task.block_idx, epoch)
        guard = LossGuard(self.task.stage, self.task.plan.num_classes, epoch)
        yield from self._train_batches(epoch, guard)
        images_per_s = clock.rate(self.feeds["train"].num_rows)
        correct = yield from self._validate(epoch)
        self._check_budget()
        done = EpochDone(
            stage=self.task.stage,
            epoch=epoch + 1,
            num_epochs=self.train_config.epochs,
            losses=guard.mean_losses(),
            val_accuracies=[count / self.feeds["val"].num_rows for count in correct],
            images_per_s=images_per_s,
            loader_wait_s=self.feeds["train"].wait_s - waited,
            peak_bytes=self.peak_bytes,
        )
        self._checkpoint(done, correct, clock.seconds)
        yield done

    def write(self) -> Generator[Event, None, dict[str, list[ShardInfo]]]:
        """Writes what the next block reads: the activations of train and val. The last block has no reader."""
        clock = ProgressClock()
        shards: dict[str, list[ShardInfo]] = {}
        for split in () if self.task.is_last else ("train", "val"):
            shards[split] = yield from write_activations(
                self.store, self.task, self.units, self.feeds[split], split, self.meter
            )
        self._check_budget()
        self.write_s = clock.seconds
        return shards

    def commit(self, shards: dict[str, list[ShardInfo]]) -> dict[str, Any]:
        """Stores the weights, then the manifest: from there on the block is finished for everybody."""
        weights = safetensors.torch.save(pack_units(self.units, self.task.block.units[0]))
        key = self.layout.weights(self.task.block_idx, self.task.attempt)
        self.store.put(key, weights)
        result = self._result(shards)
        manifest = StageManifest(
            stage=self.task.stage,
            fingerprint=self.fingerprint,
            input_checksum=self.input.content_checksum,
            attempt=self.task.attempt,
            spec=activation_spec(self.task) if shards else None,
            shards={split: tuple(infos) for split, infos in shards.items()},
            weights=ObjectInfo(key=key, num_bytes=len(weights), checksum=checksum_of(weights)),
            facts=result,
        )
        commit_manifest(self.store, self.layout.block_manifest(self.task.block_idx), manifest)
        delete_quietly(self.store, [self.record.key])
        return result

    def _train_batches(self, epoch: int, guard: LossGuard) -> Iterator[Progress]:
        feed, clock, num_images = self.feeds["train"], ProgressClock(), 0
        steps = feed.num_batches(even=True)
        batches = feed.batches(seed=self.train_config.seed, epoch=epoch, shuffle=True, even=True)
        for step, batch in enumerate(batches):
            self._set_learning_rate(epoch * steps + step, steps)
            num_images += len(batch.y_N)
            with self._meter(step):
                batch.track(self.meter)
                # take_x: no name here may keep the inputs alive while the later units train.
                losses = train_step(
                    self.units, self.optimizers, batch.take_x(), batch.y_N, self.train_config.precision
                )
            guard.add(losses)
            if step < METERED_STEPS:
                self._check_budget()
            if clock.is_due():
                rate = clock.rate(num_images)
                yield self._progress("train", epoch, num_images, feed.num_rows, rate, guard.last_loss())
        guard.check()

    def _validate(self, epoch: int) -> Generator[Progress, None, list[int]]:
        feed, clock = self.feeds["val"], ProgressClock()
        counting = count_correct(self.units, feed, self.train_config.precision, self.meter)
        while True:
            try:
                done = next(counting)
            except StopIteration as finished:
                return finished.value
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

    def _set_learning_rate(self, step: int, steps_per_epoch: int) -> None:
        total = steps_per_epoch * self.train_config.epochs
        lr = learning_rate(
            step,
            total_steps=total,
            num_warmup_steps=warmup_steps(self.train_config.warmup_epochs, steps_per_epoch, total),
            peak_lr=self.peak_lr,
        )
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr

    def _open_feed(self, split: str) -> Feed:
        return open_feed(self.store, self.input, split, batch_size=self.task.batch_size, device=self.device)

    @property
    def fingerprint(self) -> str:
        return block_fingerprint(self.task.config, self.task.block, self.input.content_checksum)

    def _restore(self) -> CheckpointRecord:
        batch_size = self.task.batch_size
        for _ in range(RESTORE_TRIES):
            record = find_checkpoint(self.store, self.layout, self.task.block_idx, self.fingerprint, batch_size)
            if record is None:
                break
            try:
                load_checkpoint(self.store, record, self.units, self.optimizers)
            except ObjectMissing:
                continue  # an attempt that was given up for lost goes on and has moved to its next epoch
            return record
        return CheckpointRecord(fingerprint=self.fingerprint, batch_size=batch_size)

    def _checkpoint(self, done: EpochDone, correct: list[int], seconds: float) -> None:
        record = replace(
            self.record,
            epoch=done.epoch,
            val_correct=correct,
            peak_bytes=done.peak_bytes,
            train_s=self.record.train_s + seconds,
            loader_wait_s=self.record.loader_wait_s + done.loader_wait_s,
        )
        self.record = save_checkpoint(self.store, self.layout, self.prefix, record, self.units, self.optimizers)

    def _check_budget(self) -> None:
        budget = self.task.plan.budget_bytes
        if self.peak_bytes > budget:
            raise OutOfBudget(
                self.task.stage,
                f"measured peak {format_bytes(self.peak_bytes)} at batch {self.task.batch_size}, "
                f"budget {format_bytes(budget)}, "
                f"predicted {format_bytes(self.task.block.predicted_peak_bytes)}",
                "raise --set memory.safety_margin",
            )

    def _result(self, shards: dict[str, list[ShardInfo]]) -> dict[str, Any]:
        block = self.task.block
        return {
            "block_idx": block.block_idx,
            "layers": list(block.layers),
            "batch_size": self.task.batch_size,
            "predicted_peak_bytes": block.predicted_peak_bytes,
            "measured_peak_bytes": self.peak_bytes,
            "train_s": round(self.record.train_s, 3),
            "loader_wait_s": round(self.record.loader_wait_s, 3),
            "write_s": round(self.write_s, 3),
            "shard_bytes": shards_bytes(shards),
            "num_shards": sum(len(infos) for infos in shards.values()),
            "attempts": self.task.num_attempts,
            "worker": worker_name(),
            "val_correct": self.record.val_correct,
            "num_val": self.feeds["val"].num_rows,
        }


def _build_units(task: BlockTask) -> list[LocalUnit]:
    plan, train = task.plan, task.config.train
    model = build_model(plan.model, image_shape=plan.image_shape, num_classes=plan.num_classes, seed=train.seed)
    return build_units(
        cut(model, plan.image_shape),
        train.head,
        train.unit_layers,
        plan.num_classes,
        train.seed,
        units=range(*task.block.units),
    )
