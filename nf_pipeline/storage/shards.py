"""Tensors as Parquet objects that any Parquet reader opens and that decode with one memcpy.

A shard has three non-null columns: `tensor` (FixedSizeBinary, one value per sample; dtype and shape stand in
the field's metadata, and for numbers stored as bytes the scale and zero point of every channel), `sample_id` (int64)
and `label` (int64 for classes, fixed-size bytes for values: see `label_column`). Where each row has two tensors, the
second one is a fourth column of the same form, `sample`. A list or tensor column would read 8 times slower
(https://github.com/apache/arrow/issues/34510), and so would a dictionary. Without a codec the tensors are not even
decoded: a reader takes rows straight out of the file.

Deliberately knows nothing of what the tensors mean, nor of torch. Entry points: `TensorSpec`, `read_shard`; to write,
`shard_writer.ShardWriter`.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nf_pipeline.documents import read_fields
from nf_pipeline.dtypes import ITEM_BYTES
from nf_pipeline.errors import ConfigError, ObjectCorrupt, ObjectMissing
from nf_pipeline.storage.affine import Affine
from nf_pipeline.storage.label_column import (
    DTYPE_KEY,
    SHAPE_KEY,
    bytes_of,
    label_bytes,
    label_field,
    labels_of,
)
from nf_pipeline.storage.sealed import repair_fix
from nf_pipeline.storage.store import Data, Store, checksum_of

CODECS = ("none", "zstd", "lz4")

RELEASED_FIX = "train another --run with --keep activations=all"

MAX_SHARD_BYTES = 2**31 - 1
"""Tensor bytes of one shard: what a column of fixed size can count. Configurations allow a GiB."""
MAX_LABEL_VALUES = 2**20
"""Values of one label."""
MAX_EXPANSION = 2**14
"""Rows per stored byte; a row of two numbers and a tensor compresses to a fraction of a byte at best."""

# How the header of a data page begins, in Thrift's compact form: type 0, then the size of its values and
# that of what is stored of them.
_PAGE_START = b"\x15\x00\x15"
_NEXT_NUMBER = b"\x15"

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
        sample: dtype and shape of a second tensor that is stored beside it, with the same codec; None where there is
            none.
    """

    dtype: str
    shape: tuple[int, ...]
    codec: str = "none"
    affine: Affine | None = None
    label_values: int = 0
    sample: "TensorSpec | None" = None

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
        if self.sample is not None and self.sample != TensorSpec(self.sample.dtype, self.sample.shape):
            raise ConfigError(f"tensor sample: got {self.sample}, want dtype and shape alone")

    @property
    def nbytes(self) -> int:
        """Bytes of one sample's tensor, uncompressed; what is stored beside it does not count."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    @property
    def tensor_bytes(self) -> int:
        """Bytes of one row's tensors: `nbytes` and those of what is stored beside it."""
        return self.nbytes + (self.sample.nbytes if self.sample is not None else 0)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row: its tensors, its label and its number."""
        return self.tensor_bytes + label_bytes(self.label_values) + 8


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
        sample_pieces: like `pieces`, of the second tensor of every row; none where there is none. They may be cut at
            other rows.
    """

    pieces: tuple[np.ndarray, ...]
    labels: np.ndarray
    sample_ids: np.ndarray
    affine: Affine | None = None
    sample_pieces: tuple[np.ndarray, ...] = ()

    @property
    def tensors(self) -> np.ndarray:
        """All rows, uint8 [rows, nbytes]: a copy where there are several pieces."""
        return _joined(self.pieces)

    @property
    def samples(self) -> np.ndarray | None:
        """The second tensors of all rows, as `tensors`; None where there are none."""
        return _joined(self.sample_pieces) if self.sample_pieces else None

    def cut(self, rows: range) -> "Shard":
        """Returns views of consecutive rows."""
        chosen = slice(rows.start, rows.stop)
        return Shard(
            pieces=_cut(self.pieces, rows),
            sample_pieces=_cut(self.sample_pieces, rows),
            labels=self.labels[chosen],
            sample_ids=self.sample_ids[chosen],
            affine=self.affine,
        )


def _joined(pieces: Sequence[np.ndarray]) -> np.ndarray:
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def _cut(pieces: Sequence[np.ndarray], rows: range) -> tuple[np.ndarray, ...]:
    starts = np.cumsum([0, *(len(piece) for piece in pieces)])
    cuts = [piece[max(0, rows.start - a) : max(0, rows.stop - a)] for piece, a in zip(pieces, starts, strict=False)]
    return tuple(piece for piece in cuts if len(piece))


