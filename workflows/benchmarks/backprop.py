"""Trains a run's model by plain backpropagation on the run's own images: the baseline beside the pipeline.

    python workflows/benchmarks/backprop.py ./nf-runs/run --micro-batch

takes the largest batch whose training step fits the run's memory budget (`--no-budget`: batch 128), and with
`--checkpointing` or `--micro-batch` the usual ways to need less. Data, normalisation, seed, optimiser,
schedule, learning rate and the count of bytes are the pipeline's own code. The run needs committed images;
what else it has done is not looked at. Entry: `train_by_backprop`.

Shapes: N batch, C channels, H, W, K classes.
"""

import argparse
import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from nf_pipeline.config import RunConfig
from nf_pipeline.core.layers import cut
from nf_pipeline.core.memory import measure_peak
from nf_pipeline.core.models import build_model, suggest_model
from nf_pipeline.core.train_step import make_optimizer, resolve_device
from nf_pipeline.driver.run_record import load_run
from nf_pipeline.storage.layout import RunLayout
from nf_pipeline.storage.manifest import StageManifest
from nf_pipeline.storage.store import Store, open_store
from nf_pipeline.worker.feed import Feed, open_feed
from nf_pipeline.worker.runtime import seed_everything, set_threads
from nf_pipeline.worker.schedule import learning_rate, peak_learning_rate, warmup_steps
from nf_pipeline.worker.stage_input import read_ingest

REFERENCE_BATCH = 128
PROBE_BATCH = 32  # large enough for activations to outweigh the weights of small models

