"""The folder store where the disk or a concurrent process gets in the way."""

import errno
import os
import subprocess
import sys

import pytest

from nf_pipeline.errors import AlreadyExists, StorageError
from nf_pipeline.storage import local
from nf_pipeline.storage.local import LocalStore


@pytest.fixture
def store(tmp_path):
    return LocalStore(str(tmp_path / "store"))


def test_opening_and_reading_make_no_folder(store, tmp_path):
    assert store.list("") == []
    assert store.size("a") is None
    assert list(tmp_path.iterdir()) == []


def test_failed_write_leaves_the_old_object_and_no_temporary_file(store, monkeypatch):
    store.put("run/a", b"old")

    def full(descriptor, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(StorageError, match=r"cannot write run/a: No space left on device") as caught:
        store.put("run/a", b"new")
    monkeypatch.undo()
    assert "free space" in str(caught.value)
    assert store.get("run/a") == b"old"
    assert store.list("") == [("run/a", 3)]


def test_short_writes_of_the_kernel_are_continued(store, monkeypatch):
    real_write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real_write(descriptor, data[:3]))
    store.put("a", b"0123456789")
    assert store.get("a") == b"0123456789"


def test_create_works_without_hard_links(store, monkeypatch):
    def refuse(source, target):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    store.create("m.json", b"first")
    with pytest.raises(AlreadyExists):
        store.create("m.json", b"second")
    assert store.get("m.json") == b"first"
    assert store.list("") == [("m.json", 5)]


def test_file_where_a_folder_is_needed_is_a_storage_error_and_no_already_exists(store):
    store.put("run", b"a file")
    for write in (store.put, store.create):
        with pytest.raises(StorageError, match="run/a") as caught:
            write("run/a", b"1")
        assert not isinstance(caught.value, AlreadyExists)
    assert store.size("run/a") is None


def test_delete_removes_folders_that_become_empty_but_not_the_store(store, tmp_path):
    store.put("run/blocks/000/a", b"1")
    store.put("run/b", b"1")
    store.delete(["run/blocks/000/a"])
    assert sorted(path.name for path in (tmp_path / "store" / "run").iterdir()) == ["b"]
    store.delete(["run/b"])
    assert list((tmp_path / "store").iterdir()) == []


def test_write_survives_a_folder_that_a_concurrent_delete_removes(store, monkeypatch):
    real_open, removed = open, []

    def remove_folder_first(path, *args, **kwargs):
        if not removed:
            removed.append(path.parent)
            path.parent.rmdir()
        return real_open(path, *args, **kwargs)

    monkeypatch.setattr(local, "open", remove_folder_first, raising=False)
    store.put("run/blocks/a", b"1")
    assert removed
    assert store.get("run/blocks/a") == b"1"


def test_killed_writer_leaves_the_old_object_and_a_listed_temporary_file(store):
    store.put("run/a", b"old")
    code = (
        "import os, signal, sys; from nf_pipeline.storage.local import LocalStore\n"
        "os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)\n"
        "LocalStore(sys.argv[1]).put('run/a', b'new')"
    )
    assert subprocess.run([sys.executable, "-c", code, store.uri], check=False).returncode == -9
    assert store.get("run/a") == b"old"
    (part, _), (key, _) = store.list("run")
    assert (part.endswith(".part"), key) == (True, "run/a")


def test_folder_without_permission_is_a_storage_error(store, monkeypatch):
    def refuse(source, target):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(StorageError, match="write access"):
        store.put("a", b"1")
    assert store.list("") == []