def rows_per_shard(spec: TensorSpec, shard_bytes: int) -> int:
    """Returns how many samples a full shard holds, at least one.

    Args:
        spec: of every sample.
        shard_bytes: tensor bytes per shard, or those of values to predict where they take more.
    """
    values_bytes = label_bytes(spec.label_values) if spec.label_values else 0
    return max(1, shard_bytes // max(spec.tensor_bytes, values_bytes))


def tensor_field(spec: TensorSpec) -> pa.Field:
    """Returns the Parquet field of such tensors, from which `spec_of_field` reads their form back."""
    metadata = {DTYPE_KEY: spec.dtype.encode(), SHAPE_KEY: json.dumps(list(spec.shape)).encode()}
    if spec.affine is not None:
        metadata[_SCALES_KEY] = json.dumps(spec.affine.scales).encode()
        metadata[_ZERO_POINTS_KEY] = json.dumps(spec.affine.zero_points).encode()
    return pa.field("tensor", pa.binary(spec.nbytes), nullable=False, metadata=metadata)


def shard_schema(spec: TensorSpec) -> pa.Schema:
    """Returns the Parquet schema of shards with such tensors."""
    fields = [
        tensor_field(spec),
        pa.field("sample_id", pa.int64(), nullable=False),
        label_field(spec.label_values),
    ]
    if spec.sample is not None:
        fields.append(tensor_field(spec.sample).with_name("sample"))
    return pa.schema(fields)


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
        plain = {name: _plain_rows(data, file, name, spec) for name in _tensors(spec)}
        wanted = [name for name in file.schema_arrow.names if not plain.get(name)]
        table = file.read(columns=wanted, use_threads=False)
    except (pa.ArrowException, OSError, ValueError, MemoryError, IndexError) as error:
        # ValueError: names that are no UTF-8. MemoryError: a page that claims to be larger than memory. IndexError: a
        # row group without a column of the schema.
        raise _corrupt(store, shard, f"no Parquet file: {error}") from error
    _require(store, shard, "rows", table.num_rows, shard.num_rows)
    nulls = sum(column.null_count for column in table.columns)
    _require(store, shard, "nulls", nulls, 0)
    pieces = {name: found or (bytes_of(table.column(name)),) for name, found in plain.items()}
    return Shard(
        pieces=pieces["tensor"],
        sample_pieces=pieces.get("sample", ()),
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
    largest = max(tensor.nbytes for tensor in _tensors(spec).values())
    if num_rows * largest > MAX_SHARD_BYTES:
        raise _corrupt(store, shard, f"{num_rows} rows of {largest} bytes, want at most {MAX_SHARD_BYTES} bytes")
    if not schema.equals(shard_schema(spec), check_metadata=False):
        raise _corrupt(store, shard, f"columns {_columns(schema)}, want {_columns(shard_schema(spec))}")
    stored = {name: spec_of_field(schema.field(name)) for name in _tensors(spec)}
    for name, tensor in _tensors(spec).items():
        got = (stored[name].dtype, stored[name].shape) if stored[name] else None
        _require(store, shard, f"{name} type", got, (tensor.dtype, tensor.shape))
    if spec.affine is not None and stored["tensor"].affine != spec.affine:
        raise _corrupt(store, shard, "its scales are not those of the manifest")
    return stored["tensor"].affine


def _tensors(spec: TensorSpec) -> dict[str, TensorSpec]:
    """Returns the columns of tensors by name."""
    return {"tensor": spec} if spec.sample is None else {"tensor": spec, "sample": spec.sample}


def _plain_rows(data: Data, file: pq.ParquetFile, name: str, spec: TensorSpec) -> tuple[np.ndarray, ...]:
    """Finds the tensors as they stand in the file, one piece per row group; empty if they have to be decoded."""
    if spec.codec != "none":
        return ()
    nbytes, column = _tensors(spec)[name].nbytes, file.schema_arrow.get_field_index(name)
    flat, metadata = np.frombuffer(data, np.uint8), file.metadata
    groups = [metadata.row_group(idx) for idx in range(metadata.num_row_groups)]
    pages = [_plain_page(flat, group.column(column), group.num_rows * nbytes) for group in groups]
    is_whole = sum(group.num_rows for group in groups) == metadata.num_rows and all(page.size for page in pages)
    return tuple(page.reshape(-1, nbytes) for page in pages) if is_whole else ()


def _plain_page(flat: np.ndarray, chunk: pq.ColumnChunkMetaData, size: int) -> np.ndarray:
    """Returns the values of a column chunk that is one page of nothing but `size` bytes of values, else nothing."""
    start, stop = chunk.data_page_offset, chunk.data_page_offset + chunk.total_compressed_size
    is_plain = set(chunk.encodings) <= {"PLAIN", "RLE"}
    if chunk.has_dictionary_page or not is_plain or not 0 <= start < stop - size < stop <= len(flat):
        return flat[:0]
    # Not asked is the chunk for its codec: where a damaged footer names one that there is not, pyarrow ends the
    # process. The page tells that it takes as many bytes as its values.
    header = _PAGE_START + _varint(2 * size) + _NEXT_NUMBER + _varint(2 * size)
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
