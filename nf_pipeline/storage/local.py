"""A store in a folder: temporary file beside the target, fsync, then one atomic rename or link.

Deliberately knows nothing of what the objects contain. Opened by `store.open_store`.
"""

import contextlib
import errno
import io
import mmap
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from nf_pipeline.errors import AlreadyExists, ObjectMissing, StorageError
from nf_pipeline.storage.leftovers import Leftover
from nf_pipeline.storage.store import Data, check_key, open_store

_MAPPED_FROM = 256 * 2**10
_POPULATE_READ = 22  # MADV_POPULATE_READ of Linux 5.14, which Python has no name for
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)


class LocalStore:
    """Objects as files below a folder, which is made by the first write.

    Args:
        root: folder; "~" and relative paths are resolved once, here.
    """

    def __init__(self, root: str) -> None:
        self._root = Path(os.path.abspath(os.path.expanduser(root)))
        self.uri = str(self._root)

    def __repr__(self) -> str:
        return f"LocalStore({self.uri!r})"

    def __reduce__(self) -> tuple[object, ...]:
        return open_store, (self.uri,)

    def get(self, key: str) -> Data:
        """Reads a whole object (see `Store.get`)."""
        path = self._path(key)
        with self._explained("read", key):
            try:
                return _read_whole(path)
            except (FileNotFoundError, NotADirectoryError):
                raise ObjectMissing(f"object {key} does not exist", self.uri) from None

    def view(self, key: str) -> Data:
        """Maps a whole object, unless it is small (see `Store.view`)."""
        path = self._path(key)
        with self._explained("read", key):
            try:
                return _map_whole(path)
            except (FileNotFoundError, NotADirectoryError):
                raise ObjectMissing(f"object {key} does not exist", self.uri) from None

    def put(self, key: str, data: Data) -> None:
        """Writes a whole object (see `Store.put`)."""
        path = self._path(key)
        with self._explained("write", key), _written_beside(path, data) as part:
            os.replace(part, path)
            _sync_folder(path.parent)

    def create(self, key: str, data: Data) -> None:
        """Writes an object that must not exist yet (see `Store.create`)."""
        path = self._path(key)
        with self._explained("create", key), _written_beside(path, data) as part:
            try:
                _link(part, path, data)
            except FileExistsError:
                raise AlreadyExists(f"object {key} exists already", self.uri) from None
            _sync_folder(path.parent)

    def size(self, key: str) -> int | None:
        """Returns the bytes of an object (see `Store.size`)."""
        path = self._path(key)
        with self._explained("look up", key):
            try:
                return path.stat().st_size if path.is_file() else None
            except (FileNotFoundError, NotADirectoryError):
                return None

    def delete(self, keys: Iterable[str]) -> None:
        """Removes objects, and folders that become empty (see `Store.delete`)."""
        for key in keys:
            path = self._path(key)
            with self._explained("delete", key):
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                    path.unlink()
                self._prune(path.parent)

    def list(self, prefix: str) -> list[tuple[str, int]]:
        """Lists objects (see `Store.list`)."""
        prefix = prefix.removesuffix("/")
        top = self._path(prefix) if prefix else self._root
        found = []
        with self._explained("list", prefix):
            for folder, _, names in os.walk(top, onerror=_raise_unless_missing):
                for path in (Path(folder, name) for name in names):
                    with contextlib.suppress(FileNotFoundError):  # deleted since the folder was read
                        found.append((path.relative_to(self._root).as_posix(), path.stat().st_size))
        return sorted(found)

    def leftovers(self, prefix: str, *, min_age_s: float) -> Sequence[Leftover]:
        """Finds none: half-written files are listed like objects (see `Store.leftovers`)."""
        return []

    def discard(self, leftovers: Iterable[Leftover]) -> None:
        """Removes what `leftovers` found, which is nothing (see `Store.discard`)."""

    def _path(self, key: str) -> Path:
        return self._root / check_key(key)

    def _prune(self, folder: Path) -> None:
        while folder != self._root and folder.is_relative_to(self._root):
            try:
                folder.rmdir()
            except OSError:  # not empty, or gone already
                return
            folder = folder.parent

    @contextlib.contextmanager
    def _explained(self, verb: str, key: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(f"cannot {verb} {key}: {error.strerror}", self.uri, _fix(error)) from error


def _read_whole(path: Path) -> memoryview:
    """Reads into memory of Arrow's pool, which is used again: fresh memory costs a page fault per page."""
    with open(path, "rb", buffering=0) as file:
        data = memoryview(pa.allocate_buffer(os.fstat(file.fileno()).st_size))
        filled = 0
        while taken := file.readinto(data[filled:]):
            filled += taken
    return data[:filled]


def _map_whole(path: Path) -> memoryview:
    with open(path, "rb", buffering=0) as file:
        num_bytes = os.fstat(file.fileno()).st_size
        if num_bytes < _MAPPED_FROM:
            return memoryview(file.read())
        pages = mmap.mmap(file.fileno(), num_bytes, access=mmap.ACCESS_READ)
    _read_pages(pages)
    return memoryview(pages)


def _read_pages(pages: mmap.mmap) -> None:
    """Reads a mapped file now: who takes rows out of it later, here and there, should not wait for a disk."""
    try:
        pages.madvise(_POPULATE_READ)
    except AttributeError:  # Windows has no madvise
        np.frombuffer(pages, np.uint8)[:: mmap.PAGESIZE].max()
    except OSError as error:
        if error.errno == errno.EFAULT:  # reading these pages where they are used would end the process
            raise OSError(errno.EIO, os.strerror(errno.EIO)) from error
        np.frombuffer(pages, np.uint8)[:: mmap.PAGESIZE].max()  # an older kernel, or another system's


@contextlib.contextmanager
def _written_beside(path: Path, data: Data) -> Iterator[Path]:
    """Yields a synced temporary file in the folder of `path` and removes it in the end."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    file = _open_new(part)
    try:
        with file:
            _write_all(file.fileno(), data)
            os.fsync(file.fileno())
        yield part
    finally:
        part.unlink(missing_ok=True)


def _open_new(part: Path) -> io.FileIO:
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        return open(part, "xb", buffering=0)
    except FileNotFoundError:  # a concurrent delete pruned the empty folder in between
        part.parent.mkdir(parents=True, exist_ok=True)
        return open(part, "xb", buffering=0)


def _write_all(descriptor: int, data: Data) -> None:
    rest = memoryview(data).cast("B")
    while rest:  # the kernel takes at most 2 GiB at once
        rest = rest[os.write(descriptor, rest) :]


def _link(part: Path, path: Path, data: Data) -> None:
    try:
        os.link(part, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        _create_without_links(path, data)


def _create_without_links(path: Path, data: Data) -> None:
    """Creates exclusively where the file system has no hard links; a crash may leave a short file."""
    with open(path, "xb", buffering=0) as file:
        try:
            _write_all(file.fileno(), data)
            os.fsync(file.fileno())
        except OSError:
            path.unlink(missing_ok=True)
            raise


def _sync_folder(folder: Path) -> None:
    """Makes a rename durable; a no-op where folders cannot be synced."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _raise_unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def _fix(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free space there, or choose another --store"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "give this user write access there, or choose another --store"
    return "choose another --store"
