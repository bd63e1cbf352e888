"""Reads the label column of Parquet files: whole numbers stay, text becomes the index of its sorted name, floating
point numbers and lists of numbers become float32 values.

Knows nothing of images. Entry: `LabelColumn`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nf_pipeline.data.columns import is_text, num_axes_of_values
from nf_pipeline.errors import DataError
from nf_pipeline.storage.label_column import bytes_of
from nf_pipeline.storage.shards import spec_of_field

Where = Callable[[int], str]


@dataclass(frozen=True)
class LabelColumn:
    """The labels of one file, as stored.

    Attributes:
        numbers: int64 [rows], for text an index into `texts`; or finite float32 [rows, K].
        texts: distinct names, None for numbers.
    """

    numbers: np.ndarray
    texts: tuple[str, ...] | None

    @classmethod
    def of(cls, column: pa.ChunkedArray, where: Where, field: pa.Field | None = None) -> "LabelColumn":
        """Converts a column that `find_label_column` accepted.

        Args:
            column: of one file.
            where: row in the file -> text for errors.
            field: of the column, whose metadata may say what its bytes are; None if it has none.

        Raises:
            DataError: a null, a number beyond 63 bits, or values that are not finite or not as many as in the first
                row; names its row.
        """
        _refuse_null(column, where)
        field = field or pa.field("label", column.type)
        if num_axes_of_values(field) is not None:
            return cls(_values(column, field, where), None)
        kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
        if is_text(kind):
            # Stays a dictionary: a long text in every row would take far more memory than it has in the file.
            encoded = column if pa.types.is_dictionary(column.type) else _as_string(column).dictionary_encode()
            whole = encoded.unify_dictionaries().combine_chunks()
            return cls(whole.indices.to_numpy().astype(np.int64), tuple(whole.dictionary.to_pylist()))
        if pa.types.is_dictionary(column.type):
            column = pc.cast(column, kind)
        try:
            return cls(pc.cast(column, pa.int64()).to_numpy(), None)
        except pa.ArrowInvalid:
            row = int(np.argmax(column.to_numpy() > np.iinfo(np.int64).max))
            raise DataError(
                f"{where(row)}: label {column[row].as_py()} is out of range", "correct or remove the row"
            ) from None


def _refuse_null(column: pa.ChunkedArray, where: Where) -> None:
    # The values of a dictionary can be null as well as the places that point to them.
    null = pc.is_null(pc.cast(column, column.type.value_type) if _has_null_value(column) else column)
    if pc.any(null).as_py():
        row = int(np.argmax(null.to_numpy()))
        raise DataError(f"{where(row)}: label is null", "give it a label or remove the row")


def _has_null_value(column: pa.ChunkedArray) -> bool:
    return pa.types.is_dictionary(column.type) and any(chunk.dictionary.null_count for chunk in column.chunks)


def _as_string(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.cast(column, pa.large_string()) if pa.types.is_string_view(column.type) else column


def _values(column: pa.ChunkedArray, field: pa.Field, where: Where) -> np.ndarray:
    """Returns finite values, float32 [rows, K]."""
    spec = spec_of_field(field)
    if num_axes_of_values(field) == 0:
        stored = column.to_numpy()[:, None]
    elif spec is not None:
        stored = bytes_of(column).view(spec.dtype)
    else:
        stored = _listed(column, where)
    with np.errstate(over="ignore"):
        values = stored.astype(np.float32)
    wrong = ~np.isfinite(values).all(axis=1)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise DataError(
            f"{where(row)}: label {stored[row].tolist()[:5]} is not finite, or too large for float32",
            "correct or remove the row",
        )
    return values


def _listed(column: pa.ChunkedArray, where: Where) -> np.ndarray:
    array = column.combine_chunks()
    array = array.storage if isinstance(array, pa.ExtensionArray) else array
    lengths = pc.list_value_length(array).to_numpy(zero_copy_only=False)
    if not len(lengths):
        return np.zeros((0, 1))
    for row in np.flatnonzero((lengths != lengths[0]) | (lengths == 0))[:1].tolist():
        raise DataError(
            f"{where(row)}: {lengths[row]} values, want {lengths[0] or 'at least one'} as in the first row",
            "correct or remove the row",
        )
    flat = array.flatten()
    if flat.null_count:
        row = int(np.argmax(pc.is_null(flat).to_numpy(zero_copy_only=False))) // int(lengths[0])
        raise DataError(f"{where(row)}: label has a null inside", "correct or remove the row")
    return flat.to_numpy(zero_copy_only=False).reshape(len(lengths), -1)


def value_lists(array: pa.Array, field: pa.Field) -> pa.Array:
    """Returns a label column of lists or tensors [K] as lists, whatever type it is of."""
    spec = spec_of_field(field)
    if spec is None:
        return array.storage if isinstance(array, pa.ExtensionArray) else array
    values = bytes_of(pa.chunked_array([array])).view(spec.dtype)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])


def number_texts(columns: Sequence[LabelColumn]) -> tuple[str, ...] | None:
    """Returns the sorted distinct names of all columns; None where labels are numbers.

    Raises:
        ValueError: the columns differ in what they hold.
    """
    kinds = sorted({_kind(column) for column in columns if len(column.numbers)})
    if len(kinds) > 1:
        raise ValueError(f"some files hold {kinds[0]} and others {kinds[1]}")
    if all(column.texts is None for column in columns):
        return None
    return tuple(sorted({text for column in columns for text in column.texts or ()}))


def _kind(column: LabelColumn) -> str:
    if column.texts is not None:
        return "text labels"
    return "whole numbers" if column.numbers.ndim == 1 else f"{column.numbers.shape[1]} value(s) in each row"


def renumber(column: LabelColumn, names: tuple[str, ...] | None) -> np.ndarray:
    """Returns labels: as stored for numbers and values, positions in `names`, int64, for text."""
    if column.texts is None or names is None:
        return column.numbers
    position = {name: label for label, name in enumerate(names)}
    return np.array([position[text] for text in column.texts], np.int64)[column.numbers]
