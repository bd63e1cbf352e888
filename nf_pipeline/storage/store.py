"""One interface for a folder and for object storage: whole objects under relative keys.

An object is written in one piece or not at all, and read in one piece: an exception inside a streaming
`with open(...)` block publishes a truncated object on S3 (https://github.com/apache/arrow/issues/40502).
Deliberately knows nothing of what the objects contain. Entry function: `open_store`.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from typing import Protocol

from nf_pipeline.errors import ConfigError, StorageError
from nf_pipeline.storage.leftovers import Leftover

Data = bytes | bytearray | memoryview

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(.*)", re.DOTALL)


class Store(Protocol):
    """Objects under keys such as "run/blocks/000/manifest.json".

    One instance may be used from several threads, and pickles as its `uri`. No key may leave the store: keys
    with "..", empty parts or a leading "/" are refused with StorageError, because manifests bring keys in
    from outside. Every method raises StorageError where the store cannot be reached or refuses.

    Attributes:
        uri: absolute path or s3://bucket/prefix; `open_store(uri)` opens the same store elsewhere.
    """

    uri: str

    def get(self, key: str) -> Data:
        """Reads a whole object.

        Raises:
            ObjectMissing: there is none.
        """
        ...

    def view(self, key: str) -> Data:
        """Reads a whole object as `get` does, but may hand out the file's own pages, which saves a copy.

        For objects that were read and verified before: a disk that fails under mapped pages ends the process.

        Raises:
            ObjectMissing: there is none.
        """
        ...

    def put(self, key: str, data: Data) -> None:
        """Writes a whole object, over an older one if there is one; readers see the old or the new one."""
        ...

    def create(self, key: str, data: Data) -> None:
        """Writes an object that must not exist yet.

        Raises:
            AlreadyExists: another writer was first; its object is untouched.
        """
        ...

    def size(self, key: str) -> int | None:
        """Returns the bytes of an object, None if there is none."""
        ...

    def delete(self, keys: Iterable[str]) -> None:
        """Removes objects; keys that are not there are fine."""
        ...

    def leftovers(self, prefix: str, *, min_age_s: float) -> Sequence[Leftover]:
        """Lists what killed writers left that `list` does not show: unfinished uploads below a prefix that are at
        least so old, and the store's own probes of long ago."""
        ...

    def discard(self, leftovers: Iterable[Leftover]) -> None:
        """Removes leftovers; those that are gone are fine."""
        ...

    def list(self, prefix: str) -> list[tuple[str, int]]:
        """Lists the objects below a folder-like prefix ("" for all), sorted by key, with their bytes.

        Temporary files of a local writer that was killed show up too (names end in ".part").
        """
        ...


def open_store(uri: str) -> Store:
    """Opens a folder ("./nf-runs", "file:///data/runs") or S3 ("s3://bucket/prefix").

    S3's endpoint, region and credentials come from the environment: AWS_ENDPOINT_URL (or
    AWS_ENDPOINT_URL_S3), AWS_DEFAULT_REGION, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, or whatever else
    botocore finds. Nothing is read or written yet.

    Raises:
        ConfigError: another scheme, no bucket, or credentials inside the URI.
    """
    match = _SCHEME.fullmatch(uri)
    scheme, rest = (match.group(1).lower(), match.group(2)) if match else ("", uri)
    if scheme in ("", "file"):
        from nf_pipeline.storage.local import LocalStore

        return LocalStore(_local_path(rest, is_uri=scheme == "file"))
    if scheme == "s3":
        from nf_pipeline.storage.s3 import S3Store

        return S3Store(*_bucket_and_prefix(rest))
    raise ConfigError(
        f"store {scheme}:...: unknown scheme {scheme!r}, want a folder or s3://bucket/prefix",
        "--store ./nf-runs or --store s3://bucket/prefix",
    )


def check_key(key: str) -> str:
    """Returns a key that stays inside its store.

    Raises:
        StorageError: the key is empty, absolute, no file name, or has an empty, "." or ".." part.
    """
    if not _is_file_name(key) or "\\" in key or any(part in ("", ".", "..") for part in key.split("/")):
        raise StorageError(f"key {key!r} is no relative path inside a store")
    return key


def checksum_of(data: Data) -> str:
    """Returns "sha256:" and 64 hex digits; about 1.4 GB/s on a core with SHA instructions."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _local_path(rest: str, *, is_uri: bool) -> str:
    path = rest
    if is_uri and rest.startswith("//"):
        host, slash, tail = rest[2:].partition("/")
        if host not in ("", "localhost") or not slash:
            raise ConfigError(f"store file:{rest}: names the host {host!r}", "file:///absolute/path")
        path = f"/{tail}"
    if not path or not _is_file_name(path):
        raise ConfigError(f"store {path!r}: no folder", "--store ./nf-runs")
    return path


def _is_file_name(path: str) -> bool:
    try:
        return b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can hold
        return False


def _bucket_and_prefix(rest: str) -> tuple[str, str]:
    if "@" in rest.removeprefix("//").partition("/")[0]:
        raise ConfigError(
            "store s3://...@...: credentials do not belong into the URI (not shown)",
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment",
        )
    bucket, _, prefix = rest.removeprefix("//").partition("/")
    prefix = prefix.strip("/")
    if not rest.startswith("//") or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{1,62}", bucket):
        raise ConfigError(f"store s3:{rest}: bucket name {bucket!r}", "--store s3://bucket/prefix")
    if prefix and ("?" in prefix or any(part in ("", ".", "..") for part in prefix.split("/"))):
        raise ConfigError(f"store s3:{rest}: prefix {prefix!r}", "--store s3://bucket/prefix")
    return bucket, prefix
