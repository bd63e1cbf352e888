"""Trains the blocks of a run from tensors in memory, for scripts that measure what storage costs.

They import it by its plain name. Entry class: `BesideMemory`.

Shapes: N batch, C channels, H, W.
"""

import time
from collections.abc import Callable

import torch

from nf_pipeline.config import RunConfig
from nf_pipeline.core.train_step import forward_block, make_optimizer, train_step
from nf_pipeline.driver.run_record import load_plan
from nf_pipeline.events import EpochDone, Event, StageDone, StageStarted
from nf_pipeline.plans import Plan
from nf_pipeline.storage.layout import RunLayout
from nf_pipeline.storage.store import Store, open_store
from nf_pipeline.worker.evaluate import set_training
from nf_pipeline.worker.feed import open_feed
from nf_pipeline.worker.schedule import peak_learning_rate, set_learning_rate
from nf_pipeline.worker.stage_input import read_ingest
from nf_pipeline.worker.tasks import BlockTask
from nf_pipeline.worker.train_block import units_of

Splits = dict[str, tuple[torch.Tensor, torch.Tensor]]


class BesideMemory:
    """Listens to an inline run and trains every epoch of it once more, from tensors in memory.

    The same units, batch sizes, steps and validations; rows are drawn by a permutation per epoch, nothing is stored.
    While it works the run waits, so what the run takes is the time between two events.

    Attributes:
        spent: "opening_s", "epochs_s", "writing_s" of the run, "memory_epochs_s", "memory_writing_s" of its own.
        beside_s: all that the run has waited.
    """

    def __init__(self, config: RunConfig) -> None:
        kinds = ("opening_s", "epochs_s", "writing_s", "memory_epochs_s", "memory_writing_s")
        self.spent = dict.fromkeys(kinds, 0.0)
        self.beside_s = 0.0
        self._config = config
        self._splits: Splits = {}
        self._block: MemoryBlock | None = None
        self._run_s = 0.0
        self._left_at = time.perf_counter()

    def hear(self, event: Event) -> None:
        """Takes the run's next event."""
        came_at = time.perf_counter()
        self._run_s += came_at - self._left_at
        if event.stage.startswith("block-"):
            if isinstance(event, StageStarted):
                self._end_of("opening_s")
                self._open(int(event.stage.removeprefix("block-")))
            elif isinstance(event, EpochDone):
                self._end_of("epochs_s")
                self._timed("memory_epochs_s", lambda: self._block.train_epoch(event.epoch - 1))
            elif isinstance(event, StageDone):
                self._end_of("writing_s")
                self._timed("memory_writing_s", self._pass_on)
        elif isinstance(event, StageDone):
            self._run_s = 0.0  # of the images, or of the plan
        self._left_at = time.perf_counter()
        self.beside_s += self._left_at - came_at

    def _end_of(self, kind: str) -> None:
        self.spent[kind] += self._run_s
        self._run_s = 0.0

    def _timed(self, kind: str, work: Callable[[], None]) -> None:
        began = time.perf_counter()
        work()
        self.spent[kind] += time.perf_counter() - began

    def _open(self, block_idx: int) -> None:
        store, layout = open_store(self._config.storage.uri), RunLayout(self._config.run)
        if not self._splits:
            self._splits = read_images(store, layout)
        self._block = MemoryBlock(self._config, load_plan(store, layout), block_idx, self._splits)

    def _pass_on(self) -> None:
        if not self._block.is_last:
            self._splits = self._block.outputs()


def read_images(store: Store, layout: RunLayout) -> Splits:
    """Returns the train and the validation split as (x_NCHW, y_N), normalised."""
    splits, ingest = {}, read_ingest(store, layout)
    for split in ("train", "val"):
        feed = open_feed(store, ingest, split, batch_size=128, device=torch.device("cpu"))
        batches = [(batch.take_x(), batch.y_N) for batch in feed.batches()]
        splits[split] = tuple(torch.cat(parts) for parts in zip(*batches, strict=True))
    return splits


class MemoryBlock:
    """A block of a plan with fresh weights, and its input in memory.

    Attributes:
        is_last: no other block follows.
    """

    def __init__(self, config: RunConfig, plan: Plan, block_idx: int, splits: Splits) -> None:
        self.is_last = block_idx == len(plan.blocks) - 1
        self._config, self._splits = config, splits
        self._batch_size = plan.blocks[block_idx].batch_size
        task = BlockTask(
            config=config,
            plan=plan,
            block_idx=block_idx,
            batch_size=self._batch_size,
            attempt="memory",
            num_attempts=1,
            num_threads=config.cluster.num_threads,
        )
        self._units = units_of(task)[1]
        self._peak_lr = peak_learning_rate(config.train.lr, self._batch_size)
        self._optimizers = [make_optimizer(unit, config.train, self._peak_lr) for unit in self._units]

    def train_epoch(self, epoch: int) -> None:
        """Trains and validates one epoch."""
        cfg, (x_NCHW, y_N) = self._config.train, self._splits["train"]
        set_training(self._units, True)
        parts = [rows for rows in torch.randperm(len(y_N)).split(self._batch_size) if len(rows) > 1]  # batch norm
        for step, rows in enumerate(parts):
            set_learning_rate(self._optimizers, cfg, epoch * len(parts) + step, len(parts), self._peak_lr)
            losses = train_step(self._units, self._optimizers, x_NCHW[rows], y_N[rows], cfg.precision)
            torch.stack(losses).tolist()  # the run looks at them as well
        set_training(self._units, False)
        val_x_NCHW, val_y_N = self._splits["val"]
        for x_NCHW, labels_N in zip(val_x_NCHW.split(self._batch_size), val_y_N.split(self._batch_size), strict=True):
            for logits_NK in forward_block(self._units, x_NCHW, cfg.precision, with_heads=True)[1]:
                (logits_NK.argmax(dim=1) == labels_N).sum().item()

    def outputs(self) -> Splits:
        """Returns the next block's input."""
        return {split: (self._forward(x_NCHW), y_N) for split, (x_NCHW, y_N) in self._splits.items()}

    def _forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        set_training(self._units, False)
        precision, parts = self._config.train.precision, x_NCHW.split(self._batch_size)
        return torch.cat([forward_block(self._units, x, precision, with_heads=False)[0] for x in parts])
