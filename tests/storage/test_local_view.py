"""Views of a local store's objects: the same bytes as `get` gives, alive after the object is gone."""

import errno
import mmap

import pytest

from nf_pipeline.errors import ObjectMissing, StorageError
from nf_pipeline.storage import local
from nf_pipeline.storage.local import LocalStore


@pytest.mark.parametrize("num_bytes", [0, 1, 4096, 256 * 2**10 - 1, 256 * 2**10, 2**20 + 17])
def test_view_gives_what_get_gives(store: LocalStore, num_bytes: int) -> None:
    data = bytes(range(256)) * (num_bytes // 256) + b"x" * (num_bytes % 256)
    store.put("a/b", data)
    assert bytes(store.view("a/b")) == bytes(store.get("a/b")) == data


def test_view_outlives_the_deletion_and_the_replacement_of_its_object(store: LocalStore) -> None:
    data = b"old " * 2**18
    store.put("a", data)
    view = store.view("a")
    store.put("a", b"new " * 2**18)
    store.delete(["a"])
    assert bytes(view) == data


def test_view_cannot_be_written(store: LocalStore) -> None:
    store.put("a", bytes(2**20))
    with pytest.raises(TypeError):
        store.view("a")[0] = 1


def test_view_of_nothing_or_of_what_is_outside_is_an_error(store: LocalStore) -> None:
    with pytest.raises(ObjectMissing, match="a/b does not exist"):
        store.view("a/b")
    with pytest.raises(StorageError, match="no relative path"):
        store.view("../a")


class BadPages(mmap.mmap):
    """Mapped pages that the disk cannot read."""

    def madvise(self, *_: int) -> None:
        raise OSError(errno.EFAULT, "Bad address")


def test_a_disk_that_cannot_read_mapped_pages_is_an_error_and_not_the_end_of_the_process(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put("a/b", bytes(2**20))
    monkeypatch.setattr(local.mmap, "mmap", BadPages)
    with pytest.raises(StorageError, match="cannot read a/b: Input/output error"):
        store.view("a/b")


def test_view_reads_its_pages_where_the_system_has_no_word_for_it(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put("a", b"data" * 2**18)
    monkeypatch.setattr(local, "_POPULATE_READ", 12345)
    assert bytes(store.view("a")) == b"data" * 2**18
