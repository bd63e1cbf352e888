"""Trains a baseline: the pipeline's images, optimiser, schedule, meter and validation, another rule for the weights.

Entries: `train_baseline`, `measure_epoch`.
"""

import math
import statistics
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from nf_pipeline.bench.baseline_state import BaselineState
from nf_pipeline.bench.baseline_step import baseline_step
from nf_pipeline.bench.deadline import Deadline
from nf_pipeline.bench.fit import MIN_BATCH, Fit, batch_sizes, free_cached
from nf_pipeline.bench.images import bytes_per_pass
from nf_pipeline.bench.methods import Method
from nf_pipeline.bench.stopwatch import Stopwatch
from nf_pipeline.bench.task import Task
from nf_pipeline.config import fingerprint_of
from nf_pipeline.core.hits import Hits
from nf_pipeline.core.memory import measure_peak
from nf_pipeline.core.mixup import draw_mix
from nf_pipeline.core.profiler import count_params
from nf_pipeline.core.results import Results
from nf_pipeline.core.train_step import make_optimizer
from nf_pipeline.worker.choice import Choice
from nf_pipeline.worker.evaluate import find_results
from nf_pipeline.worker.feed import Augmentation, Feed, open_feed
from nf_pipeline.worker.runtime import cap_device_memory, seed_everything, set_threads
from nf_pipeline.worker.schedule import peak_learning_rate, set_learning_rate
from nf_pipeline.worker.train_block import METERED_STEPS

Tell = Callable[[str], None]

_WARM_IMAGES = 128
_TIMED_IMAGES = 256


@dataclass(frozen=True, kw_only=True)
class Limit:
    """When a training ends before its schedule does.

    Attributes:
        seconds: it ends before an epoch that would pass them, unless it has reached the target.
        target: validation accuracy.
    """

    seconds: float
    target: float


def train_baseline(
    task: Task,
    method: Method,
    fit: Fit,
    *,
    folder: Path,
    deadline: Deadline,
    tell: Tell,
    limit: Limit | None = None,
    with_test: bool = True,
) -> dict[str, Any] | None:
    """Trains to the end of the schedule, or as far as the time allows.

    Args:
        fit: batch and segments, which fit the budget.
        folder: of the unfinished state.
        tell: gets a line per epoch.
        limit: None trains to the end.
        with_test: look at the test split, once, after the whole schedule.

    Returns:
        The result, see `_Trainer.result`; None if time ran out. Then the same call goes on.
    """
    state = BaselineState(folder)
    free_cached(task.device)
    while True:
        began_with = state.load().micro_batch or fit.micro_batch
        fit = with_micro_batch(fit, method, began_with)
        try:
            trainer = _Trainer(task, method, fit, state)
            return trainer.result(with_test=with_test) if trainer.train(deadline, tell, limit) else None
        except torch.OutOfMemoryError:
            if fit.micro_batch == MIN_BATCH:
                raise
            fit = smaller(fit, method)
            tell(f"the device ran out of memory: again with batch {fit.micro_batch}")
            state.clear()


