"""Shards that can be read while others of the same stage are still being written.

A writer keeps a small record of the shards that it has finished; a reader polls it. How many shards there will be,
and how many rows each has, both know beforehand. The stage's manifest replaces the record: what is read from a
publication counts only after the manifest has come and names the same attempt. Deliberately knows nothing of blocks
or rounds. Entry points: `Publication` to write, `PublishedShards` to read.
"""

import json
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nf_pipeline.documents import parse_json, read_fields
from nf_pipeline.errors import InputReplaced, ObjectCorrupt, ObjectMissing, StorageError
from nf_pipeline.storage.manifest import StageManifest, read_manifest
from nf_pipeline.storage.shards import ShardInfo, read_shard_info
from nf_pipeline.storage.store import Store

POLL_S = 0.25
MIN_UPDATE_S = 0.5
REST_PER_COST = 5  # who writes or reads a record rests so many times as long as that took: it grows with every shard


class Publication:
    """The record of one writer, rewritten as shards are finished. Safe to use from several threads.

    Args:
        store: of the run.
        key: of the record; later attempts at the same work use the same key.
        attempt: id of the attempt that writes the shards.
    """

    def __init__(self, store: Store, key: str, attempt: str) -> None:
        self._store = store
        self._key = key
        self._attempt = attempt
        self._lock = threading.Lock()
        self._shards: dict[str, str] = {}  # as JSON, made once
        self._due_s = 0.0
        self.flush()

    def add(self, split: str, shard_idx: int, shard: ShardInfo) -> None:
        """Notes a finished shard; the record is stored at most twice a second, and less often once it is long.

        Args:
            split: it belongs to.
            shard_idx: counted from 0 within what this writer stores of the split.
            shard: its description.
        """
        with self._lock:
            self._shards[_name(split, shard_idx)] = json.dumps(asdict(shard))
            is_due = time.monotonic() > self._due_s
        if is_due:
            self.flush()

    def flush(self) -> None:
        """Stores the record as it is now."""
        with self._lock:
            began_s = time.monotonic()
            shards = ", ".join(f"{json.dumps(name)}: {shard}" for name, shard in self._shards.items())
            self._store.put(self._key, f'{{"attempt": {json.dumps(self._attempt)}, "shards": {{{shards}}}}}'.encode())
            ended_s = time.monotonic()
            self._due_s = max(began_s + MIN_UPDATE_S, ended_s + REST_PER_COST * (ended_s - began_s))


