"""Cuts a stream of samples into shards and puts them in a store while the stream goes on.

One shard is one buffer and one put: nothing half-written can appear under a shard's key, and no shard counts until a
manifest names it. What a shard looks like stands in `storage.shards`; who names it and when is not known here. Entry
class: `ShardWriter`.
"""

import queue
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nf_pipeline.errors import InternalError, StorageError
from nf_pipeline.storage.label_column import label_array, label_form, new_labels
from nf_pipeline.storage.shards import MAX_SHARD_BYTES, ShardInfo, TensorSpec, rows_per_shard, shard_schema
from nf_pipeline.storage.store import Store, checksum_of

ROW_GROUP_BYTES = 8 * 2**20
UPLOAD_THREADS = 2


def writer_bytes(shard_bytes: int) -> int:
    """Returns what a `ShardWriter` holds of its host's memory at most: full buffers, each with its encoded shard."""
    return 2 * (UPLOAD_THREADS + 1) * shard_bytes


class ShardWriter:
    """Cuts a stream of samples into shards and uploads them in the background.

    Rows are copied once into the buffer of the open shard; full buffers are encoded, hashed and put by
    `upload_threads` threads, then used again (fresh memory of this size costs a page fault per page).

    Invariants: at most `upload_threads` + 1 buffers of `shard_bytes` and as many encoded shards exist (S3
    takes one more copy of those under way). After an exception inside the `with` block nothing more is put.

    Args:
        store: where the shards go.
        make_key: shard index (0, 1, ...) -> key; keys must be this attempt's own.
        spec: of every sample.
        shard_bytes: tensor bytes per shard, of both tensors where there are two; a shard holds at least one sample.
        upload_threads: shards encoded and uploaded at the same time.
        timeout_s: longest wait for one upload.
        on_stored: called with a shard's index and description as soon as it is stored, in an upload thread.
    """

    def __init__(
        self,
        store: Store,
        make_key: Callable[[int], str],
        spec: TensorSpec,
        shard_bytes: int,
        upload_threads: int = UPLOAD_THREADS,
        *,
        timeout_s: float = 600.0,
        on_stored: Callable[[int, ShardInfo], None] | None = None,
    ) -> None:
        self._store = store
        self._make_key = make_key
        self._on_stored = on_stored
        self._spec = spec
        self._timeout_s = timeout_s
        self._rows_per_shard = rows_per_shard(spec, shard_bytes)
        self._pool = ThreadPoolExecutor(upload_threads, thread_name_prefix="shard-writer")
        self._spare: queue.Queue[_ShardBuffer] = queue.Queue()
        self._unmade_buffers = upload_threads + 1
        self._open: _ShardBuffer | None = None
        self._uploads: list[Future[ShardInfo]] = []
        self._unseen: list[Future[ShardInfo]] = []  # a few: looked at with every append
        self._infos: list[ShardInfo] | None = None
        self._has_ended = False
        self._hangs = False

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self.cancel()

    @property
    def num_rows(self) -> int:
        """Samples appended so far."""
        open_rows = self._open.num_rows if self._open else 0
        return len(self._uploads) * self._rows_per_shard + open_rows

    def append(
        self, tensors: np.ndarray, labels: np.ndarray, sample_ids: np.ndarray, samples: np.ndarray | None = None
    ) -> None:
        """Adds samples; blocks while all buffers wait for their upload.

        Args:
            tensors: uint8 [N, nbytes], the bytes of each sample.
            labels: int64 [N], or float32 [N, K] as `spec` says.
            sample_ids: int64 [N].
            samples: uint8 [N, spec.sample.nbytes], what is stored beside the tensors; None without `spec.sample`.

        Raises:
            StorageError: an earlier shard could not be uploaded; the writer is then finished.
        """
        self._check(tensors, labels, sample_ids, samples)
        columns = [tensors, sample_ids, labels, *([] if samples is None else [samples])]  # as `shard_schema` has them
        start = 0
        while start < len(tensors):
            if self._open is None:
                self._open = self._take_buffer()
            taken = self._open.fill([column[start:] for column in columns])
            start += taken
            if self._open.num_rows == self._rows_per_shard:
                self._upload_open()

    def close(self) -> list[ShardInfo]:
        """Uploads what is left, waits for it and returns all shards in order; may be called again."""
        if self._infos is None:
            if self._open is not None:
                self._upload_open()
            self._has_ended = True
            self._infos = [self._finished(upload) for upload in self._uploads]
            self._pool.shutdown()
        return self._infos

    def cancel(self) -> None:
        """Drops everything that is not being uploaded at this moment, and waits for that."""
        self._has_ended = True
        self._open = None
        self._pool.shutdown(wait=not self._hangs, cancel_futures=True)

    def _check(
        self, tensors: np.ndarray, labels: np.ndarray, sample_ids: np.ndarray, samples: np.ndarray | None
    ) -> None:
        if self._has_ended:
            raise InternalError("append after the writer was closed or cancelled")
        beside = self._spec.sample
        if (samples is None) != (beside is None):
            raise InternalError(f"samples: got {'none' if samples is None else 'some'}, want {beside}")
        _check_bytes("tensors", tensors, (len(tensors), self._spec.nbytes))
        if samples is not None:
            _check_bytes("samples", samples, (len(tensors), beside.nbytes))
        for name, column, num_values in (
            ("labels", labels, self._spec.label_values),
            ("sample_ids", sample_ids, 0),
        ):
            dtype, shape = label_form(len(tensors), num_values)
            if column.dtype != dtype or column.shape != shape:
                raise InternalError(f"{name}: got {column.dtype} {column.shape}, want {dtype.__name__} {shape}")
        self._raise_failed()

    def _raise_failed(self) -> None:
        ended = [upload for upload in self._unseen if upload.done()]
        self._unseen = [upload for upload in self._unseen if upload not in ended]
        for upload in ended:
            self._finished(upload)

    def _take_buffer(self) -> "_ShardBuffer":
        if self._unmade_buffers:
            self._unmade_buffers -= 1
            return _ShardBuffer(self._rows_per_shard, self._spec)
        try:
            buffer = self._spare.get(timeout=self._timeout_s)
        except queue.Empty:
            raise self._hung() from None
        self._raise_failed()
        return buffer

    def _upload_open(self) -> None:
        buffer, self._open = self._open, None
        upload = self._pool.submit(self._upload, len(self._uploads), buffer)
        self._uploads.append(upload)
        self._unseen.append(upload)

    def _upload(self, shard_idx: int, buffer: "_ShardBuffer") -> ShardInfo:
        key = self._make_key(shard_idx)
        try:
            encoded = buffer.encode()
            self._store.put(key, encoded)
            rows, checksum = buffer.num_rows, checksum_of(encoded)
            shard = ShardInfo(key=key, num_bytes=len(encoded), num_rows=rows, checksum=checksum)
        finally:
            buffer.num_rows = 0
            self._spare.put(buffer)
        if self._on_stored is not None:
            self._on_stored(shard_idx, shard)
        return shard

    def _finished(self, upload: Future[ShardInfo]) -> ShardInfo:
        if upload.cancelled():
            raise InternalError("the writer was cancelled")
        try:
            error = upload.exception(timeout=self._timeout_s)
        except TimeoutError:
            raise self._hung() from None
        if error is not None:
            self.cancel()
            raise error
        return upload.result()

    def _hung(self) -> StorageError:
        self._hangs = True
        self.cancel()
        what = f"no shard was uploaded for {self._timeout_s:.0f} s"
        return StorageError(what, self._store.uri, "check the store, then resume")


