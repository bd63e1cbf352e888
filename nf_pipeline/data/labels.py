"""Reads the label column of Parquet files: whole numbers stay, text becomes the index of its sorted name.

Knows nothing of images. Entry: `LabelColumn`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nf_pipeline.data.columns import is_text
from nf_pipeline.errors import DataError

Where = Callable[[int], str]


@dataclass(frozen=True)
class LabelColumn:
    """The labels of one file, as stored.

    Attributes:
        numbers: int64 [rows]; for text an index into `texts`.
        texts: distinct names, None for whole numbers.
    """

    numbers: np.ndarray
    texts: tuple[str, ...] | None

    @classmethod
    def of(cls, column: pa.ChunkedArray, where: Where) -> "LabelColumn":
        """Converts a column that `find_label_column` accepted.

        Args:
            column: of one file.
            where: row in the file -> text for errors.

        Raises:
            DataError: a null, or a number beyond 63 bits; names its row.
        """
        _refuse_null(column, where)
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


def number_texts(columns: Sequence[LabelColumn]) -> tuple[str, ...] | None:
    """Returns the sorted distinct names of all columns; None where labels are whole numbers.

    Raises:
        ValueError: some columns hold text and others numbers.
    """
    kinds = {column.texts is None for column in columns}
    if len(kinds) > 1:
        raise ValueError("some files hold text labels and others whole numbers")
    if True in kinds:
        return None
    return tuple(sorted({text for column in columns for text in column.texts or ()}))


def renumber(column: LabelColumn, names: tuple[str, ...] | None) -> np.ndarray:
    """Returns int64 labels: as stored for numbers, positions in `names` for text."""
    if column.texts is None or names is None:
        return column.numbers
    position = {name: label for label, name in enumerate(names)}
    return np.array([position[text] for text in column.texts], np.int64)[column.numbers]
