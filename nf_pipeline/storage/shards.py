"""Tensors as Parquet objects that any Parquet reader opens and that decode with one memcpy.

A shard has three non-null columns: `tensor` (FixedSizeBinary, one value per sample; dtype and shape stand in
the field's metadata, and for numbers stored as bytes the scale and zero point of every channel), `sample_id` (int64)
and `label` (int64 for classes, fixed-size bytes for values: see `label_column`). A list or tensor column would read
8 times slower (https://github.com/apache/arrow/issues/34510), and so would a dictionary. Without a codec the tensors
are not even decoded: a reader takes rows straight out of the file. One shard is one buffer and one put: nothing
half-written can appear under a shard's key, and no shard counts until a manifest names it.

Deliberately knows nothing of what the tensors mean, nor of torch. Entry points: `ShardWriter`, `read_shard`.
"""

import json
import math
import queue
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nf_pipeline.documents import read_fields
from nf_pipeline.dtypes import ITEM_BYTES
from nf_pipeline.errors import ConfigError, InternalError, ObjectCorrupt, ObjectMissing, StorageError
from nf_pipeline.storage.affine import Affine
from nf_pipeline.storage.label_column import (
    DTYPE_KEY,
    SHAPE_KEY,
    bytes_of,
    label_array,
    label_bytes,
    label_field,
    label_form,
    labels_of,
    new_labels,
)
from nf_pipeline.storage.sealed import repair_fix
from nf_pipeline.storage.store import Data, Store, checksum_of

CODECS = ("none", "zstd", "lz4")

ROW_GROUP_BYTES = 8 * 2**20
UPLOAD_THREADS = 2
RELEASED_FIX = "train another --run with --keep activations=all"

MAX_SHARD_BYTES = 2**31 - 1
"""Tensor bytes of one shard: what a column of fixed size can count. Configurations allow a GiB."""
MAX_LABEL_VALUES = 2**20
"""Values of one label."""
MAX_EXPANSION = 2**14
"""Rows per stored byte; a row of two numbers and a tensor compresses to a fraction of a byte at best."""

# How the header of a data page begins, in Thrift's compact form: type 0, then the size of what follows it.
_PAGE_START = b"\x15\x00\x15"

_SCALES_KEY = b"scales"
_ZERO_POINTS_KEY = b"zero_points"


