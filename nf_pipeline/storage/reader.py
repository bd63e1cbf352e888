"""Batches from shards, shuffled by seed and epoch, while the next shards are fetched in the background.

The shards of an epoch are put in random order and cut into windows; all rows of a window are shuffled
together. While one window is consumed, threads fetch and decode the next, and others gather the next
batches, as soon as an epoch is asked for. A shard's checksum is compared when a reader sees it for the first
time; in later epochs its size and form are. The result depends on (seed, epoch) and the part only, never on
timing. Deliberately knows nothing of torch: a batch is bytes; nor of how shards that are still being written
are waited for: that is a `ShardList`'s work. Entry class: `ShardReader`.
"""

import copy
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from nf_pipeline.errors import ObjectCorrupt, StorageError
from nf_pipeline.storage.gather import Batch, BatchFiller, BatchMemory, Gather
from nf_pipeline.storage.parts import WHOLE, Part, divide_rows, step_sizes
from nf_pipeline.storage.sealed import repair_fix
from nf_pipeline.storage.shards import Shard, ShardInfo, TensorSpec, read_shard
from nf_pipeline.storage.store import Store

STORED_TIMEOUT_S = 300.0
WINDOW_SHARDS = 4
PREFETCH_THREADS = 2
GATHER_THREADS = 2
BATCHES_AHEAD = GATHER_THREADS + 1
"""One is ready or queued while each thread works on another, so that none waits for the consumer to ask."""
_KEPT_BATCHES = BATCHES_AHEAD + 2  # one that the consumer has, one that the next window completes


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
    `prefetch_threads` shards that are being decoded), BATCHES_AHEAD batches that nobody has taken yet, and the memory
    of two more, however large the split is. Every row is copied once, from the decoded shard into its batch.

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
        self._store = store
        self._open(shards)
        self._spec = spec
        self._batch_size = batch_size
        self._part = part
        self._window_shards = window_shards
        self._prefetch_threads = prefetch_threads
        self._memory = BatchMemory(batch_size, spec, _KEPT_BATCHES)

    def _open(self, shards: Sequence[ShardInfo] | ShardList) -> None:
        self.wait_s = 0.0
        grows = not isinstance(shards, Sequence)
        self._shards: ShardList = shards if grows else _StoredShards(shards)
        self._default_timeout_s = None if grows else STORED_TIMEOUT_S
        self._verified: set[int] = set()  # shards whose checksum was right when they were read first

    def beside(self, shards: Sequence[ShardInfo] | ShardList) -> "ShardReader":
        """Returns a reader of other shards with the same rows, which makes its batches in the memory of this one's.

        It is enough where no two epochs are read at the same time; otherwise batches get memory of their own.
        """
        other = copy.copy(self)
        other._open(shards)
        return other

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
        make: Callable[[Batch], Any] = lambda batch: batch,
    ) -> Generator[Any, None, None]:
        """Yields one epoch of the part, every row exactly once (for the exceptions see `divide_rows`).

        The first batches are gathered from this call on, whether or not anybody takes them yet. The epoch ends, and
        its threads with it, when it is exhausted, closed or given up.

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
            make: what to yield for a batch; runs in the threads that gather, for several batches at once.

        Raises:
            ObjectMissing, ObjectCorrupt: a shard is not what the manifest says.
            StorageError: the store failed, or sent nothing within the time.
            Exception: whatever a `ShardList` or `make` raised.
        """
        ended, copying = threading.Event(), _Copying()
        planned = self._planned(
            np.random.default_rng([seed, epoch]) if shuffle else None,
            self._batch_sizes(even),
            copying,
            shuffle_shards=shuffle_shards,
            timeout_s=timeout_s or self._default_timeout_s,
            ended=ended,
        )
        batches = self._gathered(_Line(planned, copying, make), ended)
        next(batches)  # starts the threads; nothing is yielded yet
        return batches

    def _gathered(self, line: "_Line", ended: threading.Event) -> Generator[Any, None, None]:
        ahead = deque(line.submit() for _ in range(BATCHES_AHEAD))
        try:
            yield
            while made := self._awaited(ahead.popleft()):
                ahead.append(line.submit())
                yield made.pop()  # no name here may keep a batch alive that its consumer is done with
        finally:
            ended.set()
            self._shards.close()
            line.close()

    def _awaited(self, batch: Future[Any]) -> list[Any]:
        """Returns a list of one batch, which is empty after the last."""
        start = time.perf_counter()
        try:
            made = batch.result()
            return [] if made is None else [made]
        finally:
            self.wait_s += time.perf_counter() - start

    def _planned(
        self,
        random: np.random.Generator | None,
        sizes: list[int],
        copying: "_Copying",
        *,
        shuffle_shards: bool,
        timeout_s: float | None,
        ended: threading.Event,
    ) -> Iterator[Gather]:
        windows = self._windows(random if shuffle_shards else None)
        pool = ThreadPoolExecutor(self._prefetch_threads, thread_name_prefix="shard-reader")
        hangs = False
        try:
            filler = BatchFiller(self._memory, sizes)
            for window in self._fetched(pool, windows, timeout_s, ended):
                yield from filler.fill(window, _row_order(window, random))
                copying.wait()
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
        # Two windows at most: the one after the next is asked for when this one has been consumed, so that no thread
        # idles while the last shards of the next one come.
        fetched = deque(self._fetch(pool, window, ended) for window in windows[:2])
        for following in [*windows[2:], (), ()]:
            if fetched:
                yield self._wait(fetched.popleft(), timeout_s)
            if following:
                fetched.append(self._fetch(pool, following, ended))

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
    """Returns what one epoch of a reader holds of its host's memory at most, but for BATCHES_AHEAD + 2 batches: two
    windows, and the encoded shards under way."""
    return (2 * WINDOW_SHARDS + PREFETCH_THREADS) * shard_bytes


