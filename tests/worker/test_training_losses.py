"""Runs whose losses have weights of their own: they are trained, checkpointed, and left out of what is kept."""

import shutil
from pathlib import Path

import pytest
import torch
from trained_digits import train_digits

from nf_pipeline import load_model
from nf_pipeline.config import RunConfig
from nf_pipeline.core.profiler import count_params
from nf_pipeline.core.tensor_file import read_tensors
from nf_pipeline.driver.run_record import load_plan
from nf_pipeline.events import EpochDone, StageStarted
from nf_pipeline.storage.layout import RunLayout
from nf_pipeline.storage.manifest import read_object
from nf_pipeline.storage.store import Store, open_store
from nf_pipeline.worker.stage_input import read_block
from nf_pipeline.worker.tasks import BlockTask
from nf_pipeline.worker.train_block import train_block

LAYOUT = RunLayout("run")
CHANGES = {
    "data.max_train_images": 300,
    "exits.patience": "never",
    "train.unit_layers": 2,
    "train.mixup": 0.2,
    "train.label_smoothing": 0.1,
}


LOSSES = ("predsim", "infopro")


@pytest.fixture(scope="module", params=LOSSES)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Path]:
    """A finished run with every change of the loss, two epochs on some digits."""
    folder = tmp_path_factory.mktemp("losses")
    return train_digits(str(folder), {**CHANGES, "train.loss": request.param}), folder


def weights_of(store: Store, block_idx: int) -> dict[str, torch.Tensor]:
    return read_tensors(read_object(store, read_block(store, LAYOUT, block_idx).weights), "weights")


def first_block(config: RunConfig, folder: Path, attempt: str) -> BlockTask:
    plan = load_plan(open_store(str(folder)), LAYOUT)
    there = config.model_copy(update={"storage": config.storage.model_copy(update={"uri": str(folder)})})
    batch_size = plan.blocks[0].batch_size
    return BlockTask(
        config=there, plan=plan, block_idx=0, batch_size=batch_size, attempt=attempt, num_attempts=1, num_threads=1
    )


def test_stored_weights_and_the_final_model_hold_none_of_the_loss(run: tuple[RunConfig, Path]) -> None:
    _, folder = run
    store = open_store(str(folder))
    plan = load_plan(store, LAYOUT)
    names = [name for block in plan.blocks for name in weights_of(store, block.block_idx)]
    assert names and not [name for name in names if "objective" in name]
    model = load_model(f"{folder}/run")
    assert not [name for name in model.state_dict() if "objective" in name]
    assert count_params(model) == model.card.params


def test_run_with_such_a_loss_learns_and_keeps_its_budget(run: tuple[RunConfig, Path]) -> None:
    config, folder = run
    store = open_store(str(folder))
    plan = load_plan(store, LAYOUT)
    facts = [read_block(store, LAYOUT, block.block_idx).facts for block in plan.blocks]
    assert all(one["measured_peak_bytes"] <= config.memory.budget_bytes for one in facts)
    assert max(facts[0]["val_correct"]) > 2 * facts[0]["num_val"] / 10


def test_interrupted_training_goes_on_from_its_checkpoint_bit_for_bit(
    run: tuple[RunConfig, Path], tmp_path: Path
) -> None:
    config, folder = run
    copied = tmp_path / "copy"
    shutil.copytree(folder, copied)
    store = open_store(str(copied))
    store.delete([LAYOUT.round_manifest(0, 0, 1)])
    halted = train_block(first_block(config, copied, "halted"))
    next(event for event in halted if isinstance(event, EpochDone))
    halted.close()
    events = list(train_block(first_block(config, copied, "again")))
    assert next(event.resumed_epochs for event in events if isinstance(event, StageStarted)) == 1
    resumed, straight = weights_of(store, 0), weights_of(open_store(str(folder)), 0)
    assert set(resumed) == set(straight)
    assert [name for name, value in resumed.items() if not torch.equal(value, straight[name])] == []


@pytest.mark.parametrize("loss", LOSSES)
def test_layers_trained_with_such_a_loss_are_run_again_as_if_their_output_were_stored(
    loss: str, tmp_path: Path
) -> None:
    once = {
        **CHANGES,
        "train.loss": loss,
        "train.epochs": 1,
        "memory.join_threshold": 0.0,
        "memory.max_batch_size": 32,
    }
    stores = []
    for cache in ("shards", "recompute"):
        train_digits(f"{tmp_path}/{cache}", {**once, "storage.cache": cache})
        stores.append(open_store(f"{tmp_path}/{cache}"))
    read, again = (load_plan(store, LAYOUT).blocks for store in stores)
    assert any(block.recomputed for block in again) and not any(block.recomputed for block in read)
    assert [block.batch_size for block in again] == [block.batch_size for block in read]
    for block in again:
        wanted, got = (weights_of(store, block.block_idx) for store in stores)
        assert set(wanted) == set(got)
        assert [name for name, value in wanted.items() if not torch.equal(got[name], value)] == []


def test_run_with_heads_left_to_the_planner_gives_a_model_that_loads(tmp_path: Path) -> None:
    changes = {"data.max_train_images": 300, "train.epochs": 1, "exits.tolerance": 100.0, "exits.patience": "never"}
    heads = {"train.head": "auto", "train.unit_layers": 1, "memory.budget_bytes": "24MiB"}
    train_digits(str(tmp_path), {**changes, **heads})
    plan = load_plan(open_store(str(tmp_path)), LAYOUT)
    model = load_model(f"{tmp_path}/run")
    assert model.card.head == plan.units[0].head == "auglocal"
    assert "conv0" in dict(model.head.named_children())