@dataclass(frozen=True)
class TensorSpec:
    """What one sample's tensor looks like.

    Attributes:
        dtype: one of `ITEM_BYTES`; "bfloat16", which numpy and Arrow lack, is bytes with a name.
        shape: of one sample, such as (C, H, W).
        codec: Parquet compression: "none", "zstd" (level 1) or "lz4".
        affine: what the bytes of uint8 stand for, a scale and a zero point for each of `shape[0]` channels; None
            where they are numbers as they are, such as pixels, and for all other types.
        label_values: float32 values of each sample's label; 0: labels are classes, int64.
    """

    dtype: str
    shape: tuple[int, ...]
    codec: str = "none"
    affine: Affine | None = None
    label_values: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_BYTES:
            raise ConfigError(f"tensor dtype: got {self.dtype!r}, want one of {', '.join(ITEM_BYTES)}")
        if self.codec not in CODECS:
            raise ConfigError(f"codec: got {self.codec!r}, want one of {', '.join(CODECS)}")
        if not self.shape or not all(isinstance(size, int) and size > 0 for size in self.shape):
            raise ConfigError(f"tensor shape: got {self.shape!r}, want one or more positive sizes")
        if self.nbytes > MAX_SHARD_BYTES:
            raise ConfigError(f"tensor shape: got {self.shape!r}, want at most {MAX_SHARD_BYTES} bytes per sample")
        if self.affine is not None and (self.dtype, len(self.affine.scales)) != ("uint8", self.shape[0]):
            what = f"{len(self.affine.scales)} scales for {self.dtype} of shape {self.shape!r}"
            raise ConfigError(f"tensor affine: got {what}, want one per channel of uint8")
        if not 0 <= self.label_values <= MAX_LABEL_VALUES:
            raise ConfigError(f"values per label: got {self.label_values}, want 0 to {MAX_LABEL_VALUES}")

    @property
    def nbytes(self) -> int:
        """Bytes of one sample, uncompressed."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    @property
    def row_bytes(self) -> int:
        """Bytes of one sample with its label and number."""
        return self.nbytes + label_bytes(self.label_values) + 8


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """What a manifest says of one shard.

    Attributes:
        key: relative to the store; "" once the object was given up because its readers are done.
        num_bytes: of the object.
        num_rows: samples in it.
        checksum: "sha256:..." of the object.
    """

    key: str
    num_bytes: int
    num_rows: int
    checksum: str

    @property
    def is_released(self) -> bool:
        """Whether the object was given up: it is not missing, nobody may ask for it."""
        return not self.key


def read_shard_info(document: Any) -> ShardInfo:
    """Reads a shard's description that somebody else wrote.

    Raises:
        ValueError: a field is missing, unknown, of another type or out of range.
    """
    shard = read_fields(ShardInfo, document)
    if not (0 <= shard.num_bytes < 2**63 and 1 <= shard.num_rows <= max(1, shard.num_bytes) * MAX_EXPANSION):
        raise ValueError(f"num_rows, num_bytes: got {shard.num_rows} rows in {shard.num_bytes} bytes")
    return shard


@dataclass(frozen=True, kw_only=True, eq=False)
class Shard:
    """A decoded shard.

    Attributes:
        affine: what its bytes stand for, as the file itself says; see `TensorSpec`.
        pieces: uint8 [rows of a row group, nbytes] each, in order; read-only views of the file where it holds the
            tensors as they are, of the decoded buffer otherwise.
        labels: int64 [rows], or float32 [rows, K].
        sample_ids: int64 [rows].
    """

    pieces: tuple[np.ndarray, ...]
    labels: np.ndarray
    sample_ids: np.ndarray
    affine: Affine | None = None

    @property
    def tensors(self) -> np.ndarray:
        """All rows, uint8 [rows, nbytes]: a copy where there are several pieces."""
        return self.pieces[0] if len(self.pieces) == 1 else np.concatenate(self.pieces)

    def cut(self, rows: range) -> "Shard":
        """Returns views of consecutive rows."""
        starts = np.cumsum([0, *(len(piece) for piece in self.pieces)])
        bounds = [(rows.start - start, rows.stop - start) for start in starts[:-1]]
        pieces = [piece[max(0, a) : max(0, b)] for piece, (a, b) in zip(self.pieces, bounds, strict=True)]
        chosen = slice(rows.start, rows.stop)
        return Shard(
            pieces=tuple(piece for piece in pieces if len(piece)),
            labels=self.labels[chosen],
            sample_ids=self.sample_ids[chosen],
            affine=self.affine,
        )


def rows_per_shard(spec: TensorSpec, shard_bytes: int) -> int:
    """Returns how many samples a full shard holds, at least one.

    Args:
        spec: of every sample.
        shard_bytes: tensor bytes per shard, or those of values to predict where they take more.
    """
    values_bytes = label_bytes(spec.label_values) if spec.label_values else 0
    return max(1, shard_bytes // max(spec.nbytes, values_bytes))


def writer_bytes(shard_bytes: int) -> int:
    """Returns what a `ShardWriter` holds of its host's memory at most: full buffers, each with its encoded shard."""
    return 2 * (UPLOAD_THREADS + 1) * shard_bytes


def tensor_field(spec: TensorSpec) -> pa.Field:
    """Returns the Parquet field of such tensors, from which `spec_of_field` reads their form back."""
    metadata = {DTYPE_KEY: spec.dtype.encode(), SHAPE_KEY: json.dumps(list(spec.shape)).encode()}
    if spec.affine is not None:
        metadata[_SCALES_KEY] = json.dumps(spec.affine.scales).encode()
        metadata[_ZERO_POINTS_KEY] = json.dumps(spec.affine.zero_points).encode()
    return pa.field("tensor", pa.binary(spec.nbytes), nullable=False, metadata=metadata)


def shard_schema(spec: TensorSpec) -> pa.Schema:
    """Returns the Parquet schema of shards with such tensors."""
    return pa.schema(
        [
            tensor_field(spec),
            pa.field("sample_id", pa.int64(), nullable=False),
            label_field(spec.label_values),
        ]
    )


