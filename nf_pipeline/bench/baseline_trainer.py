"""Trains a baseline: the pipeline's images, optimiser, schedule, meter and validation, another rule for the weights.

Entry: `train_baseline`.
"""

import math
import statistics
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nf_pipeline.bench.baseline_state import BaselineState
from nf_pipeline.bench.baseline_step import baseline_step
from nf_pipeline.bench.deadline import Deadline
from nf_pipeline.bench.fit import MIN_BATCH, Fit, batch_sizes
from nf_pipeline.bench.methods import Method
from nf_pipeline.bench.stopwatch import Stopwatch
from nf_pipeline.bench.task import Task
from nf_pipeline.core.memory import measure_peak
from nf_pipeline.core.profiler import count_params
from nf_pipeline.core.train_step import make_optimizer
from nf_pipeline.worker.evaluate import count_correct
from nf_pipeline.worker.feed import Augmentation, Feed, open_feed
from nf_pipeline.worker.runtime import cap_device_memory, seed_everything, set_threads
from nf_pipeline.worker.schedule import learning_rate, peak_learning_rate, warmup_steps
from nf_pipeline.worker.train_block import METERED_STEPS

Tell = Callable[[str], None]


def train_baseline(
    task: Task, method: Method, fit: Fit, *, folder: Path, deadline: Deadline, tell: Tell
) -> dict[str, Any] | None:
    """Trains to the end of the schedule, or as far as the time allows.

    Args:
        fit: batch and segments, which fit the budget.
        folder: of the unfinished state.
        tell: gets a line per epoch.

    Returns:
        The result, see `_Trainer.result`; None if time ran out. Then the same call goes on.
    """
    state = BaselineState(folder)
    while True:
        began_with = state.load().micro_batch or fit.micro_batch
        fit = with_micro_batch(fit, method, began_with)
        try:
            trainer = _Trainer(task, method, fit, state)
            return trainer.result() if trainer.train(deadline, tell) else None
        except torch.OutOfMemoryError:
            if fit.micro_batch == MIN_BATCH:
                raise
            fit = smaller(fit, method)
            tell(f"the device ran out of memory: again with batch {fit.micro_batch}")
            state.clear()


