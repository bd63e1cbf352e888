"""Finds the image (or tensor) and label columns of a Parquet schema, and turns their cells into arrays.

Knows nothing of files or splits. Entry: `find_image_column`, `find_label_column`, `image_cells`.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nf_pipeline.data.base import StoredImage, Unusable
from nf_pipeline.data.ray_tensors import RayTensor, ray_tensor_of
from nf_pipeline.data.tensors import CHANNELS, holds_numbers, is_image
from nf_pipeline.errors import DataError
from nf_pipeline.storage.shards import spec_of_field

LABEL_NAMES = ("label", "labels", "target", "class")
IMAGE_NAMES = (
    "image",
    "images",
    "img",
    "tensor",
    "input",
    "inputs",
    "input_ids",
    "tokens",
    "series",
    "volume",
    "observation",
)

_SHOWN_COLUMNS = 20
_FIX_IMAGE = "name the image column: --set data.image_column=NAME, or --image-column NAME where the command has it"
_FIX_LABEL = "name the label column: --set data.label_column=NAME, or --label-column NAME where the command has it"

Cells = Callable[[pa.Array], Iterator[StoredImage]]


def find_image_column(schema: pa.Schema, given: str | None, file: str, label: str | None = None) -> str:
    """Finds the column that holds images, or tensors: the one of such a type, or of several the one with such a name.

    Args:
        schema: of one file.
        given: the name that the user gave, if any.
        file: for errors.
        label: the name of the label column that the user gave, if any.

    Raises:
        DataError: missing, neither image nor tensor, none found, or several that could be meant.
    """
    if given is not None:
        _require(schema, given, file, _FIX_IMAGE)
        if image_rank(schema.field(given)) is None:
            raise DataError(
                f"{file}, column {given!r}: type {schema.field(given).type} holds no images, want "
                "struct<bytes, path>, binary, or a tensor or lists of numbers",
                _FIX_IMAGE,
            )
        return given
    best = likeliest_images({field.name: image_rank(field) for field in schema}, label)
    if len(best) != 1:
        problem = f"columns {best} could all be the image" if best else "no column holds images"
        raise DataError(
            f"{file}: {problem}; it has {_columns(schema)}",
            _FIX_IMAGE,
        )
    _require(schema, best[0], file, _FIX_IMAGE)
    return best[0]


def check_apart(image: str, label: str, file: str) -> None:
    """Refuses one column as both the samples and their labels: a network would be asked what it was told.

    Raises:
        DataError: names it.
    """
    if image == label:
        raise DataError(f"{file}: column {image!r} has the labels, and no other column holds samples", _FIX_IMAGE)


def likeliest_images(ranks: Mapping[str, int | None], label: str | None = None) -> list[str]:
    """Returns the columns that are images most surely: of the best rank, and of those the ones with an image's name.

    Args:
        ranks: column -> see `image_rank`.
        label: of these columns the one with the labels, if that is known; else one with a label's name is taken for
            nothing but labels, unless there is no other.
    """
    found = sorted((rank, name) for name, rank in ranks.items() if rank is not None and name != label)
    found = [(rank, name) for rank, name in found if label or name.lower() not in LABEL_NAMES] or found
    best = [name for rank, name in found if rank == found[0][0]]
    if len(best) > 1:
        best = [name for name in best if name.lower() in IMAGE_NAMES] or best
    return best


def find_label_column(schema: pa.Schema, given: str | None, file: str) -> str:
    """Finds the column that holds labels: the given one, else the first of `LABEL_NAMES`.

    Raises:
        DataError: missing, or neither numbers, lists of numbers nor text.
    """
    names = {name.lower(): name for name in reversed(schema.names)}
    name = given or next((names[known] for known in LABEL_NAMES if known in names), None)
    if name is None:
        raise DataError(
            f"{file}: no label column, want one of {', '.join(LABEL_NAMES)}; it has {_columns(schema)}",
            _FIX_LABEL,
        )
    _require(schema, name, file, _FIX_LABEL)
    kind = schema.field(name).type
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_integer(value) or is_text(value) or num_axes_of_values(schema.field(name)) is not None):
        raise DataError(
            f"{file}, column {name!r}: type {kind}, want whole numbers, text, or values: floating point numbers, or "
            "lists of numbers",
            f"convert it, or {_FIX_LABEL}",
        )
    return name


def is_text(kind: pa.DataType) -> bool:
    """Tells whether a type holds text."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def num_axes_of_values(field: pa.Field) -> int | None:
    """Tells how many axes a label column's values have: 0 of numbers, 1 of lists [K]; None if they are no values.

    Whole numbers without an axis are classes.
    """
    if pa.types.is_floating(field.type):
        return 0
    ray_tensor = ray_tensor_of(field)
    if ray_tensor is not None:
        return 1 if len(ray_tensor.shape or ()) == 1 and holds_numbers(ray_tensor.value_type) else None
    tensor = _tensor_form(field)
    if tensor is not None:
        return 1 if len(tensor.shape) == 1 else None
    depth, value = nesting(field.type)
    return 1 if depth == 1 and holds_numbers(value) else None