@dataclass(frozen=True, kw_only=True)
class _Record:
    attempt: str
    shards: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the shards of a stage that may not be finished are announced.

    Attributes:
        manifest_key: commit of the stage.
        publication_keys: one record per writer, in the order of their parts.
    """

    manifest_key: str
    publication_keys: tuple[str, ...]


class Announcements:
    """What is known of a stage's shards so far; shared by all who wait for them.

    The attempt that is seen first is the one that must finish.
    """

    def __init__(self, store: Store, source: Source) -> None:
        self._store = store
        self._source = source
        self._lock = threading.Lock()
        self._attempt: str | None = None
        self._manifest: StageManifest | None = None
        self._parts: list[dict[str, ShardInfo]] = [{} for _ in source.publication_keys]

    @property
    def manifest(self) -> StageManifest | None:
        """The commit, once `poll` has seen it."""
        return self._manifest

    @property
    def num_known(self) -> int:
        """Number of shards that have been announced so far."""
        return sum(len(shards) for shards in self._parts)

    def silent(self, seconds: float) -> InputReplaced:
        """Makes the error of who has waited in vain."""
        what = f"no shard was finished for {seconds:.0f} s"
        return InputReplaced(self._source.manifest_key, what, "nothing: the stage starts again")

    def poll(self) -> None:
        """Looks what has come.

        Raises:
            InputReplaced: another attempt than the one seen first writes or has committed.
        """
        with self._lock:
            if self._manifest is not None:
                return
            manifest = read_manifest(self._store, self._source.manifest_key)
            if manifest is not None:
                self._pin(manifest.attempt)
                self._manifest = manifest
                return
            for part, key in enumerate(self._source.publication_keys):
                self._read_part(part, key)

    def shard(self, split: str, part: int, shard_idx: int, first_idx: int) -> ShardInfo | None:
        """Returns what is known of a shard.

        Args:
            split: it belongs to.
            part: writer of the shard.
            shard_idx: counted from 0 within the part.
            first_idx: of the part among all shards of the split.
        """
        if self._manifest is not None:
            return self._manifest.shards[split][first_idx + shard_idx]
        return self._parts[part].get(_name(split, shard_idx))

    def _read_part(self, part: int, key: str) -> None:
        try:
            document = read_fields(_Record, parse_json(self._store.get(key)))
            shards = {name: read_shard_info(shard) for name, shard in document.shards.items()}
        except ObjectMissing:
            return
        except ValueError as error:
            raise ObjectCorrupt(f"{key} is no record of shards: {error}", self._store.uri, "resume the run") from None
        self._parts[part] = shards
        self._pin(document.attempt)

    def _pin(self, attempt: str) -> None:
        if self._attempt is None:
            self._attempt = attempt
        elif attempt != self._attempt:
            raise InputReplaced(
                self._source.manifest_key,
                f"attempt {self._attempt}, which was being read, gave way to attempt {attempt}",
                "nothing: the stage starts again on the new one",
            )


class PublishedShards:
    """The shards of one split, in stored order; those that are not there yet are waited for.

    Args:
        announcements: of the stage that writes them.
        split: name of the split.
        part_rows: rows that each writer stores.
        rows_per_shard: of every shard but the last of each writer.
        timeout_s: longest wait while no shard at all is finished. Who writes them is watched elsewhere: this only
            ends what would otherwise wait for ever.
    """

    def __init__(
        self,
        announcements: Announcements,
        split: str,
        part_rows: Sequence[int],
        rows_per_shard: int,
        timeout_s: float = 3600.0,
    ) -> None:
        self._announcements = announcements
        self._split = split
        self._timeout_s = timeout_s
        self._closed = threading.Event()
        self._places: list[tuple[int, int, int]] = []  # part, shard within it, first shard of the part
        self._rows: list[int] = []
        for part, num_rows in enumerate(part_rows):
            first = len(self._rows)
            sizes = shard_sizes(num_rows, rows_per_shard)
            self._places += [(part, shard_idx, first) for shard_idx in range(len(sizes))]
            self._rows += sizes

    def __len__(self) -> int:
        return len(self._rows)

    def num_rows(self, idx: int) -> int:
        """Rows of a shard, known before it exists."""
        return self._rows[idx]

    def get(self, idx: int) -> ShardInfo:
        """Returns a shard's description as soon as it is stored.

        Raises:
            InputReplaced: the attempt that wrote it was given up, or fell silent.
            StorageError: waiting was ended by `close`.
        """
        part, shard_idx, first = self._places[idx]
        known, heard = self._announcements.num_known, time.monotonic()
        rest_s = POLL_S
        while True:
            shard = self._announcements.shard(self._split, part, shard_idx, first)
            if shard is not None:
                return shard
            if known != self._announcements.num_known:
                known, heard = self._announcements.num_known, time.monotonic()
            if time.monotonic() - heard > self._timeout_s:
                raise self._announcements.silent(self._timeout_s)
            if self._closed.wait(rest_s):
                raise StorageError("nobody waits for shards any more")
            began_s = time.monotonic()
            self._announcements.poll()
            rest_s = max(POLL_S, REST_PER_COST * (time.monotonic() - began_s))

    def close(self) -> None:
        """Ends every wait."""
        self._closed.set()


def _name(split: str, shard_idx: int) -> str:
    return f"{split}-{shard_idx}"


def shard_sizes(num_rows: int, rows_per_shard: int) -> list[int]:
    """Returns the rows of every shard that a writer cuts from a number of rows."""
    full, rest = divmod(num_rows, rows_per_shard)
    return [rows_per_shard] * full + ([rest] if rest else [])
