"""Batches gathered from decoded shards: which rows go into which, and the memory that they are copied to.

Every row is copied once, from the decoded shard into its batch; that may happen in another thread, some batches after
it was planned. Knows nothing of the order of rows, of stores, nor of what the bytes mean. Entry class: `BatchFiller`.
"""

import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from nf_pipeline.storage.affine import Affine
from nf_pipeline.storage.label_column import new_labels
from nf_pipeline.storage.shards import Shard, TensorSpec

_ALIGNMENT_BYTES = 64


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Samples that own their memory: it is used for another batch once nothing refers to it any more.

    Attributes:
        tensors: uint8 [N, nbytes], contiguous and aligned to 64 bytes, so that it views as any dtype.
        samples: the same of the samples stored beside them, None where there are none.
        labels: int64 [N], or float32 [N, K].
        sample_ids: int64 [N].
        affine: what the bytes stand for, see `TensorSpec`.
    """

    tensors: np.ndarray
    labels: np.ndarray
    sample_ids: np.ndarray
    affine: Affine | None
    samples: np.ndarray | None = None


Gather = Callable[[], Batch]
"""Copies the rows of one batch."""


class BatchFiller:
    """Divides the rows of successive windows into batches of given sizes."""

    def __init__(self, memory: "BatchMemory", sizes: Sequence[int]) -> None:
        self._memory = memory
        self._sizes_left = deque(sizes)
        self._batch: Batch | None = None
        self._filled = 0

    @property
    def is_done(self) -> bool:
        """Whether every batch is full."""
        return not self._sizes_left

    def fill(self, window: Sequence[Shard], rows: np.ndarray) -> Iterator[Gather]:
        """Yields every batch that rows of a window complete, still to be copied, and copies the rest for later.

        Args:
            window: decoded shards.
            rows: int64, row numbers counted through the window, in the order of consumption.
        """
        source, taken = _Rows(window), 0
        while taken < len(rows) and self._sizes_left:
            if self._batch is None:
                self._batch = self._memory.batch(self._sizes_left[0], window[0].affine)
            start = self._filled
            chosen = rows[taken : taken + len(self._batch.labels) - start]
            taken, self._filled = taken + len(chosen), start + len(chosen)
            gather = partial(source.copy, chosen, self._batch, start)
            if self._filled < len(self._batch.labels):
                gather()
                continue
            self._batch, self._filled = None, 0
            self._sizes_left.popleft()
            yield gather


class _Rows:
    """All rows of a window, counted through its shards and their pieces."""

    def __init__(self, window: Sequence[Shard]) -> None:
        self._tensors = _Column([piece for shard in window for piece in shard.pieces])
        self._samples = _Column([piece for shard in window for piece in shard.sample_pieces])
        self._labels = np.concatenate([shard.labels for shard in window])
        self._sample_ids = np.concatenate([shard.sample_ids for shard in window])

    def copy(self, rows: np.ndarray, batch: Batch, start: int) -> Batch:
        """Copies rows, in ascending order, into a batch that has `start` rows already, and returns it."""
        rows, stop = np.sort(rows), start + len(rows)
        # mode="clip" writes straight into `out`; the default mode would gather into a temporary first
        self._labels.take(rows, axis=0, out=batch.labels[start:stop], mode="clip")
        self._sample_ids.take(rows, out=batch.sample_ids[start:stop], mode="clip")
        self._tensors.copy(rows, batch.tensors[start:stop])
        if batch.samples is not None:
            self._samples.copy(rows, batch.samples[start:stop])
        return batch


class _Column:
    """One column of a window's tensors, uint8 [rows of a piece, nbytes] each."""

    def __init__(self, pieces: list[np.ndarray]) -> None:
        self._pieces = pieces
        self._starts = np.cumsum([0, *(len(piece) for piece in pieces)])

    def copy(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Copies rows, counted through the pieces and in ascending order, to uint8 [rows, nbytes]."""
        cuts = rows.searchsorted(self._starts).tolist()
        for piece, first, begin, end in zip(self._pieces, self._starts, cuts, cuts[1:], strict=False):
            if begin < end:
                piece.take(rows[begin:end] - first, axis=0, out=out[begin:end], mode="clip")


def _num_references(kept: list[np.ndarray], idx: int) -> int:
    return sys.getrefcount(kept[idx])


_UNUSED = _num_references([np.empty(0)], 0)
"""References to memory that only a list holds: every view of it, numpy's or torch's, would be one more."""


class BatchMemory:
    """Memory of batches, used again and again: fresh memory costs a page fault per page, half of a gather.

    Args:
        batch_size: samples of a batch, at most.
        spec: of every sample.
        num_kept: batches whose memory is kept: what a consumer needs that gives up one batch for the next. Who holds
            more gets fresh memory.
    """

    def __init__(self, batch_size: int, spec: TensorSpec, num_kept: int) -> None:
        self._num_kept = num_kept
        self._widths = [spec.nbytes] if spec.sample is None else [spec.nbytes, spec.sample.nbytes]
        self._num_bytes = sum(batch_size * width + _ALIGNMENT_BYTES for width in self._widths)
        self._label_values = spec.label_values
        self._kept: list[np.ndarray] = []
        self._lock = threading.Lock()

    def batch(self, num_rows: int, affine: Affine | None) -> Batch:
        """Returns a batch whose rows are still to be filled."""
        with self._lock:
            tensors, *samples = self._columns(self._free(), num_rows)
        labels, sample_ids = new_labels(num_rows, self._label_values), np.empty(num_rows, np.int64)
        samples = samples[0] if samples else None
        return Batch(tensors=tensors, labels=labels, sample_ids=sample_ids, affine=affine, samples=samples)

    def _columns(self, memory: np.ndarray, num_rows: int) -> list[np.ndarray]:
        columns = []
        for width in self._widths:
            memory = memory[-memory.ctypes.data % _ALIGNMENT_BYTES :]
            columns.append(memory[: num_rows * width].reshape(num_rows, width))
            memory = memory[num_rows * width :]
        return columns

    def _free(self) -> np.ndarray:
        for idx in range(len(self._kept)):
            if _num_references(self._kept, idx) == _UNUSED:
                return self._kept[idx]
        memory = np.empty(self._num_bytes, np.uint8)
        if len(self._kept) < self._num_kept:
            self._kept.append(memory)
        return memory
