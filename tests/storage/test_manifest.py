"""Manifests: committed once, read back whole, and never believed blindly."""

import copy
from dataclasses import replace

import pytest

from nf_pipeline.errors import AlreadyExists, ObjectCorrupt
from nf_pipeline.storage.manifest import (
    ObjectInfo,
    StageManifest,
    checksum_of,
    commit_manifest,
    read_manifest,
    verify_manifest,
)
from nf_pipeline.storage.sealed import seal
from nf_pipeline.storage.store import open_store

KEY = "run/blocks/000/manifest.json"
OTHER = "run/blocks/000/attempt-0a1b2c3d/notes.json"
WEIGHTS = "run/blocks/000/attempt-0a1b2c3d/weights.safetensors"


@pytest.fixture
def manifest(write):
    written = write(35)
    written.store.put(WEIGHTS, b"weights")
    written.store.put(OTHER, b"other")
    return StageManifest(
        stage="block-000",
        fingerprint="0123456789abcdef",
        input_checksum="sha256:00",
        attempt="0a1b2c3d",
        spec=written.spec,
        shards={"train": tuple(written.shards[:3]), "val": tuple(written.shards[3:]), "test": ()},
        weights=ObjectInfo(key=WEIGHTS, num_bytes=7, checksum=checksum_of(b"weights")),
        objects=(ObjectInfo(key=OTHER, num_bytes=5, checksum=checksum_of(b"other")),),
        facts={"losses": [0.5, 0.25], "batch_size": 128},
    )


def test_manifest_reads_back_equal(store, manifest):
    commit_manifest(store, KEY, manifest)
    assert read_manifest(store, KEY) == manifest


def test_manifest_without_shards_and_weights_reads_back_equal(store):
    manifest = StageManifest(stage="block-000", fingerprint="f", attempt="a", facts={"n": 1})
    commit_manifest(store, KEY, manifest)
    assert read_manifest(store, KEY) == manifest


def test_absent_manifest_is_none(store):
    assert read_manifest(store, KEY) is None


def test_second_commit_is_refused_and_changes_nothing(store, manifest):
    commit_manifest(store, KEY, manifest)
    with pytest.raises(AlreadyExists, match=KEY):
        commit_manifest(store, KEY, replace(manifest, attempt="ffffffff"))
    assert read_manifest(store, KEY).attempt == manifest.attempt


def test_rows_are_summed(manifest):
    assert [manifest.num_rows(split) for split in ("train", "val", "test", "other")] == [30, 5, 0, 0]


def test_sound_stage_has_no_problems(store, manifest):
    assert verify_manifest(store, manifest) == []


def test_every_missing_or_resized_object_is_a_problem(store, manifest):
    store.delete([manifest.shards["train"][1].key])
    store.put(manifest.shards["val"][0].key, b"short")
    store.put(WEIGHTS, b"longer weights")
    problems = verify_manifest(store, manifest)
    assert len(problems) == 3
    assert "train-00001.parquet is missing" in problems[0]
    assert f"got 5 bytes, want {manifest.shards['val'][0].num_bytes}" in problems[1]
    assert "weights.safetensors: got 14 bytes, want 7" in problems[2]


def change(document, path, value):
    changed = copy.deepcopy(document)
    place = changed
    for part in path[:-1]:
        place = place[part]
    if value is KeyError:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return changed


FIELDS = [
    (["stage"], 3),
    (["fingerprint"], None),
    (["input_checksum"], 1.5),
    (["attempt"], ["a"]),
    (["facts"], []),
    (["shards"], []),
    (["shards", "train"], {}),
    (["shards", "train", 1], "x"),
    (["shards", "train", 1, "key"], 0),
    (["shards", "train", 1, "num_bytes"], "12"),
    (["shards", "train", 1, "num_rows"], True),
    (["shards", "train", 1, "checksum"], None),
    (["spec"], "float16"),
    (["spec", "dtype"], "int3"),
    (["spec", "shape"], [3, "4"]),
    (["spec", "codec"], "snappy"),
    (["weights"], 0),
    (["weights", "num_bytes"], 7.0),
    (["objects"], {}),
    (["objects", 0], "x"),
    (["objects", 0, "checksum"], 1),
    (["format_version"], "1"),
]


