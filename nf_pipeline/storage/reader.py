"""Batches from shards, shuffled by seed and epoch, while the next shards are fetched in the background.

The shards of an epoch are put in random order and cut into windows; all rows of a window are shuffled
together. While one window is consumed, threads fetch and decode the next, and one more gathers the next
batches. A shard's checksum is compared when a reader sees it for the first time; in later epochs its size and
form are. The result depends on (seed, epoch)
and the part only, never on timing. Deliberately knows nothing of torch: a batch is bytes; nor of how shards
that are still being written are waited for: that is a `ShardList`'s work. Entry class: `ShardReader`.
"""

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from nf_pipeline.errors import ObjectCorrupt, StorageError
from nf_pipeline.storage.affine import Affine
from nf_pipeline.storage.parts import WHOLE, Part, divide_rows, step_sizes
from nf_pipeline.storage.sealed import repair_fix
from nf_pipeline.storage.shards import Shard, ShardInfo, TensorSpec, read_shard
from nf_pipeline.storage.store import Store

STORED_TIMEOUT_S = 300.0
WINDOW_SHARDS = 4
PREFETCH_THREADS = 2
BATCHES_AHEAD = 2
_ALIGNMENT_BYTES = 64


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Samples that own their memory.

    Attributes:
        tensors: uint8 [N, nbytes], contiguous and aligned to 64 bytes, so that it views as any dtype.
        labels: int64 [N].
        sample_ids: int64 [N].
        affine: what the bytes stand for, see `TensorSpec`.
    """

    tensors: np.ndarray
    labels: np.ndarray
    sample_ids: np.ndarray
    affine: Affine | None


class ShardList(Protocol):
    """The shards of a split in stored order; some may still be being written.

    How many there are and how many rows each has must be known beforehand: the batches follow from it.
    """

    def __len__(self) -> int:
        """Number of shards, those to come included."""

    def num_rows(self, shard_idx: int) -> int:
        """Rows of a shard; never blocks."""

    def get(self, shard_idx: int) -> ShardInfo:
        """Returns a shard's description as soon as the shard is stored; may block.

        Called in the prefetching threads, for several shards at once. What it raises ends the epoch and
        reaches the reader's consumer.
        """

    def close(self) -> None:
        """Ends every `get` that blocks, now and later, with an exception; what is stored stays available.

        The reader calls it whenever an epoch ends, however it ends, possibly before the last shard was asked for.
        """


class _StoredShards:
    """A list whose shards are all there."""

    def __init__(self, shards: Sequence[ShardInfo]) -> None:
        self._shards = tuple(shards)

    def __len__(self) -> int:
        return len(self._shards)

    def num_rows(self, shard_idx: int) -> int:
        return self._shards[shard_idx].num_rows

    def get(self, shard_idx: int) -> ShardInfo:
        return self._shards[shard_idx]

    def close(self) -> None:
        pass


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """The rows of one shard that belong to the reader's part, counted from the shard's first."""

    shard_idx: int
    rows: range


class ShardReader:
    """Reads the shards of one split, as often as there are epochs.

    Invariants: at most two windows of decoded shards are in memory (plus the encoded bytes of the
    `prefetch_threads` shards that are being decoded), and BATCHES_AHEAD batches that nobody has taken yet, however
    large the split is. Every row is copied once, from the decoded shard into its batch.

    Args:
        store: where the shards are.
        shards: as the manifest lists them, or a `ShardList`, which waits for those that are not there yet.
        spec: of their tensors.
        batch_size: samples per batch, at most.
        part: which rows to read; only shards that hold some of them are fetched.
        window_shards: shards whose rows are shuffled together.
        prefetch_threads: shards fetched and decoded at the same time.

    Attributes:
        wait_s: seconds that consumers waited for a batch, over all epochs so far.
    """

    def __init__(
        self,
        store: Store,
        shards: Sequence[ShardInfo] | ShardList,
        spec: TensorSpec,
        *,
        batch_size: int,
        part: Part = WHOLE,
        window_shards: int = WINDOW_SHARDS,
        prefetch_threads: int = PREFETCH_THREADS,
    ) -> None:
        self.wait_s = 0.0
        self._store = store
        grows = not isinstance(shards, Sequence)
        self._shards: ShardList = shards if grows else _StoredShards(shards)
        self._default_timeout_s = None if grows else STORED_TIMEOUT_S
        self._spec = spec
        self._batch_size = batch_size
        self._part = part
        self._window_shards = window_shards
        self._prefetch_threads = prefetch_threads
        self._verified: set[int] = set()  # shards whose checksum was right when they were read first

    @property
    def num_rows(self) -> int:
        """Samples of the part."""
        return len(self._part.rows(self.num_rows_total))

    @property
    def num_rows_total(self) -> int:
        """Samples of the whole split."""
        return sum(self._shards.num_rows(shard_idx) for shard_idx in range(len(self._shards)))

    def num_batches(self, *, even: bool = False) -> int:
        """Batches of one epoch (see `batches`); as many even ones as every other part of the split has."""
        return len(self._batch_sizes(even))

    def step_sizes(self) -> list[int]:
        """Samples of every even batch of one epoch, over all parts of the split."""
        return step_sizes(self.num_rows_total, self._batch_size, self._part.count)

    def batches(
        self,
        *,
        seed: int,
        epoch: int,
        shuffle: bool,
        even: bool = False,
        shuffle_shards: bool = True,
        timeout_s: float | None = None,
    ) -> Iterator[Batch]:
        """Yields one epoch of the part, every row exactly once (for the exceptions see `divide_rows`).

        Rows that share a batch come in stored order within it, so that copying them reads memory forwards;
        which rows share a batch is random.

        Args:
            seed: of the run.
            epoch: 0-based; another epoch, another order.
            shuffle: False gives stored order.
            even: batches of about the same size, for training, see `divide_rows`; False gives full batches and
                a short last one.
            shuffle_shards: False keeps the windows in stored order and shuffles inside each: for an epoch that
                reads shards while they are being written. Without `shuffle` it has no meaning.
            timeout_s: longest wait for the next shards; by default that of `STORED_TIMEOUT_S`, or the one that a
                `ShardList` has of its own.

        Raises:
            ObjectMissing, ObjectCorrupt: a shard is not what the manifest says.
            StorageError: the store failed, or sent nothing within the time.
            Exception: whatever a `ShardList` raised.
        """
        ended = threading.Event()
        gathered = self._gathered(
            np.random.default_rng([seed, epoch]) if shuffle else None,
            self._batch_sizes(even),
            shuffle_shards=shuffle_shards,
            timeout_s=timeout_s or self._default_timeout_s,
            ended=ended,
        )
        # One thread runs the generator, one batch at a time: it never waits for room, so nothing has to wake it.
        gatherer = ThreadPoolExecutor(1, thread_name_prefix="shard-reader-batch")
        ahead = deque(gatherer.submit(next, gathered, None) for _ in range(BATCHES_AHEAD))
        try:
            while (batch := self._awaited(ahead.popleft())) is not None:
                ahead.append(gatherer.submit(next, gathered, None))
                yield batch
        finally:
            ended.set()
            self._shards.close()
            gatherer.shutdown(cancel_futures=True)
            gathered.close()

    def _awaited(self, batch: "Future[Batch | None]") -> Batch | None:
        start = time.perf_counter()
        try:
            return batch.result()
        finally:
            self.wait_s += time.perf_counter() - start

    def _gathered(
        self,
        random: np.random.Generator | None,
        sizes: list[int],
        *,
        shuffle_shards: bool,
        timeout_s: float | None,
        ended: threading.Event,
    ) -> Iterator[Batch]:
        windows = self._windows(random if shuffle_shards else None)
        pool = ThreadPoolExecutor(self._prefetch_threads, thread_name_prefix="shard-reader")
        hangs = False
        try:
            filler = _BatchFiller(self._spec.nbytes, sizes)
            for window in self._fetched(pool, windows, timeout_s, ended):
                yield from filler.fill(window, _row_order(window, random))
                window.clear()  # the last reference to these shards: the window after the next comes now
                if filler.is_done:
                    break
        except TimeoutError as error:
            hangs = True
            fix = "check the store and the network, then resume"
            raise StorageError(str(error), self._store.uri, fix) from None
        finally:
            self._shards.close()  # before the threads are waited for: they may be in `get`
            pool.shutdown(wait=not hangs, cancel_futures=True)

    def _batch_sizes(self, even: bool) -> list[int]:
        return divide_rows(self.num_rows_total, self._batch_size, even=even, part=self._part)

    def _windows(self, random: np.random.Generator | None) -> list[list[_Piece]]:
        pieces = self._pieces()
        order = np.arange(len(pieces)) if random is None else random.permutation(len(pieces))
        chosen = [pieces[position] for position in order]
        return [chosen[start : start + self._window_shards] for start in range(0, len(chosen), self._window_shards)]

    def _pieces(self) -> list[_Piece]:
        wanted, first, pieces = self._part.rows(self.num_rows_total), 0, []
        for shard_idx in range(len(self._shards)):
            num_rows = self._shards.num_rows(shard_idx)
            rows = range(max(0, wanted.start - first), min(num_rows, wanted.stop - first))
            if rows:
                pieces.append(_Piece(shard_idx=shard_idx, rows=rows))
            first += num_rows
        return pieces

    def _fetched(
        self,
        pool: ThreadPoolExecutor,
        windows: Sequence[Sequence[_Piece]],
        timeout_s: float | None,
        ended: threading.Event,
    ) -> Iterator[list[Shard]]:
        pending = self._fetch(pool, windows[0], ended) if windows else []
        for following in [*windows[1:], ()]:
            window = self._wait(pending, timeout_s)
            pending = self._fetch(pool, following, ended)
            yield window

    def _fetch(
        self, pool: ThreadPoolExecutor, window: Sequence[_Piece], ended: threading.Event
    ) -> list[Future[Shard]]:
        return [pool.submit(self._read, piece, ended) for piece in window]

    def _read(self, piece: _Piece, ended: threading.Event) -> Shard:
        if ended.is_set():
            raise StorageError("nobody waits for shards any more")
        info, num_rows = self._shards.get(piece.shard_idx), self._shards.num_rows(piece.shard_idx)
        if info.num_rows != num_rows:
            what = f"shard {info.key} has {info.num_rows} rows, want {num_rows}"
            raise ObjectCorrupt(what, self._store.uri, repair_fix(self._store, info.key))
        shard = read_shard(self._store, info, self._spec, is_verified=piece.shard_idx in self._verified)
        self._verified.add(piece.shard_idx)
        return shard if len(piece.rows) == num_rows else shard.cut(piece.rows)

    def _wait(self, pending: list[Future[Shard]], timeout_s: float | None) -> list[Shard]:
        _, late = wait_for(pending, timeout=timeout_s, return_when="FIRST_EXCEPTION")
        failed = [fetch for fetch in pending if fetch.done() and fetch.exception() is not None]
        if late and not failed:
            raise TimeoutError(f"{len(late)} of {len(pending)} shards did not arrive within {timeout_s:.0f} s")
        return self._agreeing([fetch.result() for fetch in failed or pending])

    def _agreeing(self, window: list[Shard]) -> list[Shard]:
        """Passes shards on whose bytes stand for the same numbers: those of a split are mixed in every batch."""
        if self._spec.affine is None and window:
            self._spec = replace(self._spec, affine=window[0].affine)
        if any(shard.affine != self._spec.affine for shard in window):
            what = "shards of one stage have different scales"
            raise ObjectCorrupt(what, self._store.uri, "resume the run")
        return window


def reader_bytes(shard_bytes: int) -> int:
    """Returns what a reader holds of its host's memory at most, but for BATCHES_AHEAD batches: two windows, and the
    encoded shards under way."""
    return (2 * WINDOW_SHARDS + PREFETCH_THREADS) * shard_bytes


class _BatchFiller:
    """Gathers rows of successive windows into batches of given sizes."""

    def __init__(self, nbytes: int, sizes: Sequence[int]) -> None:
        self._nbytes = nbytes
        self._sizes_left = deque(sizes)
        self._batch: Batch | None = None
        self._filled = 0

    @property
    def is_done(self) -> bool:
        """Whether every batch is full."""
        return not self._sizes_left

    def fill(self, window: Sequence[Shard], rows: np.ndarray) -> Iterator[Batch]:
        """Copies rows of a window, yields every batch that becomes full, and keeps the rest for later.

        Args:
            window: decoded shards.
            rows: int64, row numbers counted through the window, in the order of consumption.
        """
        starts = np.cumsum([0, *(len(shard.labels) for shard in window)])
        taken = 0
        while taken < len(rows) and self._sizes_left:
            if self._batch is None:
                self._batch = _empty_batch(self._sizes_left[0], self._nbytes, window[0].affine)
            count = min(len(rows) - taken, len(self._batch.labels) - self._filled)
            self._copy(window, starts, np.sort(rows[taken : taken + count]))
            taken += count
            if self._filled == len(self._batch.labels):
                yield self._finish()

    def _copy(self, window: Sequence[Shard], starts: np.ndarray, rows: np.ndarray) -> None:
        cuts = np.searchsorted(rows, starts)
        for shard, first, start, stop in zip(window, starts[:-1], cuts[:-1], cuts[1:], strict=True):
            if start < stop:
                self._take(shard, rows[start:stop] - first)

    def _take(self, shard: Shard, rows: np.ndarray) -> None:
        batch, start = self._batch, self._filled
        stop = start + len(rows)
        _take_rows(shard.pieces, rows, batch.tensors[start:stop])
        # mode="clip" writes straight into `out`; the default mode would gather into a temporary first
        np.take(shard.labels, rows, out=batch.labels[start:stop], mode="clip")
        np.take(shard.sample_ids, rows, out=batch.sample_ids[start:stop], mode="clip")
        self._filled = stop

    def _finish(self) -> Batch:
        batch, self._batch = self._batch, None
        self._sizes_left.popleft()
        self._filled = 0
        return batch


def _take_rows(pieces: Sequence[np.ndarray], rows: np.ndarray, out: np.ndarray) -> None:
    """Copies rows, in ascending order and counted through all pieces."""
    starts = np.cumsum([0, *(len(piece) for piece in pieces)])
    cuts = np.searchsorted(rows, starts)
    for piece, first, start, stop in zip(pieces, starts[:-1], cuts[:-1], cuts[1:], strict=True):
        if start < stop:
            np.take(piece, rows[start:stop] - first, axis=0, out=out[start:stop], mode="clip")


def _row_order(window: Sequence[Shard], random: np.random.Generator | None) -> np.ndarray:
    num_rows = sum(len(shard.labels) for shard in window)
    return np.arange(num_rows) if random is None else random.permutation(num_rows)


def _empty_batch(num_rows: int, nbytes: int, affine: Affine | None) -> Batch:
    memory = np.empty(num_rows * nbytes + _ALIGNMENT_BYTES, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT_BYTES
    tensors = memory[start : start + num_rows * nbytes].reshape(num_rows, nbytes)
    labels, sample_ids = np.empty(num_rows, np.int64), np.empty(num_rows, np.int64)
    return Batch(tensors=tensors, labels=labels, sample_ids=sample_ids, affine=affine)