class _ShardBuffer:
    """Memory of one shard, before and after encoding."""

    def __init__(self, max_rows: int, spec: TensorSpec) -> None:
        self.num_rows = 0
        self._spec = spec
        self._max_rows = max_rows
        self._columns = [
            np.empty((max_rows, spec.nbytes), np.uint8),
            np.empty(max_rows, np.int64),
            new_labels(max_rows, spec.label_values),
        ]
        if spec.sample is not None:
            self._columns.append(np.empty((max_rows, spec.sample.nbytes), np.uint8))
        # Incompressible data grows by less than 1/64 under zstd and lz4; pages never touched take no memory.
        self._encoded = np.empty(max_rows * spec.row_bytes * 17 // 16 + 2**20, np.uint8)

    def fill(self, columns: Sequence[np.ndarray]) -> int:
        """Copies as many rows as there is room for, of every column of the schema, and returns their number."""
        start = self.num_rows
        stop = min(start + len(columns[0]), self._max_rows)
        taken = stop - start
        for kept, column in zip(self._columns, columns, strict=True):
            kept[start:stop] = column[:taken]
        self.num_rows = stop
        return taken

    def encode(self) -> memoryview:
        """Returns the rows as a Parquet file, a view that is valid until the next call."""
        spec = self._spec
        table = self._table()
        sink = pa.FixedSizeBufferWriter(pa.py_buffer(self._encoded))
        writer = pq.ParquetWriter(
            sink,
            table.schema,
            compression=spec.codec,
            compression_level=1 if spec.codec == "zstd" else None,
            use_dictionary=False,
            # One page per row group: a reader finds all its rows in one piece, where no codec has changed them.
            data_page_size=MAX_SHARD_BYTES,
            max_rows_per_page=MAX_SHARD_BYTES,
            write_statistics=["sample_id"] if spec.label_values else ["sample_id", "label"],
            write_page_checksum=True,
        )
        with writer:
            writer.write_table(table, row_group_size=max(1, ROW_GROUP_BYTES // spec.row_bytes))
        return memoryview(self._encoded)[: sink.tell()]

    def _table(self) -> pa.Table:
        rows = self.num_rows
        tensors, sample_ids, labels, *samples = self._columns
        columns = [_tensor_array(tensors, rows), pa.array(sample_ids[:rows]), label_array(labels[:rows])]
        columns += [_tensor_array(column, rows) for column in samples]
        return pa.table(columns, schema=shard_schema(self._spec))


def _tensor_array(tensors: np.ndarray, num_rows: int) -> pa.Array:
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(tensors.shape[1]), num_rows, [None, pa.py_buffer(tensors)])


def _check_bytes(name: str, got: np.ndarray, want: tuple[int, int]) -> None:
    if got.dtype != np.uint8 or got.shape != want:
        raise InternalError(f"{name}: got {got.dtype} {got.shape}, want uint8 {want}")
