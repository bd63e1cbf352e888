"""Shards are read while others are being written, and never from two attempts."""

import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from nf_pipeline.errors import InputReplaced, ObjectCorrupt, StorageError
from nf_pipeline.storage.manifest import StageManifest, commit_manifest
from nf_pipeline.storage.published import Announcements, Publication, PublishedShards, Source, shard_sizes
from nf_pipeline.storage.reader import ShardReader
from nf_pipeline.storage.shard_writer import ShardWriter
from nf_pipeline.storage.shards import ShardInfo, TensorSpec
from nf_pipeline.storage.store import Store, open_store

SPEC = TensorSpec("uint8", (4,))
HOME = "run/blocks/000"
SOURCE = Source(manifest_key="run/blocks/000/manifest.json", publication_keys=("run/0.json", "run/1.json"))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path))


def info(name: str, num_rows: int = 10) -> ShardInfo:
    return ShardInfo(key=f"{HOME}/{name}", num_bytes=1, num_rows=num_rows, checksum="sha256:0")


def manifest(attempt: str, *shards: ShardInfo) -> StageManifest:
    return StageManifest(stage="block-000", fingerprint="f", attempt=attempt, spec=SPEC, shards={"train": shards})


@pytest.mark.parametrize(("rows", "sizes"), [(0, []), (5, [5]), (10, [10]), (25, [10, 10, 5])])
def test_sizes_of_shards_are_known_before_they_are_written(rows: int, sizes: list[int], store: Store) -> None:
    assert shard_sizes(rows, 10) == sizes
    with ShardWriter(store, lambda idx: f"s{idx}", SPEC, 10 * SPEC.nbytes) as writer:
        ids = np.arange(rows)
        writer.append(np.zeros((rows, SPEC.nbytes), np.uint8), ids, ids)
        assert [shard.num_rows for shard in writer.close()] == sizes


def test_shard_is_waited_for_until_its_writer_announces_it(store: Store) -> None:
    publication = Publication(store, "run/1.json", "a")
    shards = PublishedShards(Announcements(store, SOURCE), "train", [10, 15], 10)
    assert [shards.num_rows(idx) for idx in range(len(shards))] == [10, 10, 5]
    threading.Timer(
        0.3, lambda: (publication.add("train", 1, info("second of part 1", 5)), publication.flush())
    ).start()
    assert shards.get(2).key == f"{HOME}/second of part 1"


def test_shards_of_another_view_are_not_those_that_are_waited_for(store: Store) -> None:
    publication, announcements = Publication(store, "run/0.json", "a"), Announcements(store, SOURCE)
    views = [PublishedShards(announcements, split, [10, 10], 10) for split in ("train", "train-view1")]
    publication.add("train", 0, info("first view"))
    publication.flush()
    assert views[0].get(0).key == f"{HOME}/first view"
    timer = threading.Timer(0.3, lambda: (publication.add("train-view1", 0, info("second")), publication.flush()))
    timer.start()
    assert views[1].get(0).key == f"{HOME}/second"


def test_commit_replaces_the_announcements(store: Store) -> None:
    shards = PublishedShards(Announcements(store, SOURCE), "train", [10, 10], 10)
    commit_manifest(store, SOURCE.manifest_key, manifest("a", info("x"), info("y")))
    assert [shards.get(idx).key for idx in range(2)] == [f"{HOME}/x", f"{HOME}/y"]


@pytest.mark.parametrize("by_commit", [False, True])
def test_another_attempt_than_the_one_read_is_an_error(store: Store, by_commit: bool) -> None:
    announcements = Announcements(store, SOURCE)
    Publication(store, "run/0.json", "a")
    announcements.poll()
    if by_commit:
        commit_manifest(store, SOURCE.manifest_key, manifest("b", info("x")))
    else:
        Publication(store, "run/0.json", "b")
    with pytest.raises(InputReplaced, match="attempt a"):
        announcements.poll()


def test_wait_ends_with_an_error_when_nothing_comes_or_nobody_wants_it_any_more(store: Store) -> None:
    late = PublishedShards(Announcements(store, SOURCE), "train", [10, 10], 10, timeout_s=0.3)
    with pytest.raises(InputReplaced, match="no shard was finished for 0 s"):
        late.get(0)
    closed = PublishedShards(Announcements(store, SOURCE), "train", [10, 10], 10)
    threading.Timer(0.2, closed.close).start()
    with pytest.raises(StorageError, match="nobody waits"):
        closed.get(0)


def test_wait_lasts_as_long_as_other_shards_come(store: Store) -> None:
    publication = Publication(store, "run/0.json", "a")
    shards = PublishedShards(Announcements(store, SOURCE), "train", [50, 10], 10, timeout_s=1.0)

    def write_slowly() -> None:
        for idx in range(5):
            time.sleep(0.6)
            publication.add("train", idx, info(f"shard {idx}"))
            publication.flush()

    thread = threading.Thread(target=write_slowly)
    thread.start()
    assert shards.get(4).key == f"{HOME}/shard 4"
    thread.join()


def test_damaged_record_is_an_error_that_names_it(store: Store) -> None:
    store.put("run/0.json", b'{"attempt": 3')
    with pytest.raises(ObjectCorrupt, match=r"run/0\.json"):
        Announcements(store, SOURCE).poll()


def test_reader_of_a_growing_split_yields_what_a_reader_of_the_finished_one_yields(store: Store) -> None:
    rows = np.random.default_rng(0).integers(0, 255, (95, SPEC.nbytes), np.uint8)
    ids = np.arange(95)
    source = Source(manifest_key="run/blocks/000/manifest.json", publication_keys=("run/0.json",))
    publication = Publication(store, "run/0.json", "a")
    growing = PublishedShards(Announcements(store, source), "train", [95], 10)

    def write() -> None:
        size, announce = 10 * SPEC.nbytes, partial(publication.add, "train")
        with ShardWriter(store, lambda idx: f"{HOME}/{idx}", SPEC, size, on_stored=announce) as writer:
            for start in range(0, 95, 19):
                piece = slice(start, start + 19)
                writer.append(rows[piece], ids[piece], ids[piece])
                time.sleep(0.1)
            commit_manifest(store, source.manifest_key, manifest("a", *writer.close()))

    thread = threading.Thread(target=write)
    thread.start()
    order = {"seed": 1, "epoch": 0, "shuffle": True, "shuffle_shards": False, "even": True}
    live = list(ShardReader(store, growing, SPEC, batch_size=8).batches(**order))
    thread.join()
    done = Announcements(store, source)
    done.poll()
    stored = ShardReader(store, done.manifest.shards["train"], SPEC, batch_size=8)
    for ours, theirs in zip(live, stored.batches(**order), strict=True):
        assert np.array_equal(ours.tensors, theirs.tensors)
        assert np.array_equal(ours.sample_ids, theirs.sample_ids)
    assert sorted(np.concatenate([batch.sample_ids for batch in live])) == list(range(95))