def spec_of_field(field: pa.Field) -> TensorSpec | None:
    """Reads type, shape and scales back from a column's metadata; None if it is no tensor column of this form."""
    metadata = field.metadata or {}
    if not pa.types.is_fixed_size_binary(field.type) or not {DTYPE_KEY, SHAPE_KEY} <= metadata.keys():
        return None
    try:
        shape = tuple(json.loads(metadata[SHAPE_KEY]))
        spec = TensorSpec(metadata[DTYPE_KEY].decode(), shape, affine=_affine_of(metadata))
    except (ValueError, TypeError, RecursionError, ConfigError):
        return None
    return spec if spec.nbytes == field.type.byte_width else None


def _affine_of(metadata: Mapping[bytes, bytes]) -> Affine | None:
    if _SCALES_KEY not in metadata:
        return None
    return Affine(tuple(json.loads(metadata[_SCALES_KEY])), tuple(json.loads(metadata.get(_ZERO_POINTS_KEY, b"[]"))))


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
        shard_bytes: tensor bytes per shard; a shard holds at least one sample.
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

    def append(self, tensors: np.ndarray, labels: np.ndarray, sample_ids: np.ndarray) -> None:
        """Adds samples; blocks while all buffers wait for their upload.

        Args:
            tensors: uint8 [N, nbytes], the bytes of each sample.
            labels: int64 [N], or float32 [N, K] as `spec` says.
            sample_ids: int64 [N].

        Raises:
            StorageError: an earlier shard could not be uploaded; the writer is then finished.
        """
        self._check(tensors, labels, sample_ids)
        start = 0
        while start < len(tensors):
            if self._open is None:
                self._open = self._take_buffer()
            taken = self._open.fill(tensors[start:], labels[start:], sample_ids[start:])
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

    def _check(self, tensors: np.ndarray, labels: np.ndarray, sample_ids: np.ndarray) -> None:
        if self._has_ended:
            raise InternalError("append after the writer was closed or cancelled")
        want = (len(tensors), self._spec.nbytes)
        if tensors.dtype != np.uint8 or tensors.shape != want:
            raise InternalError(f"tensors: got {tensors.dtype} {tensors.shape}, want uint8 {want}")
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
        self._tensors = np.empty((max_rows, spec.nbytes), np.uint8)
        self._labels = new_labels(max_rows, spec.label_values)
        self._sample_ids = np.empty(max_rows, np.int64)
        # Incompressible data grows by less than 1/64 under zstd and lz4; pages never touched take no memory.
        self._encoded = np.empty(max_rows * spec.row_bytes * 17 // 16 + 2**20, np.uint8)

    def fill(self, tensors: np.ndarray, labels: np.ndarray, sample_ids: np.ndarray) -> int:
        """Copies as many rows as there is room for and returns their number."""
        start = self.num_rows
        stop = min(start + len(tensors), len(self._tensors))
        taken = stop - start
        self._tensors[start:stop] = tensors[:taken]
        self._labels[start:stop] = labels[:taken]
        self._sample_ids[start:stop] = sample_ids[:taken]
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
        tensors = pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(self._spec.nbytes), rows, [None, pa.py_buffer(self._tensors)]
        )
        columns = [tensors, pa.array(self._sample_ids[:rows]), label_array(self._labels[:rows])]
        return pa.table(columns, schema=shard_schema(self._spec))


def read_shard(store: Store, shard: ShardInfo, spec: TensorSpec, *, is_verified: bool = False) -> Shard:
    """Fetches, verifies and decodes one shard.

    The page checksums in the file are for other readers: the checksum of the object covers them.

    Args:
        store: where it is.
        shard: what the manifest says.
        spec: of its tensors.
        is_verified: whether this process has read the object before: its checksum, which takes most of the time, is
            not compared again.

    Raises:
        ObjectMissing: it is not there, or it was released.
        ObjectCorrupt: size, checksum, rows or tensor type are not what the manifest says.
    """
    data = _fetch(store, shard, is_verified)
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        affine = _check_header(store, shard, spec, file.schema_arrow, file.metadata.num_rows)
        pieces = _plain_rows(data, file.metadata, spec.nbytes)
        table = file.read(columns=["sample_id", "label"] if pieces else None, use_threads=False)
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        # ValueError: names that are no UTF-8. MemoryError: a page that claims to be larger than memory.
        raise _corrupt(store, shard, f"no Parquet file: {error}") from error
    _require(store, shard, "rows", table.num_rows, shard.num_rows)
    nulls = sum(column.null_count for column in table.columns)
    _require(store, shard, "nulls", nulls, 0)
    return Shard(
        pieces=pieces or (bytes_of(table.column("tensor")),),
        labels=labels_of(table.column("label")),
        sample_ids=table.column("sample_id").to_numpy(),
        affine=affine,
    )


