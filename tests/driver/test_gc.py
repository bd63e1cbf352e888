"""Garbage in local stores: what goes, and above all what stays."""

from dataclasses import asdict
from pathlib import Path

import pytest

from nf_pipeline.driver import run_lock
from nf_pipeline.driver.garbage import by_kind
from nf_pipeline.driver.gc import collect_garbage
from nf_pipeline.driver.run_lock import hold_run
from nf_pipeline.errors import ObjectCorrupt, ObjectMissing, RunLocked
from nf_pipeline.storage.layout import RunLayout
from nf_pipeline.storage.manifest import ObjectInfo, StageManifest, checksum_of, commit_manifest
from nf_pipeline.storage.sealed import seal
from nf_pipeline.storage.shards import ShardInfo, TensorSpec
from nf_pipeline.storage.store import Store, open_store
from nf_pipeline.worker.checkpoint_record import CheckpointRecord

LAYOUT = RunLayout("run")
DATA = b"x" * 10


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path))


def put(store: Store, *keys: str) -> list[str]:
    for key in keys:
        store.put(key, DATA)
    return list(keys)


def _shard(key: str) -> ShardInfo:
    return ShardInfo(key=key, num_bytes=len(DATA), num_rows=1, checksum=checksum_of(DATA))


def commit(store: Store, key: str, stage: str, *, shards: list[str] = (), weights: str = "", facts=None) -> None:
    manifest = StageManifest(
        stage=stage,
        fingerprint="f",
        attempt="aa",
        spec=TensorSpec(dtype="uint8", shape=(10,), codec="none") if shards else None,
        shards={"train": tuple(_shard(name) for name in shards)},
        weights=ObjectInfo(key=weights, num_bytes=10, checksum=checksum_of(DATA)) if weights else None,
        facts=facts or {},
    )
    commit_manifest(store, key, manifest)


def keys_of(store: Store) -> set[str]:
    """Lists the run's objects but for its lock, which `gc` takes like every driver."""
    return {key for key, _ in store.list("run") if not key.startswith(f"{LAYOUT.locks}/")}


def collected(uri: str, *, dry_run: bool = False) -> list[tuple[str, int]]:
    return [(item.key, item.num_bytes) for item in collect_garbage(uri, dry_run=dry_run)]


def finished_block(store: Store, block_idx: int) -> tuple[list[str], list[str]]:
    """Stores a committed block; returns what its manifest names and what nobody names."""
    winner, loser = (LAYOUT.block_attempt(block_idx, attempt) for attempt in ("aa", "bb"))
    weights, shard = LAYOUT.weights(block_idx, "aa"), LAYOUT.shard(winner, "train", 0)
    named = put(store, weights, shard)
    useless = put(
        store,
        f"{winner}/checkpoint-00008.safetensors",
        f"{winner}/checkpoint.json",
        LAYOUT.weights(block_idx, "bb"),
        LAYOUT.shard(loser, "train", 0),
    )
    commit(store, LAYOUT.block_manifest(block_idx), f"block-{block_idx:03d}", shards=[shard], weights=weights)
    return named, useless


def test_committed_block_keeps_what_its_manifest_names_and_loses_the_rest(store: Store) -> None:
    named, useless = finished_block(store, 0)
    assert collected(f"{store.uri}/run") == sorted((key, 10) for key in useless)
    assert keys_of(store) == {*named, LAYOUT.block_manifest(0)}


@pytest.mark.s3
def test_committed_block_on_s3_loses_the_same_objects(minio_uri: str) -> None:
    store = open_store(minio_uri)
    named, useless = finished_block(store, 0)
    assert collected(f"{minio_uri}/run") == sorted((key, 10) for key in useless)
    assert keys_of(store) == {*named, LAYOUT.block_manifest(0)}


def test_dry_run_lists_the_same_and_deletes_nothing(store: Store) -> None:
    finished_block(store, 0)
    before = keys_of(store)
    listed = collected(f"{store.uri}/run", dry_run=True)
    assert keys_of(store) == before
    assert collected(f"{store.uri}/run") == listed
    assert collected(f"{store.uri}/run") == []


def checkpoint(store: Store, attempt: str, epoch: int, *, batch_size: int = 32) -> list[str]:
    """Stores a checkpoint of block 1 and its record."""
    prefix = LAYOUT.block_attempt(1, attempt)
    tensors, record = LAYOUT.checkpoint_tensors(prefix, epoch), LAYOUT.checkpoint_record(prefix)
    store.put(tensors, DATA)
    said = CheckpointRecord(fingerprint="f", batch_size=batch_size, epoch=epoch, key=tensors)
    store.put(record, seal({"record": asdict(said)}))
    return [tensors, record]


def test_unfinished_block_keeps_the_newest_checkpoint_of_each_batch_size_and_nothing_else(store: Store) -> None:
    kept = checkpoint(store, "aa", 3) + checkpoint(store, "bb", 1, batch_size=24)
    old = checkpoint(store, "cc", 2) + put(store, LAYOUT.checkpoint_tensors(LAYOUT.block_attempt(1, "aa"), 2))
    lost = [LAYOUT.shard(LAYOUT.block_attempt(1, attempt), "train", 0) for attempt in ("aa", "cc")]
    lost += put(store, *lost, LAYOUT.weights(1, "cc"), LAYOUT.publication(1, 0, 0))[len(lost) :]
    garbage = {key for key, _ in collected(f"{store.uri}/run")}
    assert garbage == {*old, *lost}
    assert keys_of(store) == set(kept)