def image_rank(field: pa.Field) -> int | None:
    """Ranks how surely a column's type means images, or else tensors: 0 surest, None not at all."""
    kind = field.type
    ray_tensor = ray_tensor_of(field)
    if ray_tensor is not None:
        return _tensor_rank(holds_numbers(ray_tensor.value_type), pa.types.is_uint8(ray_tensor.value_type))
    if pa.types.is_struct(kind):
        child = kind.field("bytes") if kind.get_field_index("bytes") >= 0 else None
        return 0 if child is not None and _is_binary(child.type) else None
    tensor = _tensor_form(field)
    if tensor is not None:
        return _tensor_rank(True, tensor.dtype == np.uint8)
    depth, value = nesting(kind)
    if depth:
        return 2 if depth in (2, 3) and pa.types.is_uint8(value) else _tensor_rank(holds_numbers(value), False)
    return 3 if _is_binary(kind) else None


def _tensor_rank(is_numbers: bool, is_uint8: bool) -> int | None:
    # Tensors of other types come after everything that can only be images.
    if is_uint8:
        return 1
    return 4 if is_numbers else None


def image_cells(field: pa.Field) -> Cells:
    """Returns the function that yields one stored image per row of an array of this column.

    Invariant: never raises for the content of a cell; what is no image is an `Unusable`.
    """
    kind = field.type
    ray_tensor = ray_tensor_of(field)
    if ray_tensor is not None:
        return lambda array: _ray_tensors(array, ray_tensor)
    if pa.types.is_struct(kind):
        return lambda array: _encoded(pc.struct_field(array, "bytes"))
    tensor = _tensor_form(field)
    if tensor is not None and pa.types.is_fixed_size_binary(kind):
        return lambda array: _raw_tensors(array, tensor)
    if tensor is not None:
        axes = tuple(kind.permutation) if kind.permutation is not None else tuple(range(len(tensor.shape)))
        return lambda array: _shaped_tensors(array, tensor.shape, axes)
    return _encoded if _is_binary(kind) else _nested_lists


def class_names_of(schema: pa.Schema, label_column: str) -> tuple[str, ...] | None:
    """Reads the class names that Hugging Face data sets keep in the schema's metadata.

    Source: https://huggingface.co/docs/datasets/package_reference/main_classes#datasets.Features
    """
    text = (schema.metadata or {}).get(b"huggingface")
    try:
        names = json.loads(text)["info"]["features"][label_column]["names"] if text else None
        "".join(names or ()).encode()  # a TypeError for what is no text, a ValueError for what is no UTF-8
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return tuple(names) if isinstance(names, list) and names else None


def _encoded(array: pa.Array) -> Iterator[StoredImage]:
    for data in array.to_pylist():
        yield data if data else Unusable("it is null" if data is None else "it has no bytes")


