"""Runs of thousands of shards: nothing is asked of the store, or written to it, per shard and shard."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from load_config import make_config

from nf_pipeline import train
from nf_pipeline.driver.status import read_status
from nf_pipeline.storage import published
from nf_pipeline.storage.manifest import StageManifest, verify_manifest
from nf_pipeline.storage.published import Announcements, Publication, Source
from nf_pipeline.storage.shards import ShardInfo, TensorSpec
from nf_pipeline.storage.store import Store, open_store

SPEC = TensorSpec("uint8", (4,))
FOLDER = "run/blocks/000/attempt-1/activations"


class CountingStore:
    """Counts the requests to another store, and the bytes that are put."""

    def __init__(self, store: Store) -> None:
        self.requests: Counter[str] = Counter()
        self.put_bytes = 0
        self._store = store

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)
        if not callable(method):
            return method

        def count(*args: Any) -> Any:
            self.requests[name] += 1
            if name == "put":
                self.put_bytes += len(args[1])
            return method(*args)

        return count


def info(idx: int) -> ShardInfo:
    return ShardInfo(key=f"{FOLDER}/train-{idx:05d}.parquet", num_bytes=3, num_rows=1, checksum="sha256:" + "0" * 64)


def test_run_of_thousands_of_shards_trains_and_is_found_finished(tmp_path: Path) -> None:
    config = make_config(
        tmp_path,
        storage__shard_bytes="1KiB",
        train__unit_layers=1,
        memory__join_threshold=0.0,
        data__max_train_images=700,
    )
    summary = train(config)
    # A sample of most blocks is larger than a shard: one shard per image.
    assert sum(block["num_shards"] for block in summary["blocks"]) > 3000
    assert read_status(f"{tmp_path}/run")["state"] == "done"
    again = train(config)
    assert again["weights_checksum"] == summary["weights_checksum"]


def test_manifest_of_thousands_of_shards_is_verified_with_a_few_requests(tmp_path: Path) -> None:
    shards = [info(idx) for idx in range(3000)]
    for shard in shards:
        path = tmp_path / shard.key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"abc")
    (tmp_path / shards[17].key).unlink()
    (tmp_path / shards[2999].key).write_bytes(b"ab")
    store = CountingStore(open_store(str(tmp_path)))
    shards_of = {"train": tuple(shards)}
    manifest = StageManifest(stage="block-000", fingerprint="f", attempt="1", spec=SPEC, shards=shards_of)
    problems = verify_manifest(store, manifest)
    assert problems == [
        f"object {shards[17].key} is missing",
        f"object {shards[2999].key}: got 2 bytes, want 3",
    ]
    assert store.requests.total() < 5


def test_record_of_many_shards_is_written_less_often_and_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(published, "MIN_UPDATE_S", 0.0)
    store = CountingStore(open_store(str(tmp_path)))
    publication = Publication(store, "run/0.json", "a")
    for idx in range(2000):
        publication.add("train", idx, info(idx))
    publication.flush()
    # Written after every shard it would be a thousand times its own size.
    assert store.put_bytes < 500 * (tmp_path / "run/0.json").stat().st_size
    announcements = Announcements(store, Source(manifest_key="run/manifest.json", publication_keys=("run/0.json",)))
    announcements.poll()
    assert announcements.num_known == 2000
    assert announcements.shard("train", 0, 1234, 0) == info(1234)
