"""A block trained by two workers follows the loss curve of one process that has their batches as one."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from nf_pipeline.config import RunConfig
from nf_pipeline.core.layers import cut
from nf_pipeline.core.local_unit import build_units
from nf_pipeline.core.models import build_model
from nf_pipeline.core.train_step import make_optimizer, train_step
from nf_pipeline.driver.run import train
from nf_pipeline.driver.run_record import load_plan
from nf_pipeline.errors import ConfigError
from nf_pipeline.events import EpochDone, Event
from nf_pipeline.plans import Plan
from nf_pipeline.storage.layout import RunLayout
from nf_pipeline.storage.parts import Part
from nf_pipeline.storage.store import Store, open_store
from nf_pipeline.worker.feed import DeviceBatch, open_feed
from nf_pipeline.worker.schedule import learning_rate, peak_learning_rate, warmup_steps
from nf_pipeline.worker.stage_input import read_ingest

MakeConfig = Callable[..., RunConfig]
CPU = torch.device("cpu")
EPOCHS = 4
GANG = 2


def curve_of_one_process(config: RunConfig, store: Store, plan: Plan) -> list[list[float]]:
    """Trains the first block alone, on the members' batches put together; mean losses per epoch and unit."""
    block, settings = plan.blocks[0], config.train
    model = build_model(plan.model, inputs=plan.inputs, num_outputs=plan.target.size, seed=settings.seed)
    cut_model = cut(model, plan.inputs)
    which = range(*block.units)
    units = build_units(cut_model, settings.head, plan.spans, plan.target, settings.seed, units=which)
    peak_lr = peak_learning_rate(settings.lr, block.batch_size * GANG)
    optimizers = [make_optimizer(unit, settings, peak_lr) for unit in units]
    curve, step = [], 0
    for epoch in range(settings.epochs):
        losses = []
        batches = list(joined_batches(config, store, block.batch_size, epoch))
        total = len(batches) * settings.epochs
        for x_NCHW, y_N in batches:
            warmup = warmup_steps(settings.warmup_epochs, len(batches), total)
            lr = learning_rate(step, total_steps=total, num_warmup_steps=warmup, peak_lr=peak_lr)
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = lr
            losses.append(torch.stack(train_step(units, optimizers, x_NCHW, y_N, "fp32")))
            step += 1
        curve.append(torch.stack(losses).mean(0).tolist())
    return curve


def joined_batches(
    config: RunConfig, store: Store, batch_size: int, epoch: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    ingest = read_ingest(store, RunLayout(config.run))
    parts = [
        open_feed(store, ingest, "train", batch_size=batch_size, device=CPU, part=Part(index=rank, count=GANG))
        for rank in range(GANG)
    ]
    epochs = [part.batches(seed=config.train.seed, epoch=epoch, shuffle=True, even=True) for part in parts]
    for members in zip(*epochs, strict=True):
        yield _join(members)


def _join(members: tuple[DeviceBatch, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.cat([batch.take_x() for batch in members]), torch.cat([batch.y_N for batch in members])


@pytest.mark.ray
def test_loss_curve_of_two_workers_is_that_of_one_with_the_same_effective_batch(
    digits_config: MakeConfig, tmp_path: Path
) -> None:
    config = digits_config(
        cluster__executor="ray", train__workers_per_block=GANG, train__epochs=EPOCHS, train__lr=0.01
    )
    events: list[Event] = []
    summary = train(config, on_event=events.append)
    ours = [event.losses for event in events if isinstance(event, EpochDone) and event.stage == "block-000"]
    store = open_store(str(tmp_path / "runs"))
    theirs = curve_of_one_process(config, store, load_plan(store, RunLayout(config.run)))
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=2e-4, atol=2e-4)
    assert theirs[-1][0] < theirs[0][0], "it learns"
    budgets = [block["budget_bytes"] for block in summary["blocks"]]
    assert all(block["measured_peak_bytes"] <= size for block, size in zip(summary["blocks"], budgets, strict=True))
    rows = summary["split_rows"]
    assert sum(read_ingest(store, RunLayout(config.run)).num_rows(split) for split in rows) == sum(rows.values())


@pytest.mark.ray
def test_two_workers_hold_what_was_predicted_where_gradients_fill_the_budget(digits_config: MakeConfig) -> None:
    settings = {"train__workers_per_block": GANG, "train__epochs": 1, "train__unit_layers": 2}
    summary = train(digits_config(cluster__executor="ray", memory__budget_bytes="3.6MiB", **settings))
    for block in summary["blocks"]:
        assert block["measured_peak_bytes"] <= 1.01 * block["predicted_peak_bytes"]


def test_several_workers_in_one_process_are_refused(digits_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match="asks for 2 workers, executor inline is one process"):
        train(digits_config(train__workers_per_block=2))


def test_auto_budget_without_a_worker_that_says_what_it_has_is_refused(digits_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match="budget_bytes is auto, but no worker says"):
        train(digits_config(memory__budget_bytes="auto"))