class _Copying:
    """Counts the batches that are being copied."""

    def __init__(self) -> None:
        self._free = threading.Semaphore(GATHER_THREADS)

    def begin(self) -> None:
        """One more."""
        self._free.acquire()

    def end(self) -> None:
        """One less, and what it copied from is not held any more."""
        self._free.release()

    def wait(self) -> None:
        """Returns once there is none; nobody may begin one meanwhile."""
        for _ in range(GATHER_THREADS):
            self._free.acquire()
        self._free.release(GATHER_THREADS)


class _Line:
    """Threads that make the batches of one epoch: planned one after the other, copied at the same time.

    A task never waits for room, only for shards and for the task before it, so nothing has to wake it in the end.
    """

    def __init__(self, planned: Iterator[Gather], copying: _Copying, make: Callable[[Batch], Any]) -> None:
        self._planned = planned
        self._copying = copying
        self._make = make
        self._threads = ThreadPoolExecutor(GATHER_THREADS, thread_name_prefix="shard-reader-batch")
        self._turn = threading.Lock()

    def submit(self) -> Future[Any]:
        """Asks for one more batch; gives None after the last."""
        mine, self._turn = self._turn, threading.Lock()
        self._turn.acquire()
        return self._threads.submit(self._next, mine, self._turn)

    def close(self) -> None:
        """Waits for the batches under way and drops the others."""
        self._threads.shutdown(cancel_futures=True)
        self._planned.close()

    def _next(self, mine: threading.Lock, following: threading.Lock) -> Any:
        mine.acquire()  # tasks begin in order, so the one before has begun
        try:
            gather = next(self._planned, None)
            if gather is None:
                return None
            self._copying.begin()
        finally:
            following.release()
        try:
            batch = gather()
        finally:
            del gather
            self._copying.end()
        return self._make(batch)


def _row_order(window: Sequence[Shard], random: np.random.Generator | None) -> np.ndarray:
    num_rows = sum(len(shard.labels) for shard in window)
    return np.arange(num_rows) if random is None else random.permutation(num_rows)
