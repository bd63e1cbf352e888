"""One block alone: what it stores is what its layers compute, and nothing counts before the manifest."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from trained_digits import train_digits

from nf_pipeline.config import RunConfig, resolve_config
from nf_pipeline.driver.run import train
from nf_pipeline.driver.run_record import load_plan
from nf_pipeline.errors import Diverged, OutOfBudget
from nf_pipeline.events import EpochDone, Event
from nf_pipeline.storage.layout import RunLayout
from nf_pipeline.storage.store import Store, open_store
from nf_pipeline.worker.assemble import load_units
from nf_pipeline.worker.feed import open_feed
from nf_pipeline.worker.stage_input import read_block, read_ingest
from nf_pipeline.worker.tasks import BlockTask
from nf_pipeline.worker.train_block import train_block
from nf_pipeline.worker.write_activations import encode_activations

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Store, RunLayout]:
    """A finished run of two epochs on some digits."""
    uri = str(tmp_path_factory.mktemp("runs"))
    config = train_digits(uri, {"data.max_train_images": 300})
    return config, open_store(uri), RunLayout("run")


def make_task(run: tuple[RunConfig, Store, RunLayout], **changes: object) -> BlockTask:
    config, store, layout = run
    plan = load_plan(store, layout)
    given = {
        "config": config,
        "plan": plan,
        "block_idx": 0,
        "batch_size": plan.blocks[0].batch_size,
        "attempt": "test",
        "num_attempts": 1,
        "num_threads": 1,
    }
    return BlockTask(**{**given, **changes})


def drive(task: BlockTask) -> Iterator[Event]:
    yield from train_block(task)


@torch.no_grad()
def test_stored_activations_are_what_the_trained_layers_compute(run: tuple) -> None:
    config, store, layout = run
    plan = load_plan(store, layout)
    blocks = [read_block(store, layout, idx) for idx in range(len(plan.blocks))]
    units = [unit.eval() for unit in load_units(store, config, plan, blocks, plan.blocks[0].units[1])]
    images = open_feed(store, read_ingest(store, layout), "val", batch_size=1000, device=CPU)
    stored = open_feed(store, blocks[0], "val", batch_size=1000, device=CPU)
    (before,), (after,) = images.batches(), stored.batches()
    x_NCHW = before.take_x()
    for unit in units:
        x_NCHW = unit.layers(x_NCHW)
    torch.testing.assert_close(after.take_x(), x_NCHW)
    assert before.sample_ids.tolist() == after.sample_ids.tolist()
    assert torch.equal(before.y_N, after.y_N)


def test_last_block_stores_no_activations_and_the_others_store_train_and_val(run: tuple) -> None:
    _, store, layout = run
    blocks = [read_block(store, layout, idx) for idx in range(len(load_plan(store, layout).blocks))]
    assert blocks[-1].shards == {}
    assert all(set(block.shards) == {"train", "val"} for block in blocks[:-1])


def test_budget_below_the_measured_peak_stops_the_block_within_the_first_epoch(run: tuple) -> None:
    _, store, layout = run
    plan = load_plan(store, layout)
    block = replace(plan.blocks[0], budget_bytes=plan.blocks[0].predicted_peak_bytes // 2)
    tight = replace(plan, blocks=(block, *plan.blocks[1:]))
    events: list[Event] = []
    with pytest.raises(OutOfBudget, match="measured peak"):
        for event in drive(make_task(run, plan=tight, attempt="tight")):
            events.append(event)
    assert not any(isinstance(event, EpochDone) for event in events)
    assert store.list(layout.block_attempt(0, "tight")) == []


@pytest.mark.parametrize("value", [1e6, float("nan"), float("inf")])
def test_activation_that_is_not_finite_as_stored_is_an_error_that_names_the_type(value: float) -> None:
    x_NCHW = torch.zeros(2, 1, 2, 2)
    x_NCHW[1, 0, 1, 1] = value
    with pytest.raises(Diverged, match="block-004: an activation is not finite as float16"):
        encode_activations(x_NCHW, "float16", "block-004")


@pytest.mark.parametrize(("dtype", "item_bytes"), [("float32", 4), ("float16", 2), ("bfloat16", 2)])
def test_encoded_activations_are_one_row_of_bytes_per_sample(dtype: str, item_bytes: int) -> None:
    x_NCHW = torch.randn(3, 4, 2, 2)
    rows = encode_activations(x_NCHW, dtype, "block-000")
    assert rows.shape == (3, 16 * item_bytes)
    back_NCHW = torch.from_numpy(rows).view(getattr(torch, dtype)).view(3, 4, 2, 2)
    assert torch.equal(back_NCHW, x_NCHW.to(getattr(torch, dtype)))


def test_bf16_trains_and_stays_within_the_budget(tmp_path: Path) -> None:
    summary = train(
        resolve_config(
            flags={
                "memory.budget_bytes": "4MiB",
                "data.max_train_images": 1400,
                "train.epochs": 2,
                "train.precision": "bf16",
                "storage.uri": str(tmp_path),
                "cluster.executor": "inline",
                "cluster.num_threads": 1,
                "train.device": "cpu",
            }
        )
    )
    assert max(exit["val_accuracy"] for exit in summary["exits"]) > 0.5
    for block in summary["blocks"]:
        assert block["measured_peak_bytes"] <= 4 * 2**20
        assert block["predicted_peak_bytes"] == pytest.approx(block["measured_peak_bytes"], rel=0.1)