def measure_epoch(task: Task, method: Method, fit: Fit, folder: Path) -> float:
    """Returns the seconds of an epoch, without its validation, from some steps whose result is thrown away.

    Args:
        folder: holds no state.

    Returns:
        Infinity where a GPU's allocator refuses the batch that should fit: whoever trains then goes down from it.
    """
    try:
        trainer = _Trainer(task, method, fit, BaselineState(folder))
        trainer.train_images(_WARM_IMAGES)
        began = time.monotonic()
        num_images = trainer.train_images(_TIMED_IMAGES)
    except torch.OutOfMemoryError:
        return math.inf
    return (time.monotonic() - began) / num_images * task.ingest.facts["split_rows"]["train"]


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

    def train(self, deadline: Deadline, tell: Tell, limit: Limit | None) -> bool:
        """Trains epochs until the schedule, the limit, the time or the loss ends; False if the time did."""
        watch, feed = Stopwatch(self._progress.spent), self._feed("train", augmented=True)
        while self._progress.epoch < self._config.epochs and math.isfinite(self._progress.loss):
            if limit is not None and self._is_beyond(limit):
                return True
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

    def train_images(self, num_images: int) -> int:
        """Takes the steps of an epoch's first images, without a schedule; returns how many images there were."""
        _, seen = self._train_batches(self._feed("train", augmented=True), 0, num_images)
        return seen

    def result(self, *, with_test: bool) -> dict[str, Any]:
        """Returns what came out; the test split is looked at here, once."""
        done, fit = self._progress, self._fit
        rows = self._task.ingest.facts["split_rows"]
        chosen = max(range(len(done.val_correct)), key=done.val_correct.__getitem__)
        has_ended = done.epoch == self._config.epochs
        test = self._test(chosen) if with_test and has_ended else None
        return {
            "status": ("done" if has_ended else "given up") if math.isfinite(done.loss) else "diverged",
            "epochs": done.epoch,
            "batch_sizes": [fit.batch_size],
            "micro_batch": fit.micro_batch,
            "segment_layers": fit.segment_layers,
            "predicted_peak_bytes": fit.predicted_peak_bytes,
            "measured_peak_bytes": done.peak_bytes,
            "curve": done.curve,
            "train_s": done.spent.wall_s,
            "cpu_s": done.spent.cpu_s,
            "read_bytes": done.epoch * bytes_per_pass(self._task.ingest),
            "written_bytes": done.spent.written_bytes,
            "stored_bytes": 0,
            "epoch_s": statistics.median(done.epoch_s),
            "images_per_s": statistics.median(done.images_per_s),
            "val_accuracy": done.val_correct[chosen] / rows["val"],
            "test_accuracy": None if test is None else test / rows["test"],
            "params": sum(count_params(unit) for unit in self._units),
            "lr": self._config.lr,
            "sessions": done.sessions,
        }

    def _is_beyond(self, limit: Limit) -> bool:
        done = self._progress
        if not done.curve or max(accuracy for _, accuracy in done.curve) >= limit.target:
            return False
        return done.spent.wall_s + done.epoch_s[-1] > limit.seconds

    def _epoch(self, watch: Stopwatch, feed: Feed) -> None:
        watch.go()
        before, epoch = watch.spent(), self._progress.epoch
        seed_everything(self._config.seed, 0, epoch)
        began = time.monotonic()
        loss, num_images = self._train_batches(feed, epoch)
        rate = num_images / (time.monotonic() - began)
        correct = self._correct_on_val()
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

    def _train_batches(self, feed: Feed, epoch: int, max_images: int | None = None) -> tuple[float, int]:
        """Returns the mean loss and how many images the optimiser's steps were taken on."""
        num_batches = feed.num_batches(even=True)
        num_parts = min(self._fit.batch_size // self._fit.micro_batch, num_batches)
        # Micro-batches that do not fill a step are left out, like the last short batch.
        steps, num_images = num_batches // num_parts, 0
        if max_images is not None:
            steps = max(1, min(steps, max_images // self._fit.batch_size))
        losses: list[torch.Tensor] = []
        order = {"seed": self._config.seed, "shuffle": True, "even": True}
        batches = feed.batches(epoch=epoch, **order)
        for number, batch in zip(range(steps * num_parts), batches, strict=False):
            step, part = divmod(number, num_parts)
            set_learning_rate(self._optimizers, self._config, epoch * steps + step, steps, self._peak_lr)
            with self._metered(number):
                batch.track(self._meter)
                now = baseline_step(
                    self._units,
                    self._optimizers,
                    batch.take_x,
                    batch.y_N,
                    self._method.precision,
                    num_parts=num_parts,
                    ends_step=part == num_parts - 1,
                    mix=draw_mix(self._config.mixup, len(batch.y_N), self._device),
                )
            losses.append(now[-1])
            num_images += len(batch.y_N)
        if isinstance(batches, Generator):
            batches.close()
        if max_images is None and epoch + 1 < self._config.epochs:
            feed.prefetch(epoch=epoch + 1, **order)
        return float(torch.stack(losses).mean()), num_images

    def _metered(self, number: int) -> AbstractContextManager[object]:
        # As the pipeline does it: counting costs a CPU step some percent, and all steps hold the same tensors.
        num_parts = self._fit.batch_size // self._fit.micro_batch
        first = number < METERED_STEPS * num_parts
        return self._meter if first or self._device.type == "cuda" else nullcontext()

    def _correct_on_val(self) -> list[int]:
        found = counted(find_results(self._units, self._val_feed, self._method.precision, self._meter, Hits))
        return [one.total for one in found]

    def _test(self, chosen: int) -> int | None:
        """Counts the test images that the chosen exit gets right; their labels open to a committed choice alone."""
        task = self._task
        if not task.ingest.shards.get("test"):
            return None
        made_from = fingerprint_of([task.config.fingerprint, self._method.title, self._fit.batch_size])
        labels = self._state.choose(
            task.store,
            task.ingest,
            Choice(
                fingerprint=made_from,
                ingest_checksum=task.ingest.content_checksum,
                chosen_exit=chosen,
                reason="right most often on validation",
            ),
        )
        precision = self._method.precision
        found = counted(find_results(self._units, self._feed("test"), precision, self._meter, Hits, labels))
        return found[chosen].total

    @cached_property
    def _val_feed(self) -> Feed:
        """Opened once, as the pipeline does it: its shards are hashed once."""
        return self._feed("val")

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


def counted(counting: Generator[int, None, list[Results]]) -> list[Results]:
    """Runs a validation to its end and returns what it found."""
    while True:
        try:
            next(counting)
        except StopIteration as finished:
            return finished.value
