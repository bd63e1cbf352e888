"""An epoch reads one whole view, every sample once; no more memory is held than for one view."""

from pathlib import Path

import numpy as np
import pytest

from nf_pipeline.storage.parts import Part
from nf_pipeline.storage.reader import _KEPT_BATCHES, ShardReader
from nf_pipeline.storage.shard_writer import ShardWriter
from nf_pipeline.storage.shards import ShardInfo, TensorSpec
from nf_pipeline.storage.store import Store, open_store
from nf_pipeline.storage.views import ViewReader, view_split

NUM_ROWS, NUM_VIEWS = 95, 3
SPEC = TensorSpec("uint8", (2,))
ORDER = {"seed": 3, "shuffle": True, "even": True}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path))


def write_views(store: Store) -> list[list[ShardInfo]]:
    """Stores views in which a sample is (its id, the view)."""
    views, ids = [], np.arange(NUM_ROWS)
    for view in range(NUM_VIEWS):
        with ShardWriter(store, lambda idx: f"{view_split(view)}-{idx}", SPEC, 20) as writer:  # noqa: B023
            writer.append(np.stack([ids, np.full(NUM_ROWS, view)], axis=1).astype(np.uint8), ids % 7, ids)
        views.append(writer.close())
    return views


def open_views(store: Store, first_epoch: int = 0, part: Part | None = None) -> ViewReader:
    first, *others = write_views(store)
    reader = ShardReader(store, first, SPEC, batch_size=8, part=part or Part())
    return ViewReader(reader, others, first_epoch=first_epoch)


def test_names_of_views_are_distinct_and_the_first_is_the_train_split() -> None:
    assert [view_split(view) for view in range(3)] == ["train", "train-view1", "train-view2"]


@pytest.mark.parametrize("first_epoch", [0, 4])
def test_each_epoch_reads_every_sample_once_from_the_view_whose_turn_it_is(store: Store, first_epoch: int) -> None:
    views = open_views(store, first_epoch)
    for turn in range(2 * NUM_VIEWS):
        batches = list(views.batches(epoch=first_epoch + turn, **ORDER))
        rows = np.concatenate([batch.tensors for batch in batches])
        assert sorted(rows[:, 0]) == list(range(NUM_ROWS))
        assert set(rows[:, 1]) == {turn % NUM_VIEWS}
        assert len(batches) == views.num_batches(even=True)
        assert np.array_equal(rows[:, 0], np.concatenate([batch.sample_ids for batch in batches]))


def test_view_is_read_in_the_order_that_its_epoch_has_without_other_views(store: Store) -> None:
    views = open_views(store)
    alone = ShardReader(store, write_views(store)[1], SPEC, batch_size=8)
    for ours, theirs in zip(views.batches(epoch=4, **ORDER), alone.batches(epoch=4, **ORDER), strict=True):
        assert np.array_equal(ours.tensors, theirs.tensors)


def test_parts_of_a_gang_read_the_same_view_and_share_its_samples(store: Store) -> None:
    parts = [open_views(store, part=Part(index=index, count=2)) for index in range(2)]
    assert sum(part.num_rows for part in parts) == parts[0].num_rows_total == NUM_ROWS
    assert parts[0].step_sizes() == parts[1].step_sizes()
    rows = np.concatenate([batch.tensors for part in parts for batch in part.batches(epoch=2, **ORDER)])
    assert sorted(rows[:, 0]) == list(range(NUM_ROWS)) and set(rows[:, 1]) == {2}


def test_all_views_make_their_batches_in_the_memory_of_one(store: Store) -> None:
    views, addresses = open_views(store), set()
    for epoch in range(NUM_VIEWS):
        for batch in views.batches(epoch=epoch, **ORDER):
            addresses.add(batch.tensors.ctypes.data)
            del batch
    assert len(addresses) <= _KEPT_BATCHES
