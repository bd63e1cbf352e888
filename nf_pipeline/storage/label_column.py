"""The label column of a shard: an int64 class for each sample, or float32 values, bytes of fixed size as the tensors.

The bytes' type and shape stand in the field's metadata, in the same words as those of the tensors. Knows nothing of
what a label means. Entries: `label_field`, `label_array`, `labels_of`.
"""

import json

import numpy as np
import pyarrow as pa

DTYPE_KEY = b"dtype"
SHAPE_KEY = b"shape"

_VALUE_BYTES = 4


def label_bytes(num_values: int) -> int:
    """Returns the bytes of one sample's label.

    Args:
        num_values: K float32 values, or 0 for a class.
    """
    return num_values * _VALUE_BYTES or 8


def label_field(num_values: int) -> pa.Field:
    """Returns the Parquet field of such labels."""
    if not num_values:
        return pa.field("label", pa.int64(), nullable=False)
    metadata = {DTYPE_KEY: b"float32", SHAPE_KEY: json.dumps([num_values]).encode()}
    return pa.field("label", pa.binary(label_bytes(num_values)), nullable=False, metadata=metadata)


def label_form(num_rows: int, num_values: int) -> tuple[type[np.generic], tuple[int, ...]]:
    """Returns type and shape of the labels of some samples: int64 [num_rows], or float32 [num_rows, K]."""
    return (np.float32, (num_rows, num_values)) if num_values else (np.int64, (num_rows,))


def num_values_of(schema: pa.Schema) -> int:
    """Returns how many values each label of a file has, by the width of its column; 0 if these are classes."""
    index = schema.get_field_index("label")
    kind = schema.field(index).type if index >= 0 else pa.null()
    return kind.byte_width // _VALUE_BYTES if pa.types.is_fixed_size_binary(kind) else 0


def new_labels(num_rows: int, num_values: int) -> np.ndarray:
    """Returns memory for the labels of some samples."""
    dtype, shape = label_form(num_rows, num_values)
    return np.empty(shape, dtype)


def label_array(labels: np.ndarray) -> pa.Array:
    """Returns labels as a column: a view of int64 [N], or of contiguous float32 [N, K]."""
    if labels.ndim == 1:
        return pa.array(labels)
    kind = pa.binary(label_bytes(labels.shape[1]))
    return pa.FixedSizeBinaryArray.from_buffers(kind, len(labels), [None, pa.py_buffer(labels)])


def labels_of(column: pa.ChunkedArray) -> np.ndarray:
    """Returns the labels of a column of `label_field` without nulls; read-only where Arrow allows a view."""
    if not pa.types.is_fixed_size_binary(column.type):
        return column.to_numpy()
    return bytes_of(column).view(np.float32)


def bytes_of(column: pa.ChunkedArray) -> np.ndarray:
    """Returns the bytes of a column of fixed-size binary without nulls, uint8 [rows, byte_width]."""
    width = column.type.byte_width
    array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    flat = np.frombuffer(array.buffers()[1], np.uint8)
    return flat[array.offset * width : (array.offset + len(array)) * width].reshape(-1, width)
