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
from nf_pipeline.errors import ConfigError, DataError, StorageError

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
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowKeyError) as error:
            raise self._unreadable(file, error) from error
        except _remote_errors(self.remote) as error:
            if self.remote:
                raise _store_failed(self.uri, error) from error
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
    if "@" in uri.partition("://")[2].partition("/")[0]:
        raise ConfigError(
            "data source s3://...@...: credentials do not belong into the URI (not shown)",
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment",
        )
    filesystem = _open_s3()
    root = uri.removeprefix("s3://").rstrip("/")
    try:
        sizes = {path: entry["size"] for path, entry in filesystem.find(root, detail=True).items()}
    except _remote_errors(True) as error:
        raise _store_failed(uri, error) from error
    files = []
    for path, num_bytes in sorted(sizes.items()):
        name = path.removeprefix(root).lstrip("/") or path.rsplit("/", 1)[-1]
        if is_parquet_name(name) and not _hidden(tuple(name.split("/"))):
            files.append(DataFile(name=printable(name), path=path, num_bytes=num_bytes))
    return FileSet(uri, files, filesystem)


def _open_s3() -> Any:
    import s3fs  # slow to import, and needed for s3:// only

    config = {"connect_timeout": 10, "read_timeout": 60, "retries": {"max_attempts": 5, "mode": "standard"}}
    # Listings are cached by default: files written since by another process would stay unseen.
    return s3fs.S3FileSystem(config_kwargs=config, use_listings_cache=False, skip_instance_cache=True)


def _remote_errors(remote: bool) -> tuple[type[BaseException], ...]:
    if not remote:
        return (OSError,)
    from botocore.exceptions import BotoCoreError, ClientError

    return (OSError, BotoCoreError, ClientError)


def _store_failed(uri: str, error: BaseException) -> StorageError:
    return StorageError(
        f"data cannot be read: {type(error).__name__}: {first_line(error)}",
        uri,
        "check the URI, AWS_ENDPOINT_URL and the AWS_* credentials",
    )


def _hidden(parts: tuple[str, ...]) -> bool:
    return any(part.startswith((".", "_")) for part in parts)