def test_record_that_cannot_be_read_protects_its_checkpoint(store: Store) -> None:
    prefix = LAYOUT.block_attempt(1, "aa")
    kept = put(store, LAYOUT.checkpoint_tensors(prefix, 1), LAYOUT.checkpoint_record(prefix))
    put(store, LAYOUT.shard(prefix, "train", 0))
    assert collected(f"{store.uri}/run") == [(LAYOUT.shard(prefix, "train", 0), 10)]
    assert keys_of(store) == set(kept)


def test_run_that_is_held_keeps_all_of_its_unfinished_stages(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "RENEW_EVERY_S", 0.2)
    _, useless = finished_block(store, 0)
    unfinished = checkpoint(store, "aa", 1) + checkpoint(store, "bb", 2)
    unfinished += put(
        store, LAYOUT.publication(1, 0, 0), LAYOUT.ingest_shard(LAYOUT.ingest_attempt("aa"), "train", 0)
    )
    parts = half_written(store)
    with hold_run(store, LAYOUT):
        assert {item.key for item in collect_garbage(f"{store.uri}/run", dry_run=True)} == set(useless)
        assert {item.key for item in collect_garbage(f"{store.uri}/run", dry_run=False)} == set(useless)
        with pytest.raises(RunLocked):
            collect_garbage(f"{store.uri}/run", dry_run=True, keep="none")
    assert {*unfinished, *parts} <= keys_of(store)


def test_copy_of_a_data_set_goes_once_it_is_ingested_or_if_it_is_not_complete(store: Store) -> None:
    copied = put(store, LAYOUT.dataset_file("train", 0), LAYOUT.dataset_manifest)
    assert collected(f"{store.uri}/run") == []
    store.delete([LAYOUT.dataset_manifest])
    assert collected(f"{store.uri}/run") == [(copied[0], 10)]
    put(store, *copied)
    commit(store, LAYOUT.ingest_manifest, "ingest")
    assert collected(f"{store.uri}/run") == sorted((key, 10) for key in copied)


def test_rounds_that_were_read_go_with_their_commits(store: Store) -> None:
    shard = LAYOUT.shard(LAYOUT.block_attempt(0, "cc"), "train", 0)
    read = LAYOUT.round_manifest(0, 0, 2)
    commit(store, read, "block-000", shards=put(store, shard))
    commit(store, LAYOUT.block_manifest(0), "block-000")
    assert collected(f"{store.uri}/run", dry_run=True) == []
    commit(store, LAYOUT.block_manifest(1), "block-001")
    assert [key for key, _ in collected(f"{store.uri}/run")] == [shard, read]


def test_garbage_is_summed_up_by_kind(store: Store) -> None:
    finished_block(store, 0)
    half_written(store)
    sums = list(by_kind(collect_garbage(f"{store.uri}/run", dry_run=True)))
    assert sums == [
        ("checkpoints", 2, 20),
        ("half-written files", 2, 20),
        ("activations", 1, 10),
        ("weights", 1, 10),
    ]


def test_lost_ingest_attempt_goes_and_the_committed_one_stays(store: Store) -> None:
    winner = LAYOUT.ingest_shard(LAYOUT.ingest_attempt("aa"), "train", 0)
    loser = LAYOUT.ingest_shard(LAYOUT.ingest_attempt("bb"), "train", 0)
    put(store, winner, loser)
    commit(store, LAYOUT.ingest_manifest, "ingest", shards=[winner])
    assert collected(f"{store.uri}/run") == [(loser, 10)]


def test_objects_outside_attempts_are_never_touched(store: Store) -> None:
    finished_block(store, 0)
    documents = put(store, LAYOUT.run_json, LAYOUT.plan_json, LAYOUT.events_jsonl, LAYOUT.summary_json)
    model = put(store, LAYOUT.model_weights, LAYOUT.model_json, LAYOUT.model_card)
    commit(store, LAYOUT.model_manifest, "model", weights=LAYOUT.model_weights)
    collect_garbage(f"{store.uri}/run", dry_run=False)
    assert {*documents, *model} <= keys_of(store)


def half_written(store: Store) -> list[str]:
    """Stores what a writer leaves that is killed before it renames."""
    return put(store, "run/.summary.json.0a1b2c3d.part", "run/blocks/000/.manifest.json.0a1b2c3d.part")


def test_half_written_files_go_when_nobody_works_on_the_run(store: Store) -> None:
    parts = half_written(store)
    other = put(store, "run/notes.part", ".nf-probe-0a1b2c3d", "run-2/.run.json.0a1b2c3d.part")
    assert collected(f"{store.uri}/run") == sorted((key, 10) for key in parts)
    assert all(store.size(key) == 10 for key in other)


def test_object_that_only_the_facts_or_another_stage_name_stays(store: Store) -> None:
    _, useless = finished_block(store, 0)
    commit(store, LAYOUT.block_manifest(1), "block-001", facts={"history": {"metrics": [useless[0]]}})
    assert {key for key, _ in collected(f"{store.uri}/run")} == set(useless[1:])


def test_run_whose_name_begins_like_another_leaves_that_one_alone(store: Store) -> None:
    finished_block(store, 0)
    other = put(store, f"{RunLayout('run-2').block_attempt(0, 'aa')}/checkpoint.json")
    collect_garbage(f"{store.uri}/run", dry_run=False)
    assert store.size(other[0]) == 10


def test_damaged_manifest_ends_it_before_anything_is_deleted(store: Store) -> None:
    finished_block(store, 0)
    finished_block(store, 1)
    store.put(LAYOUT.block_manifest(1), b"{")
    before = keys_of(store)
    with pytest.raises(ObjectCorrupt):
        collect_garbage(f"{store.uri}/run", dry_run=False)
    assert keys_of(store) == before


def test_absent_run_is_an_error(store: Store) -> None:
    with pytest.raises(ObjectMissing, match="there is no run 'run'"):
        collect_garbage(f"{store.uri}/run", dry_run=True)
