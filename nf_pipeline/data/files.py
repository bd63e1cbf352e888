"""Finds and opens the Parquet files of a data set, in a folder or in object storage.

Knows nothing of what the files contain. S3's endpoint and credentials come from the usual AWS_* environment.
Entry: `list_parquet_files`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from nf_pipeline.data.base import printable
from nf_pipeline.errors import DataError, StorageError
from nf_pipeline.storage.store import open_store

_SUFFIXES = (".parquet", ".pq")


@dataclass(frozen=True, kw_only=True)
class DataFile:
    """One file of a data set.

    Attributes:
        name: relative to the data set, with "/", escaped for display.
        path: as `FileSet.open` needs it.
        num_bytes: its size.
    """

    name: str
    path: str
    num_bytes: int


class FileSet:
    """The Parquet files of one folder, bucket prefix or single file, sorted by name.

    Args:
        uri: as the user gave it, for errors.
        files: in order.
        filesystem: fsspec file system; None for local files.
    """

    def __init__(self, uri: str, files: list[DataFile], filesystem: Any = None) -> None:
        self.uri = uri
        self.files = files
        self._filesystem = filesystem

    @property
    def remote(self) -> bool:
        """Whether a read costs a round trip."""
        return self._filesystem is not None

    def open(self, file: DataFile) -> Any:
        """Opens a file for pyarrow."""
        if self._filesystem is None:
            return pa.OSFile(file.path)
        # pyarrow asks for whole coalesced ranges: a cache of fsspec's would read tens of MiB past each.
        return self._filesystem.open(file.path, "rb", cache_type="none")

    @contextmanager
    def errors_named(self, file: DataFile) -> Iterator[None]:
        """Turns what reading can raise into errors that name the file.

        Raises:
            DataError: the file is no Parquet file, is damaged or cannot be opened.
            StorageError: the object store failed.
        """
        try:
            yield
        except (pa.ArrowException, ValueError, MemoryError) as error:
            # ValueError: names and texts that are no UTF-8. MemoryError: a page that claims to be larger than memory.
            raise self._unreadable(file, error) from error
        except _read_errors(self.remote) as error:
            if self.remote:
                raise _store_failed(self.uri, file, error) from error
            raise self._unreadable(file, error) from error

    def _unreadable(self, file: DataFile, error: BaseException) -> DataError:
        return DataError(
            f"{file.name} in {self.uri}: cannot be read as Parquet: {first_line(error)}",
            "replace or remove the file",
        )


def list_parquet_files(uri: str) -> FileSet:
    """Finds the Parquet files below a folder or s3://bucket/prefix, or takes one file.

    Files and folders whose name begins with "." or "_" are not data.

    Raises:
        DataError: nothing there.
        StorageError: the object store cannot be reached or refuses.
    """
    files = _list_s3(uri) if uri.startswith("s3://") else _list_local(Path(uri), uri)
    if not files.files:
        raise DataError(f"data source {uri}: no Parquet files", "a folder or URI with *.parquet files")
    return files


def is_parquet_name(name: str) -> bool:
    """Tells whether a file name looks like Parquet."""
    return name.lower().endswith(_SUFFIXES)


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's text, for use inside another's."""
    return printable((str(error) or type(error).__name__).splitlines()[0][:300])


def _list_local(path: Path, uri: str) -> FileSet:
    if path.is_file():
        return FileSet(uri, [_local_file(path, path.name)])
    found = [
        (found.relative_to(path), found)
        for found in path.rglob("*")
        if is_parquet_name(found.name) and found.is_file()
    ]
    files = [_local_file(full, name.as_posix()) for name, full in found if not _hidden(name.parts)]
    return FileSet(uri, sorted(files, key=lambda file: file.name))


def _local_file(path: Path, name: str) -> DataFile:
    return DataFile(name=printable(name), path=str(path), num_bytes=path.stat().st_size)


def _list_s3(uri: str) -> FileSet:
    root = uri.rstrip("/")
    store = open_store(root)
    found = store.list("")
    if not found and is_parquet_name(root):
        # Not a folder but one object: only its parent can look it up.
        folder, _, name = root.rpartition("/")
        num_bytes = open_store(folder).size(name)
        found = [] if num_bytes is None else [(name, num_bytes)]
        root = folder
    files = [
        DataFile(name=printable(name), path=f"{root.removeprefix('s3://')}/{name}", num_bytes=num_bytes)
        for name, num_bytes in found
        if is_parquet_name(name) and not _hidden(tuple(name.split("/")))
    ]
    return FileSet(uri, files, _open_s3(uri))


def _open_s3(uri: str) -> Any:
    # The one place that connects: its environment, timeouts, retries and wording count here too.
    from nf_pipeline.storage.s3 import connect

    return connect(uri)


def _read_errors(remote: bool) -> tuple[type[Exception], ...]:
    if not remote:
        return (OSError,)
    from nf_pipeline.storage.s3 import s3_failures

    return s3_failures()


def _store_failed(uri: str, file: DataFile, error: Exception) -> StorageError:
    from nf_pipeline.storage.s3 import explain_failure

    return explain_failure(error, f"{file.name} cannot be read", uri)


def _hidden(parts: tuple[str, ...]) -> bool:
    return any(part.startswith((".", "_")) for part in parts)