def _fetch(store: Store, shard: ShardInfo, is_verified: bool) -> Data:
    if shard.is_released:
        what = f"a shard of {shard.num_rows} rows was released: the policy keeps activations only until they are read"
        raise ObjectMissing(what, store.uri, RELEASED_FIX)
    try:
        data = store.view(shard.key) if is_verified else store.get(shard.key)
    except ObjectMissing as error:
        raise ObjectMissing(error.what, store.uri, repair_fix(store, shard.key)) from None
    _require(store, shard, "bytes", len(data), shard.num_bytes)
    if not is_verified:
        _require(store, shard, "checksum", checksum_of(data), shard.checksum)
    return data


def _check_header(
    store: Store, shard: ShardInfo, spec: TensorSpec, schema: pa.Schema, num_rows: int
) -> Affine | None:
    """Compares what the footer says with the manifest before any page is decoded; returns its scales.

    Before there is a manifest nobody knows the scales: then the footer alone says them.
    """
    _require(store, shard, "rows", num_rows, shard.num_rows)
    if num_rows * spec.nbytes > MAX_SHARD_BYTES:
        raise _corrupt(store, shard, f"{num_rows} rows of {spec.nbytes} bytes, want at most {MAX_SHARD_BYTES} bytes")
    if not schema.equals(shard_schema(spec), check_metadata=False):
        raise _corrupt(store, shard, f"columns {_columns(schema)}, want {_columns(shard_schema(spec))}")
    stored = spec_of_field(schema.field("tensor"))
    got = (stored.dtype, stored.shape) if stored else None
    _require(store, shard, "tensor type", got, (spec.dtype, spec.shape))
    if spec.affine is not None and stored.affine != spec.affine:
        raise _corrupt(store, shard, "its scales are not those of the manifest")
    return stored.affine


def _plain_rows(data: Data, metadata: pq.FileMetaData, nbytes: int) -> tuple[np.ndarray, ...]:
    """Finds the tensors as they stand in the file, one piece per row group; empty if they have to be decoded."""
    flat = np.frombuffer(data, np.uint8)
    groups = [metadata.row_group(idx) for idx in range(metadata.num_row_groups)]
    pages = [_plain_page(flat, group.column(0), group.num_rows * nbytes) for group in groups]
    is_whole = sum(group.num_rows for group in groups) == metadata.num_rows and all(page.size for page in pages)
    return tuple(page.reshape(-1, nbytes) for page in pages) if is_whole else ()


def _plain_page(flat: np.ndarray, chunk: pq.ColumnChunkMetaData, size: int) -> np.ndarray:
    """Returns the values of a column chunk that is one page of nothing but `size` bytes of values, else nothing."""
    start, stop = chunk.data_page_offset, chunk.data_page_offset + chunk.total_compressed_size
    is_plain = chunk.compression == "UNCOMPRESSED" and set(chunk.encodings) <= {"PLAIN", "RLE"}
    if chunk.has_dictionary_page or not is_plain or not 0 <= start < stop - size < stop <= len(flat):
        return flat[:0]
    header = _PAGE_START + _varint(2 * size)
    return flat[stop - size : stop] if flat[start : start + len(header)].tobytes() == header else flat[:0]


def _varint(number: int) -> bytes:
    """Encodes a number as Thrift's compact protocol does: seven bits a byte, the lowest first."""
    digits = []
    while number > 127:
        digits.append(number & 127 | 128)
        number >>= 7
    return bytes([*digits, number])


def _require(store: Store, shard: ShardInfo, what: str, got: object, want: object) -> None:
    if got != want:
        raise _corrupt(store, shard, f"{what}: got {got}, want {want}")


def _corrupt(store: Store, shard: ShardInfo, problem: str) -> ObjectCorrupt:
    return ObjectCorrupt(f"shard {shard.key} is damaged: {problem}", store.uri, repair_fix(store, shard.key))


def _columns(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} {field.type}" for field in schema)
