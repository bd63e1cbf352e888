"""Garbage in local stores: what goes, and above all what stays."""

import json
from pathlib import Path

import pytest

from nf_pipeline.driver.gc import collect_garbage
from nf_pipeline.errors import ObjectCorrupt, ObjectMissing
from nf_pipeline.plans import BlockPlan, Plan
from nf_pipeline.storage.layout import RunLayout
from nf_pipeline.storage.manifest import ObjectInfo, StageManifest, checksum_of, commit_manifest
from nf_pipeline.storage.shards import ShardInfo, TensorSpec
from nf_pipeline.storage.store import Store, open_store

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
    return {key for key, _ in store.list("run")}


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
    collected = collect_garbage(f"{store.uri}/run", dry_run=False)
    assert collected == sorted((key, 10) for key in useless)
    assert keys_of(store) == {*named, LAYOUT.block_manifest(0)}


@pytest.mark.s3
def test_committed_block_on_s3_loses_the_same_objects(minio_uri: str) -> None:
    store = open_store(minio_uri)
    named, useless = finished_block(store, 0)
    assert collect_garbage(f"{minio_uri}/run", dry_run=False) == sorted((key, 10) for key in useless)
    assert keys_of(store) == {*named, LAYOUT.block_manifest(0)}


def test_dry_run_lists_the_same_and_deletes_nothing(store: Store) -> None:
    finished_block(store, 0)
    before = keys_of(store)
    listed = collect_garbage(f"{store.uri}/run", dry_run=True)
    assert keys_of(store) == before
    assert collect_garbage(f"{store.uri}/run", dry_run=False) == listed
    assert collect_garbage(f"{store.uri}/run", dry_run=False) == []


def test_block_without_a_manifest_keeps_every_attempt(store: Store) -> None:
    _, useless = finished_block(store, 0)
    prefix = LAYOUT.block_attempt(1, "cc")
    unfinished = put(store, f"{prefix}/checkpoint-00003.safetensors", f"{prefix}/checkpoint.json")
    unfinished += put(store, f"{LAYOUT.block_attempt(1, 'dd')}/checkpoint-00001.safetensors")
    collected = collect_garbage(f"{store.uri}/run", dry_run=False)
    assert {key for key, _ in collected} == set(useless)
    assert set(unfinished) <= keys_of(store)


def test_lost_ingest_attempt_goes_and_the_committed_one_stays(store: Store) -> None:
    winner = LAYOUT.ingest_shard(LAYOUT.ingest_attempt("aa"), "train", 0)
    loser = LAYOUT.ingest_shard(LAYOUT.ingest_attempt("bb"), "train", 0)
    put(store, winner, loser)
    commit(store, LAYOUT.ingest_manifest, "ingest", shards=[winner])
    assert collect_garbage(f"{store.uri}/run", dry_run=False) == [(loser, 10)]


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


def planned(store: Store, num_blocks: int) -> None:
    blocks = tuple(
        BlockPlan(
            block_idx=idx,
            units=(idx, idx + 1),
            layers=(idx, idx + 1),
            batch_size=2,
            budget_bytes=2**26,
            predicted_peak_bytes=1,
            shard_bytes=0,
            reason="",
        )
        for idx in range(num_blocks)
    )
    plan = Plan(
        model="convnet",
        num_classes=2,
        image_shape=(1, 8, 8),
        budget_bytes=1,
        layers=(),
        units=(),
        blocks=blocks,
        params_full=1,
        flops_full=1,
        profile_s=0.0,
    )
    store.put(LAYOUT.plan_json, json.dumps(plan.to_json()).encode())


def test_half_written_files_go_when_every_stage_is_committed(store: Store) -> None:
    parts = half_written(store)
    other = put(store, "run/notes.part", ".nf-probe-0a1b2c3d", "run-2/.run.json.0a1b2c3d.part")
    planned(store, num_blocks=2)
    for key, stage in (
        (LAYOUT.ingest_manifest, "ingest"),
        (LAYOUT.block_manifest(0), "block-000"),
        (LAYOUT.model_manifest, "model"),
    ):
        commit(store, key, stage)
    assert collect_garbage(f"{store.uri}/run", dry_run=False) == []
    commit(store, LAYOUT.block_manifest(1), "block-001")
    assert collect_garbage(f"{store.uri}/run", dry_run=False) == sorted((key, 10) for key in parts)
    assert all(store.size(key) == 10 for key in other)


def test_half_written_files_of_a_run_without_a_plan_stay(store: Store) -> None:
    parts = half_written(store)
    assert collect_garbage(f"{store.uri}/run", dry_run=False) == []
    assert set(parts) <= keys_of(store)


def test_object_that_only_the_facts_or_another_stage_name_stays(store: Store) -> None:
    _, useless = finished_block(store, 0)
    commit(store, LAYOUT.block_manifest(1), "block-001", facts={"history": {"metrics": [useless[0]]}})
    collected = {key for key, _ in collect_garbage(f"{store.uri}/run", dry_run=False)}
    assert collected == set(useless[1:])


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