def smaller(fit: Fit, method: Method) -> Fit:
    """Returns the next smaller micro-batch, or a batch smaller by a tenth."""
    sizes = [size for size in batch_sizes(fit.micro_batch, divide_reference=method.micro_batch)]
    below = [size for size in sizes if size < fit.micro_batch]
    wanted = below[-1] if method.micro_batch else max(MIN_BATCH, fit.micro_batch * 9 // 10)
    return with_micro_batch(fit, method, wanted)


def with_micro_batch(fit: Fit, method: Method, size: int) -> Fit:
    """Returns a fit with another size of the forward pass."""
    return replace(fit, micro_batch=size, batch_size=fit.batch_size if method.micro_batch else size)


class _Trainer:
    """One baseline in this process."""

    def __init__(self, task: Task, method: Method, fit: Fit, state: BaselineState) -> None:
        self._task, self._method, self._fit, self._state = task, method, fit, state
        self._config, self._device = task.config.train, task.device
        set_threads(task.config.cluster.num_threads or 1)
        cap_device_memory(self._device, task.budget_bytes)
        self._units = [unit.to(self._device).train() for unit in task.units(method, fit.segment_layers)]
        self._peak_lr = peak_learning_rate(self._config.lr, fit.batch_size)
        self._optimizers = [make_optimizer(unit, self._config, self._peak_lr) for unit in self._units]
        loaded = state.load()
        if loaded.epoch:
            state.restore(loaded.epoch, self._units, self._optimizers)
        self._progress = replace(loaded, micro_batch=fit.micro_batch, sessions=loaded.sessions + 1)
        self._meter = measure_peak(self._device)
        self._meter.track(*self._units, *self._optimizers)

    def train(self, deadline: Deadline, tell: Tell) -> bool:
        """Trains epochs until the schedule, the time or the loss ends; returns whether the schedule is done."""
        watch, feed = Stopwatch(self._progress.spent), self._feed("train", augmented=True)
        while self._progress.epoch < self._config.epochs and math.isfinite(self._progress.loss):
            if self._progress.epoch_s and not deadline.leaves(self._progress.epoch_s[-1]):
                return False
            self._epoch(watch, feed)
            done = self._progress
            tell(
                f"epoch {done.epoch}/{self._config.epochs} | loss {done.loss:.3f} | "
                f"val {100 * done.curve[-1][1]:.1f} % | {done.images_per_s[-1]:,.0f} img/s | "
                f"{done.spent.wall_s:.0f} s"
            )
            # What a person would not do is not counted: the state is only for a benchmark that is cut in parts.
            self._state.save(done, self._units, self._optimizers)
        return True

    def result(self) -> dict[str, Any]:
        """Returns what came out; the test split is looked at here, once."""
        done, fit = self._progress, self._fit
        rows = self._task.ingest.facts["split_rows"]
        chosen = max(range(len(done.val_correct)), key=done.val_correct.__getitem__)
        test = self._correct("test")
        return {
            "status": "done" if math.isfinite(done.loss) else "diverged",
            "batch_sizes": [fit.batch_size],
            "micro_batch": fit.micro_batch,
            "segment_layers": fit.segment_layers,
            "predicted_peak_bytes": fit.predicted_peak_bytes,
            "measured_peak_bytes": done.peak_bytes,
            "curve": done.curve,
            "train_s": done.spent.wall_s,
            "cpu_s": done.spent.cpu_s,
            "read_bytes": done.spent.read_bytes,
            "written_bytes": done.spent.written_bytes,
            "stored_bytes": 0,
            "epoch_s": statistics.median(done.epoch_s),
            "images_per_s": statistics.median(done.images_per_s),
            "val_accuracy": done.val_correct[chosen] / rows["val"],
            "test_accuracy": test[chosen] / rows["test"] if test else None,
            "params": sum(count_params(unit) for unit in self._units),
            "lr": self._config.lr,
            "sessions": done.sessions,
        }

    def _epoch(self, watch: Stopwatch, feed: Feed) -> None:
        watch.go()
        before, epoch = watch.spent(), self._progress.epoch
        seed_everything(self._config.seed, 0, epoch)
        began = time.monotonic()
        loss = self._train_batches(feed, epoch)
        rate = feed.num_rows / (time.monotonic() - began)
        correct = self._correct("val")
        watch.stop()
        spent, accuracy = watch.spent(), max(correct) / self._task.ingest.facts["split_rows"]["val"]
        self._progress = replace(
            self._progress,
            epoch=epoch + 1,
            loss=loss,
            peak_bytes=max(self._progress.peak_bytes, self._meter.peak_bytes),
            spent=spent,
            curve=(*self._progress.curve, (spent.wall_s, accuracy)),
            epoch_s=(*self._progress.epoch_s, spent.wall_s - before.wall_s),
            images_per_s=(*self._progress.images_per_s, rate),
            val_correct=tuple(correct),
        )

    def _train_batches(self, feed: Feed, epoch: int) -> float:
        num_batches = feed.num_batches(even=True)
        num_parts = min(self._fit.batch_size // self._fit.micro_batch, num_batches)
        # Micro-batches that do not fill a step are left out, like the last short batch.
        steps = num_batches // num_parts
        losses: list[torch.Tensor] = []
        batches = feed.batches(seed=self._config.seed, epoch=epoch, shuffle=True, even=True)
        for number, batch in zip(range(steps * num_parts), batches, strict=False):
            step, part = divmod(number, num_parts)
            self._set_learning_rate(epoch * steps + step, steps)
            with self._metered(number):
                batch.track(self._meter)
                parts = {"num_parts": num_parts, "ends_step": part == num_parts - 1}
                precision = self._method.precision
                # take_x: no name here may keep the images alive while a later unit trains.
                now = baseline_step(self._units, self._optimizers, batch.take_x(), batch.y_N, precision, **parts)
            losses.append(now[-1])
        if isinstance(batches, Generator):
            batches.close()
        return float(torch.stack(losses).mean())

    def _metered(self, number: int) -> AbstractContextManager[object]:
        # As the pipeline does it: counting costs a CPU step some percent, and all steps hold the same tensors.
        num_parts = self._fit.batch_size // self._fit.micro_batch
        first = number < METERED_STEPS * num_parts
        return self._meter if first or self._device.type == "cuda" else nullcontext()

    def _set_learning_rate(self, step: int, steps_per_epoch: int) -> None:
        total = steps_per_epoch * self._config.epochs
        lr = learning_rate(
            step,
            total_steps=total,
            num_warmup_steps=warmup_steps(self._config.warmup_epochs, steps_per_epoch, total),
            peak_lr=self._peak_lr,
        )
        for optimizer in self._optimizers:
            optimizer.param_groups[0]["lr"] = lr

    def _correct(self, split: str) -> list[int] | None:
        if not self._task.ingest.shards.get(split):
            return None
        return counted(count_correct(self._units, self._feed(split), self._method.precision, self._meter))

    def _feed(self, split: str, *, augmented: bool = False) -> Feed:
        kind = self._config.augment
        augmentation = Augmentation(kind=kind, seed=self._config.seed) if augmented and kind != "none" else None
        return open_feed(
            self._task.store,
            self._task.ingest,
            split,
            batch_size=self._fit.micro_batch if split == "train" else self._fit.val_batch,
            device=self._device,
            augmentation=augmentation,
        )


def counted(counting: Generator[int, None, list[int]]) -> list[int]:
    """Runs a count to its end and returns it."""
    while True:
        try:
            next(counting)
        except StopIteration as finished:
            return finished.value
