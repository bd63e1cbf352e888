"""Tensor columns as Ray Data keeps them in Arrow, read without Ray.

Two forms: one shape for the whole column (a list of values per row), or a shape per row (values and shape). In
memory they are extension types; in a Parquet file that a program without Ray Data opens, the same name and
parameters stand in the field's metadata. Knows nothing of images. Entry: `ray_tensor_of`.

Source: https://github.com/ray-project/ray/tree/master/python/ray/data, `ArrowTensorTypeV2` and
`ArrowVariableShapedTensorType`.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

_ONE_SHAPE = ("ray.data.arrow_tensor", "ray.data.arrow_tensor_v2")
_SHAPE_PER_ROW = "ray.data.arrow_variable_shaped_tensor"


@dataclass(frozen=True, kw_only=True)
class RayTensor:
    """What a column holds.

    Attributes:
        value_type: of the tensors' values.
        shape: of every tensor; None where each row has its own.
    """

    value_type: pa.DataType
    shape: tuple[int, ...] | None

    def cells(self, array: pa.Array) -> Iterator[np.ndarray | None]:
        """Yields each row's tensor, a view where Arrow allows it; None for a null, or values that do not fill the
        shape."""
        stored = array.storage if isinstance(array, pa.ExtensionArray) else array
        for row in range(len(stored)):
            yield self._cell(stored[row])

    def _cell(self, cell: pa.Scalar) -> np.ndarray | None:
        if not cell.is_valid:
            return None
        values = (cell if self.shape is not None else cell["data"]).values
        shape = self.shape if self.shape is not None else cell["shape"].as_py()
        if values is None or values.null_count or shape is None or not _fills(values, shape):
            return None
        return values.to_numpy().reshape(shape)


def ray_tensor_of(field: pa.Field) -> RayTensor | None:
    """Returns what a column holds; None if it is no tensor column of Ray Data."""
    kind = field.type
    if isinstance(kind, pa.BaseExtensionType):
        name, stored = kind.extension_name, kind.storage_type
        if name in _ONE_SHAPE:
            return RayTensor(value_type=stored.value_type, shape=tuple(kind.shape))
    else:
        name, stored = (field.metadata or {}).get(b"ARROW:extension:name", b"").decode("utf8", "replace"), kind
    if name in _ONE_SHAPE and (pa.types.is_list(stored) or pa.types.is_large_list(stored)):
        shape = _shape_in_metadata(field)
        return None if shape is None else RayTensor(value_type=stored.value_type, shape=shape)
    if name == _SHAPE_PER_ROW and pa.types.is_struct(stored) and _has_lists(stored, "data", "shape"):
        return RayTensor(value_type=stored.field("data").type.value_type, shape=None)
    return None


def _has_lists(struct: pa.StructType, *names: str) -> bool:
    found = [struct.field(name).type for name in names if struct.get_field_index(name) >= 0]
    return len(found) == len(names) and all(pa.types.is_list(kind) or pa.types.is_large_list(kind) for kind in found)


def _fills(values: pa.Array, shape: Sequence[int | None]) -> bool:
    return all(size is not None and size >= 0 for size in shape) and math.prod(shape) == len(values)


def _shape_in_metadata(field: pa.Field) -> tuple[int, ...] | None:
    try:
        shape = json.loads((field.metadata or {})[b"ARROW:extension:metadata"])
    except (KeyError, ValueError):  # Ray before 2.50 may have pickled it, and pickles are not opened here
        return None
    is_shape = isinstance(shape, list) and all(isinstance(size, int) and size >= 0 for size in shape)
    return tuple(shape) if is_shape else None
