"""What every store promises, on a folder and on both real S3 servers; and how URIs are read."""

import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from nf_pipeline.errors import AlreadyExists, ConfigError, ObjectMissing, StorageError
from nf_pipeline.storage.local import LocalStore
from nf_pipeline.storage.store import Store, check_key, checksum_of, open_store

S3_KINDS = [pytest.param(kind, marks=pytest.mark.s3) for kind in ("minio_uri", "moto_uri")]


@pytest.fixture(params=["local", *S3_KINDS])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    uri = str(tmp_path / "store") if request.param == "local" else request.getfixturevalue(request.param)
    return open_store(uri)


def test_object_read_back_is_what_was_written(store):
    store.put("run/a.bin", b"first")
    assert bytes(store.get("run/a.bin")) == b"first"
    assert store.size("run/a.bin") == 5


def test_put_replaces_an_older_object(store):
    store.put("a", b"a longer one")
    store.put("a", b"new")
    assert bytes(store.get("a")) == b"new"
    assert store.list("") == [("a", 3)]


def test_any_buffer_can_be_written(store):
    for data in (b"", b"x", bytearray(b"bytes"), memoryview(b"0123")[1:3]):
        store.put("a", data)
        assert bytes(store.get("a")) == bytes(data)


def test_large_object_survives_whole(store):
    data = np.random.default_rng(0).bytes(20 * 2**20)
    store.put("big", memoryview(data))
    assert checksum_of(store.get("big")) == checksum_of(data)


def test_missing_object_has_no_size_and_reading_it_names_key_and_store(store):
    assert store.size("run/nothing") is None
    with pytest.raises(ObjectMissing, match="run/nothing") as caught:
        store.get("run/nothing")
    assert caught.value.uri == store.uri


def test_create_writes_once_and_leaves_the_first_object(store):
    store.create("m.json", b"first")
    with pytest.raises(AlreadyExists, match=r"m\.json"):
        store.create("m.json", b"second")
    assert bytes(store.get("m.json")) == b"first"


def test_create_of_the_same_bytes_twice_is_refused_too(store):
    store.create("m.json", b"same")
    with pytest.raises(AlreadyExists):
        store.create("m.json", b"same")


def test_create_leaves_nothing_but_the_object(store):
    store.create("m.json", b"first")
    assert store.list("") == [("m.json", 5)]


def test_list_returns_keys_below_a_prefix_sorted_with_sizes(store):
    for key, data in (("run/b/2", b"22"), ("run/b/10", b"1"), ("run/bc", b"333"), ("other/x", b"")):
        store.put(key, data)
    assert store.list("run/b") == [("run/b/10", 1), ("run/b/2", 2)]
    assert store.list("run/b/") == store.list("run/b")
    assert [key for key, _ in store.list("")] == ["other/x", "run/b/10", "run/b/2", "run/bc"]
    assert store.list("nowhere") == []


def test_list_sees_what_another_writer_just_wrote(store):
    assert store.list("run") == []
    open_store(store.uri).put("run/new", b"1")
    assert store.list("run") == [("run/new", 1)]


def test_delete_removes_the_named_objects_and_ignores_missing_ones(store):
    for key in ("run/a", "run/b", "run/c"):
        store.put(key, b"x")
    store.delete(["run/a", "run/c", "run/never", "nowhere/at/all"])
    assert store.list("") == [("run/b", 1)]


def test_store_pickles_as_its_uri(store):
    store.put("a", b"1")
    again = pickle.loads(pickle.dumps(store))
    assert type(again) is type(store)
    assert again.uri == store.uri
    assert bytes(again.get("a")) == b"1"


def test_one_store_serves_many_threads(store):
    def write_and_read(number: int) -> bytes:
        store.put(f"t/{number}", str(number).encode() * 1000)
        return bytes(store.get(f"t/{number}"))

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(write_and_read, range(24)))
    assert results == [str(number).encode() * 1000 for number in range(24)]
    assert len(store.list("t")) == 24


def test_key_that_leaves_the_store_is_refused(store):
    for key in ("", "/a", "a//b", "../a", "a/../../b", "a/.", "a/", "a\\b", "a\0b"):
        for use in (
            store.get,
            store.size,
            lambda key: store.put(key, b""),
            lambda key: store.create(key, b""),
        ):
            with pytest.raises(StorageError, match="relative path"):
                use(key)
        with pytest.raises(StorageError, match="relative path"):
            store.delete([key])


@pytest.mark.parametrize("kind", ["local", pytest.param("moto_uri", marks=pytest.mark.s3)])
def test_of_many_simultaneous_creators_exactly_one_wins(kind, request, tmp_path):
    uri = str(tmp_path) if kind == "local" else request.getfixturevalue(kind)
    start = threading.Barrier(4)
    stores = [open_store(uri) for _ in range(4)]

    def create(number: int) -> int | None:
        start.wait()
        try:
            stores[number].create("run/manifest.json", f"attempt {number}".encode() * 500)
        except AlreadyExists:
            return None
        return number

    for _ in range(5):
        with ThreadPoolExecutor(8) as pool:
            winners = [number for number in pool.map(create, range(4)) if number is not None]
        assert len(winners) == 1
        assert bytes(stores[0].get("run/manifest.json")) == f"attempt {winners[0]}".encode() * 500
        stores[0].delete(["run/manifest.json"])


def test_relative_folder_becomes_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = open_store("./nf-runs")
    monkeypatch.chdir("/")
    store.put("a", b"1")
    assert store.uri == str(tmp_path / "nf-runs")
    assert (tmp_path / "nf-runs" / "a").read_bytes() == b"1"


def test_file_uri_and_home_open_a_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert open_store("file:///data/runs").uri == "/data/runs"
    assert open_store("~/runs").uri == "/home/someone/runs"


@pytest.mark.parametrize(
    "uri",
    [
        "gs://bucket/x",
        "http://host/x",
        "s3://",
        "s3:bucket",
        "s3://b/x",
        "s3://bucket/../x",
        "s3://bucket/a//b",
        "s3://bucket/x?versionId=1",
        "file://host/x",
        "",
    ],
)
def test_unusable_uri_is_a_config_error(uri):
    with pytest.raises(ConfigError):
        open_store(uri)


def test_credentials_inside_a_uri_are_refused_and_not_shown():
    with pytest.raises(ConfigError) as caught:
        open_store("s3://AKIAKEY:verysecret@bucket/prefix")
    assert "verysecret" not in str(caught.value)
    assert "AKIAKEY" not in str(caught.value)


def test_plain_folder_opens_a_local_store_and_check_key_returns_the_key(tmp_path):
    assert isinstance(open_store(str(tmp_path)), LocalStore)
    assert check_key("run/blocks/000/manifest.json") == "run/blocks/000/manifest.json"


def test_checksum_is_sha256():
    assert checksum_of(b"") == "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