Forward = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to train by backpropagation.

    Attributes:
        name: for the table.
        within_budget: take the largest batch whose step fits the run's memory budget; else batch 128.
        checkpointing: keep the activations of segment borders only and recompute the rest.
        micro_batch: accumulate gradients up to batch 128 over batches that fit.
        segment_layers: layers between kept activations; 0 chooses what needs the least memory.
        lr: peak learning rate at batch 128; None takes the run's, which suits local units, not always this.
    """

    name: str
    within_budget: bool = True
    checkpointing: bool = False
    micro_batch: bool = False
    segment_layers: int = 0
    lr: float | None = None


@dataclass(frozen=True, kw_only=True)
class BackpropResult:
    """What a method took and reached.

    Attributes:
        method: its name.
        fits: False if not even batch 2 fits the budget; then nothing is trained.
        batch_size: samples per optimiser step, 0 if nothing fits.
        micro_batch_size: samples per forward pass.
        predicted_peak_bytes: at that size, or at batch 2 if nothing fits.
        budget_bytes: None without a budget.
        params: number of weights.
        epochs: passes over the train split.
        measured_peak_bytes: by the pipeline's own count, while training and validating.
        train_s: wall seconds, validation after every epoch included.
        val_accuracy, test_accuracy: in [0, 1] after the last epoch.
    """

    method: str
    fits: bool
    batch_size: int
    micro_batch_size: int
    predicted_peak_bytes: int
    budget_bytes: int | None
    params: int
    epochs: int = 0
    measured_peak_bytes: int | None = None
    train_s: float | None = None
    val_accuracy: float | None = None
    test_accuracy: float | None = None


@dataclass(frozen=True, kw_only=True)
class Task:
    """A run's configuration and images, and how long to train.

    Attributes:
        config: of the run.
        store: where it lies.
        ingest: its committed images.
        epochs: passes over the train split.
        num_threads: CPU threads to compute with.
    """

    config: RunConfig
    store: Store
    ingest: StageManifest
    epochs: int
    num_threads: int

    def network(self) -> nn.Module:
        """Builds the model with the weights that the pipeline starts from."""
        facts = self.ingest.facts
        return build_model(
            self.config.model.name or suggest_model(self.image_shape, facts["split_rows"]["train"]),
            image_shape=self.image_shape,
            num_classes=facts["num_classes"],
            seed=self.config.train.seed,
        )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return tuple(self.ingest.spec.shape)


def open_task(uri: str, *, epochs: int, num_threads: int) -> Task:
    """Reads a run whose images are committed.

    Args:
        uri: STORE/NAME.
        epochs: passes over the train split.
        num_threads: CPU threads to compute with.

    Raises:
        ObjectMissing: there is no such run, or it has no images yet.
    """
    config = load_run(uri)
    store = open_store(config.storage.uri)
    ingest = read_ingest(store, RunLayout(config.run))
    return Task(config=config, store=store, ingest=ingest, epochs=epochs, num_threads=num_threads)


def train_by_backprop(task: Task, method: Method) -> BackpropResult:
    """Trains the whole model at once and returns what that took and reached."""
    set_threads(task.num_threads)
    device = resolve_device(task.config.train.device)
    budget = task.config.memory.budget_bytes if method.within_budget else None
    if method.checkpointing and not method.segment_layers:
        method = choose_segments(task, method, device)
    micro, predicted = choose_batch(task, method, device, budget)
    batch = REFERENCE_BATCH if method.micro_batch and micro else micro
    result = BackpropResult(
        method=method.name,
        fits=micro > 0,
        batch_size=batch,
        micro_batch_size=micro,
        predicted_peak_bytes=predicted,
        budget_bytes=budget,
        params=sum(weight.numel() for weight in task.network().parameters()),
    )
    return _Trainer(task, method, device, batch, micro).fill_in(result) if micro else result


def choose_segments(task: Task, method: Method, device: torch.device) -> Method:
    """Returns the method with the segment length, in layers, whose training step needs the least memory.

    Up to the square root of the number of layers, which is best when all layers are alike (Chen et al. 2016,
    https://arxiv.org/abs/1604.06174), and less where one segment at full resolution outweighs all borders.
    """
    num_layers = len(cut(task.network(), task.image_shape).layers)
    choices = [replace(method, segment_layers=length) for length in range(1, math.isqrt(num_layers - 1) + 2)]
    return min(choices, key=lambda choice: predict_peak(task, choice, device, PROBE_BATCH))


def choose_batch(task: Task, method: Method, device: torch.device, budget: int | None) -> tuple[int, int]:
    """Finds the largest batch, up to 128, whose training step fits; 128 without a budget.

    Micro-batches are divisors of 128, so that every optimiser step sees 128 samples.

    Returns:
        The batch (0 if batch 2 does not fit) and its predicted peak bytes (batch 2's then).
    """
    if budget is None:
        return REFERENCE_BATCH, predict_peak(task, method, device, REFERENCE_BATCH)
    sizes = range(2, REFERENCE_BATCH + 1)
    candidates = [size for size in sizes if not method.micro_batch or REFERENCE_BATCH % size == 0]
    peaks: dict[int, int] = {}
    low, high = 0, len(candidates)  # candidates[:low] fit, candidates[high:] do not
    while low < high:
        middle = (low + high) // 2
        peak = peaks[middle] = predict_peak(task, method, device, candidates[middle])
        low, high = (middle + 1, high) if peak <= budget else (low, middle)
    return (candidates[low - 1], peaks[low - 1]) if low else (0, peaks[0])


def predict_peak(task: Task, method: Method, device: torch.device, size: int) -> int:
    """Returns the peak bytes of two optimiser steps at a batch size: the second has the momentum buffers.

    On a CPU the tensors are fake and nothing is allocated; on a GPU the steps really run.
    """
    is_cuda = device.type == "cuda"
    with contextlib.nullcontext() if is_cuda else FakeTensorMode(allow_non_fake_inputs=True):
        network, forward = _build(task, method, device)
        optimizer = make_optimizer(network, task.config.train, task.config.train.lr)
        meter = measure_peak(device)
        meter.track(network)
        for ends_step in (False, True, False, True) if method.micro_batch else (True, True):
            x_NCHW = torch.zeros(size, *task.image_shape, device=device)
            y_N = torch.zeros(size, dtype=torch.int64, device=device)
            with meter:
                meter.track(x_NCHW, y_N)
                _backward(forward, x_NCHW, y_N, num_parts=1)
                if ends_step:
                    _step(optimizer)
    return meter.peak_bytes


class _Trainer:
    """Plain SGD on the whole model: the pipeline's optimiser, schedule and meter, one loss at the end."""

    def __init__(self, task: Task, method: Method, device: torch.device, batch: int, micro: int) -> None:
        self._task = task
        self._config = task.config.train
        self._device = device
        self._batch = batch
        self._micro = micro
        self._network, self._forward = _build(task, method, device)
        self._peak_lr = peak_learning_rate(method.lr or self._config.lr, batch)
        self._optimizer = make_optimizer(self._network, self._config, self._peak_lr)
        self._meter = measure_peak(device)
        self._meter.track(self._network)

    def fill_in(self, result: BackpropResult) -> BackpropResult:
        """Trains all epochs, or up to the one that diverges, and adds what came out."""
        began = time.monotonic()
        feed, epoch, loss = self._feed("train"), 0, 0.0
        while epoch < self._task.epochs and math.isfinite(loss):
            seed_everything(self._config.seed, 0, epoch)
            loss = self._train_epoch(feed, epoch)
            epoch += 1
            self._report(epoch, loss, time.monotonic() - began)
        train_s = time.monotonic() - began
        return replace(
            result,
            epochs=epoch,
            measured_peak_bytes=self._meter.peak_bytes,
            train_s=round(train_s, 3),
            val_accuracy=self._accuracy("val"),
            test_accuracy=self._accuracy("test"),
        )

    def _train_epoch(self, feed: Feed, epoch: int) -> float:
        num_parts = self._batch // self._micro
        steps = feed.num_batches(even=True) // num_parts
        losses: list[torch.Tensor] = []
        batches = feed.batches(seed=self._config.seed, epoch=epoch, shuffle=True, even=True)
        # Micro-batches that do not fill a step are left out, like the last short batch.
        for number, batch in zip(range(steps * num_parts), batches, strict=False):
            step, part = divmod(number, num_parts)
            self._set_learning_rate(epoch * steps + step, steps)
            with self._meter:
                batch.track(self._meter)
                losses.append(_backward(self._forward, batch.take_x(), batch.y_N, num_parts))
                if part == num_parts - 1:
                    _step(self._optimizer)
        batches.close()
        return float(torch.stack(losses).mean()) * num_parts

    def _set_learning_rate(self, step: int, steps_per_epoch: int) -> None:
        total = steps_per_epoch * self._task.epochs
        self._optimizer.param_groups[0]["lr"] = learning_rate(
            step,
            total_steps=total,
            num_warmup_steps=warmup_steps(self._config.warmup_epochs, steps_per_epoch, total),
            peak_lr=self._peak_lr,
        )

    @torch.no_grad()
    def _accuracy(self, split: str) -> float | None:
        if not self._task.ingest.shards.get(split):
            return None
        feed, correct = self._feed(split), 0
        self._network.eval()
        for batch in feed.batches():
            with self._meter:
                batch.track(self._meter)
                correct += int((self._network(batch.take_x()).argmax(dim=1) == batch.y_N).sum())
        self._network.train()
        return correct / feed.num_rows

    def _report(self, epoch: int, loss: float, seconds: float) -> None:
        accuracy = self._accuracy("val")
        val = "-" if accuracy is None else f"{100 * accuracy:.1f} %"
        print(
            f"epoch {epoch}/{self._task.epochs} | loss {loss:.3f} | val {val} | {seconds:.0f} s",
            file=sys.stderr,
            flush=True,
        )

    def _feed(self, split: str) -> Feed:
        manifest, micro = self._task.ingest, self._micro
        return open_feed(self._task.store, manifest, split, batch_size=micro, device=self._device)


def _build(task: Task, method: Method, device: torch.device) -> tuple[nn.Module, Forward]:
    """Builds the model, and what its training step calls: the model itself or its checkpointed form."""
    network = task.network()
    forward: Forward = network
    if method.checkpointing:
        parts, length = cut(network, task.image_shape), method.segment_layers
        starts = range(0, len(parts.layers), length)
        segments = [nn.Sequential(*parts.layers[start : start + length]) for start in starts]
        forward = _checkpointed(segments, parts.tail)
    if device.type != "cpu":  # fake tensors cannot be moved, not even to where they are
        network.to(device)
    return network.train(), forward


def _checkpointed(segments: Sequence[nn.Module], tail: nn.Module) -> Forward:
    def forward(x_NCHW: torch.Tensor) -> torch.Tensor:
        # Batch norm sees every batch twice, so its running statistics move twice as fast.
        for segment in segments:
            x_NCHW = checkpoint(segment, x_NCHW, use_reentrant=False)
        return tail(x_NCHW)

    return forward


def _backward(forward: Forward, x_NCHW: torch.Tensor, y_N: torch.Tensor, num_parts: int) -> torch.Tensor:
    loss = functional.cross_entropy(forward(x_NCHW), y_N) / num_parts
    loss.backward()
    return loss.detach()


def _step(optimizer: torch.optim.Optimizer) -> None:
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="STORE/NAME", help="run whose images, model and settings are used")
    parser.add_argument("--epochs", type=int, help="passes over the train split [default: the run's per block]")
    parser.add_argument("--no-budget", action="store_true", help="batch 128, whatever memory that takes")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations")
    parser.add_argument("--micro-batch", action="store_true", help="accumulate gradients up to batch 128")
    parser.add_argument("--lr", type=float, help="peak learning rate at batch 128 [default: the run's]")
    parser.add_argument("--num-threads", type=int, default=os.cpu_count(), help="CPU threads [default: all]")
    parser.add_argument("--output", type=Path, help="also write the result to this JSON file")
    return parser.parse_args()


def _main() -> None:
    arguments = _parse_arguments()
    method = Method(
        name="backprop",
        within_budget=not arguments.no_budget,
        checkpointing=arguments.checkpointing,
        micro_batch=arguments.micro_batch,
        lr=arguments.lr,
    )
    epochs = arguments.epochs or load_run(arguments.run).train.epochs
    task = open_task(arguments.run, epochs=epochs, num_threads=arguments.num_threads)
    document = json.dumps(asdict(train_by_backprop(task, method)), indent=2)
    print(document)
    if arguments.output is not None:
        arguments.output.write_text(document + "\n", encoding="utf8")


if __name__ == "__main__":
    _main()