def _raw_tensors(array: pa.Array, form: "_Form") -> Iterator[StoredImage]:
    for data in array.to_pylist():
        if data is None:
            yield Unusable("it is null")
            continue
        tensor = np.frombuffer(data, form.dtype).reshape(form.shape)
        # Such columns are written by this package, channels first: (3, H, 3) is no [H, W, C] there, nor is (9, H, 3).
        if _has_channels_first(tensor):
            yield tensor.transpose(1, 2, 0)
        elif is_image(tensor) and tensor.ndim == 3:
            yield Unusable(f"uint8 of shape {form.shape}, channels first, would be taken for pixels")
        else:
            yield pixels_of(tensor)


def _shaped_tensors(array: pa.Array, shape: tuple[int, ...], axes: tuple[int, ...]) -> Iterator[StoredImage]:
    storage = array.storage
    for row in range(len(storage)):
        cell = storage[row]
        if not cell.is_valid or cell.values.null_count:
            yield Unusable("it is null")
        else:
            yield pixels_of(cell.values.to_numpy().reshape(shape).transpose(axes))


def _ray_tensors(array: pa.Array, tensor: RayTensor) -> Iterator[StoredImage]:
    for cell in tensor.cells(array):
        yield Unusable("it is null") if cell is None else pixels_of(cell)


def _nested_lists(array: pa.Array) -> Iterator[StoredImage]:
    for row in range(len(array)):
        yield _nested_list(array.slice(row, 1))


def _nested_list(array: pa.Array) -> StoredImage:
    # Each level of a proper tensor has lists of one length only; their lengths are its shape.
    shape: list[int] = []
    while _is_list(array.type):
        lengths = pc.list_value_length(array)
        if lengths.null_count:
            return Unusable("it is null" if not shape else "it has a null inside")
        distinct = lengths.unique().to_pylist()
        if len(distinct) != 1:
            return Unusable("its rows have different lengths")
        shape.append(distinct[0])
        array = array.flatten()
    if array.null_count or 0 in shape:
        return Unusable("it has a null inside" if array.null_count else "it is empty")
    return pixels_of(array.to_numpy().reshape(shape))


def pixels_of(tensor: np.ndarray) -> StoredImage:
    """Returns a uint8 tensor of shape [H, W], [H, W, C] or [C, H, W] as [H, W] or [H, W, C].

    Where both fit, the last axis holds the channels. Other types, ranks and numbers of channels are no images: they
    stay as they are. What has no numbers at all is an `Unusable`.
    """
    if 0 in tensor.shape:
        return Unusable("it is empty")
    return tensor.transpose(1, 2, 0) if not is_image(tensor) and _has_channels_first(tensor) else tensor


def _has_channels_first(tensor: np.ndarray) -> bool:
    return tensor.dtype == np.uint8 and tensor.ndim == 3 and tensor.shape[0] in CHANNELS


@dataclass(frozen=True, kw_only=True)
class _Form:
    """What every tensor of a column is, as its schema tells."""

    dtype: np.dtype
    shape: tuple[int, ...]


def _tensor_form(field: pa.Field) -> _Form | None:
    if isinstance(field.type, pa.FixedShapeTensorType):
        value, shape = field.type.value_type, tuple(field.type.shape)
        return _Form(dtype=np.dtype(value.to_pandas_dtype()), shape=shape) if holds_numbers(value) else None
    spec = spec_of_field(field)
    if spec is None or spec.dtype == "bfloat16":  # which numpy lacks
        return None
    return _Form(dtype=np.dtype(spec.dtype), shape=spec.shape)


def nesting(kind: pa.DataType) -> tuple[int, pa.DataType]:
    """Returns how many lists are around the values of a type, and the type of these."""
    depth = 0
    while _is_list(kind):
        kind, depth = kind.value_type, depth + 1
    return depth, kind


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _require(schema: pa.Schema, name: str, file: str, fix: str) -> None:
    if name not in schema.names:
        raise DataError(
            f"{file}: missing column {name!r}; it has {_columns(schema)}",
            fix,
        )
    if schema.names.count(name) > 1:
        raise DataError(f"{file}: {schema.names.count(name)} columns are called {name!r}", "rename all but one")


def _columns(schema: pa.Schema) -> str:
    shown = ", ".join(f"{field.name!r} ({field.type})" for field in list(schema)[:_SHOWN_COLUMNS])
    return shown + (", ..." if len(schema) > _SHOWN_COLUMNS else "")
