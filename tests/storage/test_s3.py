"""The S3 store where the server, the bucket or the credentials are not what they should be."""

import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from nf_pipeline.errors import AlreadyExists, ConfigError, ObjectMissing, StorageError
from nf_pipeline.storage import s3
from nf_pipeline.storage.store import open_store

pytestmark = pytest.mark.s3

OPERATIONS = {
    "get": lambda store: store.get("a"),
    "put": lambda store: store.put("a", b"1"),
    "create": lambda store: store.create("a", b"1"),
    "size": lambda store: store.size("a"),
    "delete": lambda store: store.delete(["a"]),
    "list": lambda store: store.list(""),
}


@pytest.fixture
def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("kind", ["minio_uri", "moto_uri"])
def test_missing_bucket_is_named_and_not_created(operation, kind, request):
    request.getfixturevalue(kind)
    store = open_store("s3://no-such-bucket/prefix")
    with pytest.raises(StorageError, match="bucket no-such-bucket does not exist") as caught:
        OPERATIONS[operation](store)
    assert not isinstance(caught.value, ObjectMissing)
    assert "create the bucket" in str(caught.value)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_wrong_credentials_are_reported_but_never_shown(operation, minio_uri, minio_server, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-wrong-secret")
    with pytest.raises(StorageError, match="refused the credentials") as caught:
        OPERATIONS[operation](open_store(minio_uri))
    for secret in (minio_server.access_key, "a-wrong-secret"):
        assert secret not in str(caught.value) + repr(caught.value)


def test_no_credentials_at_all_say_what_to_set(minio_uri, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(StorageError, match="AWS_ACCESS_KEY_ID"):
        open_store(minio_uri).get("a")


def test_server_that_is_down_is_a_storage_error_that_names_the_endpoint(free_port, minio_uri, monkeypatch):
    monkeypatch.setattr(s3, "MAX_ATTEMPTS", 2)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port}")
    with pytest.raises(StorageError, match=f"127.0.0.1:{free_port}") as caught:
        open_store(minio_uri).get("a")
    assert "AWS_ENDPOINT_URL" in caught.value.fix


def test_credentials_inside_the_endpoint_are_refused_and_not_shown(minio_uri, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://someone:password@127.0.0.1:9000")
    with pytest.raises(ConfigError, match="holds credentials") as caught:
        open_store(minio_uri)
    assert "password" not in str(caught.value)


def test_server_that_never_answers_is_given_up(minio_uri, monkeypatch):
    monkeypatch.setattr(s3, "OPERATION_TIMEOUT_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(StorageError, match="cannot write a"):
            open_store(minio_uri).put("a", b"1")


def test_answer_that_is_no_s3_is_a_storage_error(minio_uri, monkeypatch):
    def answer(listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 418 Teapot\r\nContent-Length: 5\r\nConnection: close\r\n\r\n<html")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=answer, args=(listener,), daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{listener.getsockname()[1]}")
        with pytest.raises(StorageError, match="cannot list"):
            open_store(minio_uri).list("")
        listener.shutdown(socket.SHUT_RDWR)


def test_unreadable_endpoint_is_a_config_error(minio_uri, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "no url at all")
    with pytest.raises(ConfigError, match="AWS_ENDPOINT_URL"):
        open_store(minio_uri)


def test_s3_endpoint_variable_goes_before_the_general_one(moto_uri, moto_server, monkeypatch, free_port):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port}")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", moto_server.endpoint)
    assert open_store(moto_uri).list("") == []


@pytest.mark.parametrize(("kind", "conditional"), [("minio_uri", False), ("moto_uri", True)])
def test_conditional_writes_are_probed_once_and_the_probe_is_removed(kind, conditional, request):
    store = open_store(request.getfixturevalue(kind))
    assert store._honours_conditions() is conditional
    assert store.list("") == []


def test_lost_answer_to_an_own_create_counts_as_created(moto_uri, monkeypatch):
    store = open_store(moto_uri)
    real = store._put_if_absent
    monkeypatch.setattr(store, "_put_if_absent", lambda *args: (real(*args) and None) or real(*args))
    store.create("m.json", b"mine")  # written by the first of two requests, refused by the second
    assert bytes(store.get("m.json")) == b"mine"


def test_conflict_between_creators_is_tried_again(moto_uri, monkeypatch):
    store = open_store(moto_uri)
    store._honours_conditions()
    real, answers = store._put_if_absent, ["ConditionalRequestConflict"]
    monkeypatch.setattr(store, "_put_if_absent", lambda *args: answers.pop() if answers else real(*args))
    store.create("m.json", b"mine")
    assert bytes(store.get("m.json")) == b"mine"


def test_create_without_conditions_notices_that_another_writer_was_later(minio_uri, monkeypatch):
    store, other = open_store(minio_uri), open_store(minio_uri)
    store._honours_conditions()
    real = store.put

    def put_then_lose(key, data):
        real(key, data)
        other.put(key, b"theirs")

    monkeypatch.setattr(store, "put", put_then_lose)
    with pytest.raises(AlreadyExists):
        store.create("m.json", b"mine")


def test_list_follows_pages(moto_uri, monkeypatch):
    store = open_store(moto_uri)
    keys = [f"run/{number:03d}" for number in range(7)]
    for key in keys:
        store.put(key, b"1")
    real = store._call
    monkeypatch.setattr(store, "_call", lambda *args, **kwargs: real(*args, MaxKeys=3, **kwargs))
    assert [key for key, _ in store.list("run")] == keys


def test_bucket_without_prefix_is_a_store_too(moto_uri):
    bucket = moto_uri.removeprefix("s3://").partition("/")[0]
    store = open_store(f"s3://{bucket}/")
    store.put("run/a", b"1")
    assert store.uri == f"s3://{bucket}"
    assert store.list("") == [("run/a", 1)]


def test_spawned_process_opens_the_same_store(moto_uri):
    open_store(moto_uri).put("a", b"shared")
    code = (
        "import sys; from nf_pipeline.storage.store import open_store; "
        "assert bytes(open_store(sys.argv[1]).get('a')) == b'shared'"
    )
    subprocess.run([sys.executable, "-c", code, moto_uri], check=True, env=dict(os.environ))


def test_storage_imports_without_s3fs():
    code = (
        "import sys, nf_pipeline.storage.manifest, nf_pipeline.storage.reader, nf_pipeline.storage.s3; "
        "assert not {'s3fs', 'botocore', 'aiohttp', 'torch', 'ray'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_stopped_server_leaves_no_process(tmp_path):
    from s3_servers import moto_server

    with moto_server(tmp_path) as server:
        group = server.process.pid
        os.killpg(group, 0)
    deadline = time.monotonic() + 10
    while _is_alive(group) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _is_alive(group), "the server's process group is still alive"


def _is_alive(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
