"""Batches from shards, shuffled by seed and epoch, while the next shards are fetched in the background.

The shards of an epoch are put in random order and cut into windows; all rows of a window are shuffled
together. While one window is consumed, threads fetch and decode the next. The result depends on (seed, epoch)
only, never on timing. Deliberately knows nothing of torch: a batch is bytes. Entry class: `ShardReader`.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass

import numpy as np

from nf_pipeline.errors import StorageError
from nf_pipeline.storage.shards import Shard, ShardInfo, TensorSpec, read_shard
from nf_pipeline.storage.store import Store

_ALIGNMENT_BYTES = 64


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Samples that own their memory.

    Attributes:
        tensors: uint8 [N, nbytes], contiguous and aligned to 64 bytes, so that it views as any dtype.
        labels: int64 [N].
        sample_ids: int64 [N].
    """

    tensors: np.ndarray
    labels: np.ndarray
    sample_ids: np.ndarray


def divide_rows(num_rows: int, batch_size: int, *, even: bool) -> list[int]:
    """Returns the size of every batch of an epoch.

    There are ceil(num_rows / batch_size) batches. Even ones differ by one sample at most, so that no step of
    training rests on a few samples, and none on a single one, which batch normalisation refuses. Only pairs
    cannot keep that promise: of an odd number of rows in batches of two the last row is left out.

    Args:
        num_rows: samples of the split.
        batch_size: no batch is larger.
        even: larger batches come first; False gives full batches and a short last one.
    """
    num_batches = -(-num_rows // batch_size)
    if not num_batches:
        return []
    if not even:
        return [batch_size] * (num_batches - 1) + [num_rows - (num_batches - 1) * batch_size]
    if batch_size == 2 and num_rows > 2:
        return [2] * (num_rows // 2)
    size, num_larger = divmod(num_rows, num_batches)
    return [size + 1] * num_larger + [size] * (num_batches - num_larger)


class ShardReader:
    """Reads the shards of one split, as often as there are epochs.

    Invariants: at most two windows of decoded shards are in memory (plus the encoded bytes of the
    `prefetch_threads` shards that are being decoded), however large the split is. Every row is copied once,
    from the decoded shard into its batch.

    Args:
        store: where the shards are.
        shards: as the manifest lists them.
        spec: of their tensors.
        batch_size: samples per batch, at most.
        window_shards: shards whose rows are shuffled together.
        prefetch_threads: shards fetched and decoded at the same time.

    Attributes:
        wait_s: seconds that consumers waited for data, over all epochs so far.
    """

    def __init__(
        self,
        store: Store,
        shards: Sequence[ShardInfo],
        spec: TensorSpec,
        *,
        batch_size: int,
        window_shards: int = 4,
        prefetch_threads: int = 2,
    ) -> None:
        self.wait_s = 0.0
        self._store = store
        self._shards = tuple(shards)
        self._spec = spec
        self._batch_size = batch_size
        self._window_shards = window_shards
        self._prefetch_threads = prefetch_threads

    @property
    def num_rows(self) -> int:
        """Samples of the split."""
        return sum(shard.num_rows for shard in self._shards)

    def num_batches(self, *, even: bool = False) -> int:
        """Batches of one epoch (see `batches`)."""
        return len(divide_rows(self.num_rows, self._batch_size, even=even))

    def batches(
        self, *, seed: int, epoch: int, shuffle: bool, even: bool = False, timeout_s: float = 300.0
    ) -> Iterator[Batch]:
        """Yields one epoch, every row exactly once (for the one exception see `divide_rows`).

        Rows that share a batch come in stored order within it, so that copying them reads memory forwards;
        which rows share a batch is random.

        Args:
            seed: of the run.
            epoch: 0-based; another epoch, another order.
            shuffle: False gives stored order.
            even: batches of about the same size, for training, see `divide_rows`; False gives full batches and
                a short last one.
            timeout_s: longest wait for the next shards.

        Raises:
            ObjectMissing, ObjectCorrupt: a shard is not what the manifest says.
            StorageError: the store failed, or sent nothing within the time.
        """
        random = np.random.default_rng([seed, epoch])
        order = random.permutation(len(self._shards)) if shuffle else np.arange(len(self._shards))
        chosen = [self._shards[shard_idx] for shard_idx in order]
        step = self._window_shards
        windows = [chosen[start : start + step] for start in range(0, len(chosen), step)]
        pool = ThreadPoolExecutor(self._prefetch_threads, thread_name_prefix="shard-reader")
        hangs = False
        try:
            filler = _BatchFiller(self._spec.nbytes, divide_rows(self.num_rows, self._batch_size, even=even))
            for window in self._fetched(pool, windows, timeout_s):
                rows = _row_order(window, random if shuffle else None)
                yield from filler.fill(window, rows)
                window.clear()  # the last reference to these shards: the window after the next comes now
                if filler.is_done:
                    break
        except TimeoutError as error:
            hangs = True
            fix = "check the store and the network, then resume"
            raise StorageError(str(error), self._store.uri, fix) from None
        finally:
            pool.shutdown(wait=not hangs, cancel_futures=True)

    def _fetched(
        self, pool: ThreadPoolExecutor, windows: Sequence[Sequence[ShardInfo]], timeout_s: float
    ) -> Iterator[list[Shard]]:
        pending = self._fetch(pool, windows[0]) if windows else []
        for following in [*windows[1:], ()]:
            window = self._wait(pending, timeout_s)
            pending = self._fetch(pool, following)
            yield window

    def _fetch(self, pool: ThreadPoolExecutor, window: Sequence[ShardInfo]) -> list[Future[Shard]]:
        return [pool.submit(read_shard, self._store, shard, self._spec) for shard in window]

    def _wait(self, pending: list[Future[Shard]], timeout_s: float) -> list[Shard]:
        start = time.perf_counter()
        _, late = wait_for(pending, timeout=timeout_s, return_when="FIRST_EXCEPTION")
        self.wait_s += time.perf_counter() - start
        failed = [fetch for fetch in pending if fetch.done() and fetch.exception() is not None]
        if late and not failed:
            raise TimeoutError(f"{len(late)} of {len(pending)} shards did not arrive within {timeout_s:.0f} s")
        return [fetch.result() for fetch in failed or pending]


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
                self._batch = _empty_batch(self._sizes_left[0], self._nbytes)
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
        # mode="clip" writes straight into `out`; the default mode would gather into a temporary first
        np.take(shard.tensors, rows, axis=0, out=batch.tensors[start:stop], mode="clip")
        np.take(shard.labels, rows, out=batch.labels[start:stop], mode="clip")
        np.take(shard.sample_ids, rows, out=batch.sample_ids[start:stop], mode="clip")
        self._filled = stop

    def _finish(self) -> Batch:
        batch, self._batch = self._batch, None
        self._sizes_left.popleft()
        self._filled = 0
        return batch


def _row_order(window: Sequence[Shard], random: np.random.Generator | None) -> np.ndarray:
    num_rows = sum(len(shard.labels) for shard in window)
    return np.arange(num_rows) if random is None else random.permutation(num_rows)


def _empty_batch(num_rows: int, nbytes: int) -> Batch:
    memory = np.empty(num_rows * nbytes + _ALIGNMENT_BYTES, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT_BYTES
    tensors = memory[start : start + num_rows * nbytes].reshape(num_rows, nbytes)
    return Batch(tensors=tensors, labels=np.empty(num_rows, np.int64), sample_ids=np.empty(num_rows, np.int64))
