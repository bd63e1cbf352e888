"""What a block computes again is what the blocks before it would have stored, bit for bit."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from trained_digits import train_digits

from nf_pipeline.config import RunConfig
from nf_pipeline.driver.run_record import load_plan
from nf_pipeline.plans import Plan
from nf_pipeline.storage.layout import RunLayout
from nf_pipeline.storage.manifest import read_manifest
from nf_pipeline.storage.store import Store, open_store
from nf_pipeline.worker.block_input import BlockInput
from nf_pipeline.worker.feed import Feed
from nf_pipeline.worker.frozen_prefix import load_prefix
from nf_pipeline.worker.tasks import BlockTask
from nf_pipeline.worker.train_block import train_block, units_of

CPU = torch.device("cpu")
LAYOUT = RunLayout("run")

Trained = tuple[RunConfig, Store, Plan]


@pytest.fixture(scope="module", params=[("fp32", "none"), ("bf16", "none"), ("fp32", "sample")])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A finished run of three blocks that all stored float32 shards."""
    uri = str(tmp_path_factory.mktemp("runs"))
    config = train_digits(
        uri,
        {
            "memory.join_threshold": 0.0,
            "data.max_train_images": 200,
            "train.unit_layers": 2,
            "train.precision": request.param[0],
            "train.context": request.param[1],
            "storage.cache": "shards",
            "exits.patience": "never",
        },
    )
    store = open_store(uri)
    return config, store, load_plan(store, LAYOUT)


def task_from(trained: Trained, block_idx: int, source: int, attempt: str = "test") -> BlockTask:
    """Describes a block's work as if it read an earlier source."""
    config, _, plan = trained
    block = replace(plan.blocks[block_idx], source_block=source)
    blocks = (*plan.blocks[:block_idx], block, *plan.blocks[block_idx + 1 :])
    return BlockTask(
        config=config,
        plan=replace(plan, blocks=blocks),
        block_idx=block_idx,
        batch_size=24,
        attempt=attempt,
        num_attempts=1,
        num_threads=1,
    )


def open_input(trained: Trained, block_idx: int, source: int) -> BlockInput:
    task, store = task_from(trained, block_idx, source), trained[1]
    opened = BlockInput(store, LAYOUT, task)
    opened.frozen = load_prefix(store, task, opened.recomputed, units_of(task)[0], CPU)
    return opened


def by_sample(feed: Feed) -> dict[int, np.ndarray]:
    rows = {}
    for batch in feed.batches(seed=3, epoch=1, shuffle=True):
        x_NCHW = batch.take_x()
        assert x_NCHW.dtype == torch.float32 and not x_NCHW.requires_grad
        rows.update(zip(batch.sample_ids.tolist(), x_NCHW.numpy(), strict=True))
    return rows


@pytest.mark.parametrize(("block_idx", "source"), [(1, -1), (2, -1), (2, 0)])
def test_recomputed_input_of_every_sample_equals_the_stored_one(
    trained: Trained, block_idx: int, source: int
) -> None:
    stored, again = open_input(trained, block_idx, block_idx - 1), open_input(trained, block_idx, source)
    assert stored.frozen is None and again.frozen is not None
    for open_split in ("open_train", "open_val", "open_view"):
        wanted = by_sample(getattr(stored, open_split)(24, CPU))
        found = by_sample(getattr(again, open_split)(24, CPU))
        assert wanted.keys() == found.keys()
        assert all(np.array_equal(wanted[sample_id], found[sample_id]) for sample_id in wanted)


def test_block_trained_from_another_source_ends_with_the_same_weights(trained: Trained) -> None:
    store, key = trained[1], LAYOUT.block_manifest(2)
    ends = {}
    for source in (0, -1):  # both in the order of one shard; fresh shards of block 1 have an order of their own
        store.delete([key])
        list(train_block(task_from(trained, 2, source, attempt=f"source{source}")))
        ends[source] = read_manifest(store, key)
    assert ends[0].weights.checksum == ends[-1].weights.checksum
    assert ends[0].input_checksum != ends[-1].input_checksum


def test_frozen_layers_never_change_while_the_block_trains(trained: Trained, tmp_path: Path) -> None:
    opened = open_input(trained, 2, -1)
    before = {name: tensor.clone() for name, tensor in opened.frozen.state_dict().items()}
    by_sample(opened.open_train(24, CPU))
    assert all(torch.equal(tensor, before[name]) for name, tensor in opened.frozen.state_dict().items())
    assert not any(name.startswith("units.0.head") for name in before)


def test_input_from_another_source_has_another_identity(trained: Trained) -> None:
    checksums = {open_input(trained, 2, source).checksum for source in (-1, 0, 1)}
    assert len(checksums) == 3