MAY_BE_ABSENT = (["shards", "train"], ["shards", "train", 1], ["objects", 0])
ABSENT = [(path, KeyError) for path, _ in FIELDS if path not in MAY_BE_ABSENT]


@pytest.mark.parametrize(("path", "value"), FIELDS + ABSENT)
def test_wrong_or_missing_field_is_named(manifest, path, value):
    document = change(manifest.to_json(), path, value)
    with pytest.raises(ObjectCorrupt) as caught:
        StageManifest.from_json(document, KEY)
    assert KEY in str(caught.value)
    named = [part for part in path if isinstance(part, str)][-1]
    assert named in str(caught.value)


def test_another_version_says_got_and_want(manifest):
    with pytest.raises(ObjectCorrupt, match="format_version: got 1, want 4"):
        StageManifest.from_json({**manifest.to_json(), "format_version": 1})


def test_edited_manifest_is_corrupt_and_the_error_offers_a_repair(store, manifest):
    commit_manifest(store, KEY, manifest)
    store.put(KEY, bytes(store.get(KEY)).replace(b'"batch_size": 128', b'"batch_size": 127'))
    with pytest.raises(ObjectCorrupt, match=rf"{KEY} is damaged: checksum: got .*, want .*") as caught:
        read_manifest(store, KEY)
    assert caught.value.fix.startswith(f"nf-pipeline resume {store.uri}/run --repair")


@pytest.mark.parametrize(
    "key",
    [
        "run/blocks/001/attempt-0a1b2c3d/weights.safetensors",
        "run-2/blocks/000/attempt-0a1b2c3d/weights.safetensors",
        "run/blocks/0001/weights.safetensors",
        "/etc/passwd",
        "run/blocks/000",
    ],
)
@pytest.mark.parametrize("field", ["shards", "weights", "objects"])
def test_manifest_that_names_what_is_not_its_stages_own_is_refused(store, manifest, field, key):
    document = manifest.to_json()
    entries = {"shards": document["shards"]["val"], "weights": [document["weights"]], "objects": document["objects"]}
    entries[field][0]["key"] = key
    store.put(KEY, seal(document))
    with pytest.raises(ObjectCorrupt, match=rf"it names {key}, want keys below run/blocks/000/"):
        read_manifest(store, KEY)


@pytest.mark.parametrize("key", [f"{home}/manifest.json" for home in ("run/blocks/001", "run/model", "run-2/ingest")])
def test_manifest_at_another_stages_key_is_refused(store, manifest, key):
    store.put(key, seal(manifest.to_json()))
    with pytest.raises(ObjectCorrupt, match="stage: got block-000, which does not belong at this key"):
        read_manifest(store, key)


def test_commit_of_a_round_may_name_what_is_its_blocks(store, manifest):
    key = "run/blocks/000/rounds/00003/manifest.json"
    commit_manifest(store, key, manifest)
    assert read_manifest(store, key) == manifest


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'"text"'])
def test_manifest_that_is_no_json_object_is_corrupt(store, data):
    store.put(KEY, data)
    with pytest.raises(ObjectCorrupt, match=KEY):
        read_manifest(store, KEY)


def test_manifest_cut_anywhere_is_corrupt(store, manifest):
    data = seal(manifest.to_json())
    for length in range(0, len(data), 101):
        store.put(KEY, data[:length])
        with pytest.raises(ObjectCorrupt):
            read_manifest(store, KEY)


@pytest.mark.s3
@pytest.mark.parametrize("kind", ["minio_uri", "moto_uri"])
def test_manifest_is_committed_once_on_s3(kind, request):
    store = open_store(request.getfixturevalue(kind))
    manifest = StageManifest(stage="block-000", fingerprint="f", attempt="a")
    commit_manifest(store, KEY, manifest)
    with pytest.raises(AlreadyExists):
        commit_manifest(store, KEY, replace(manifest, attempt="b"))
    assert read_manifest(store, KEY) == manifest
    assert verify_manifest(store, manifest) == []
