"""Parquet files as a source: local or in object storage, images encoded or as uint8 tensors, or other tensors.

Labels are read alone; images are streamed row group by row group, only those that are wanted are kept.
Memory: a shuffle window (see `shuffle`) and, for each open row group, a page and a dictionary: most writers put up to
1,024 images into one. In object storage the open row groups themselves, because each is fetched whole. Where these
are large, fewer are open at the same time. A file that would take far more than it has bytes is refused. Entry:
`ParquetSource`.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nf_pipeline.data.base import SPLITS, Column, RawImage, Split
from nf_pipeline.data.columns import (
    check_apart,
    class_names_of,
    find_image_column,
    find_label_column,
    image_cells,
    is_text,
    nesting,
)
from nf_pipeline.data.files import DataFile, FileSet
from nf_pipeline.data.labels import LabelColumn, number_texts, renumber
from nf_pipeline.data.shuffle import OPEN_STREAMS, interleave, shuffle_window
from nf_pipeline.data.split_names import split_of
from nf_pipeline.errors import DataError

_BATCH_BYTES = 4 * 2**20
# Sizes in the footer are of encoded pages: with a dictionary, rows can be far larger than they tell.
_BATCH_ROWS = 64
_DICTIONARY_BATCH_BYTES = 256 * 2**20
# A file is refused where it would take far more memory than it has bytes. Images and labels that somebody means
# stay well below: no two images are the same, and what is compressed already hardly gets smaller.
_FREE_ROWS = 2**20
_FREE_BYTES = 128 * 2**20
_MAX_EXPANSION = 1000
_BUFFER_BYTES = 2**20
_LOCAL_OPEN_BYTES = 256 * 2**20
_REMOTE_OPEN_BYTES = 128 * 2**20
# Arrow and its likes look at the size of a page, and of a dictionary, after so many rows only.
_PAGE_ROWS = 1024


@dataclass(frozen=True, kw_only=True)
class _Footer:
    file: DataFile
    split: Split
    schema: pa.Schema
    group_rows: tuple[int, ...]
    group_bytes: tuple[int, ...]
    checksum: str

    @property
    def num_rows(self) -> int:
        return sum(self.group_rows)


@dataclass(frozen=True, kw_only=True)
class _RowGroup:
    footer: _Footer
    group: int
    first_row: int  # in the split

    @property
    def num_rows(self) -> int:
        return self.footer.group_rows[self.group]

    @property
    def num_bytes(self) -> int:
        return self.footer.group_bytes[self.group]


class ParquetSource:
    """A data set of Parquet files whose names tell their split (`split_of`); without such names all is train.

    Args:
        name: of the data set.
        files: in order.
        image_column, label_column: names, or None to find them.

    Raises:
        DataError: a file is damaged, its split cannot be told, or its image column is missing or ambiguous.
    """

    def __init__(
        self, name: str, files: FileSet, *, image_column: str | None = None, label_column: str | None = None
    ) -> None:
        self.name = name
        self._files = files
        self._given_label = label_column
        one_file = len(files.files) == 1
        named: set[Split | None] = {None if one_file else split_of(file.name) for file in files.files}
        self._footers = [self._read_footer(file, named) for file in files.files]
        self._image_columns = {
            footer.file.name: find_image_column(footer.schema, image_column, footer.file.name, label_column)
            for footer in self._footers
        }
        self.splits = tuple(split for split in SPLITS if any(self._of(split)))

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Sorted distinct text labels, or the names in Hugging Face's metadata."""
        return self._text_names or self._metadata_names

    def describe(self) -> dict[str, Any]:
        """Returns every file's name, size and checksum of its footer, which holds the layout of its data."""
        return {
            "kind": "parquet",
            "files": [[footer.file.name, footer.file.num_bytes, footer.checksum] for footer in self._footers],
        }

    def num_rows(self, split: Split) -> int:
        """Counts the rows of a split that the data brings."""
        return sum(footer.num_rows for footer in self._of(split))

    def labels(self, split: Split) -> np.ndarray:
        """Returns the label of every row: int64 [num_rows], or values, float32 [num_rows, K]."""
        parts = [renumber(self._label_columns[footer.file.name], self._text_names) for footer in self._of(split)]
        filled = [part for part in parts if len(part)] or parts[:1]  # an empty file need not be of the same kind
        return np.concatenate(filled) if filled else np.zeros(0, np.int64)

    def read(self, split: Split, wanted: np.ndarray, seed: int | None) -> Iterator[RawImage]:
        """Yields the wanted rows; shuffled by row group, several open at a time, then within a window."""
        groups = [group for group in self._groups(split) if wanted[_span(group)].any()]
        if seed is None:
            for group in groups:
                yield from self._read_group(group, wanted)
            return
        rng = np.random.default_rng([seed, 1])
        order = [groups[position] for position in rng.permutation(len(groups))]
        openers: list[Callable[[], Iterator[RawImage]]] = [
            partial(self._read_group, group, wanted) for group in order
        ]
        yield from shuffle_window(interleave(openers, num_open=self._num_open(order)), rng)

    def where(self, split: Split, row: int, column: Column) -> str:
        """Names a cell: file, row in the file, column."""
        footer, file_row = self._locate(split, row)
        name = self._image_columns[footer.file.name] if column == "image" else self._label_name(footer)
        return f"{footer.file.name}, row {file_row}, column {name!r}"

    def image_id(self, split: Split, row: int) -> str:
        """Returns "file:row"."""
        footer, file_row = self._locate(split, row)
        return f"{footer.file.name}:{file_row}"

    def _of(self, split: Split) -> list[_Footer]:
        return [footer for footer in self._footers if footer.split == split]

    def _read_footer(self, file: DataFile, named: set[Split | None]) -> _Footer:
        split = split_of(file.name) if named != {None} else "train"
        if split is None:
            raise DataError(
                f"{file.name} in {self._files.uri}: its name tells no split, but other files' names do",
                "name it train-..., validation-... or test-..., or move it away",
            )
        with self._files.errors_named(file), self._files.open(file) as stream:
            footer = pq.ParquetFile(stream)
            groups = [footer.metadata.row_group(group) for group in range(footer.num_row_groups)]
            _check_rows(file, sum(group.num_rows for group in groups))
            _check_expansion(file, max((group.total_byte_size for group in groups), default=0))
            return _Footer(
                file=file,
                split=split,
                schema=footer.schema_arrow,
                group_rows=tuple(group.num_rows for group in groups),
                group_bytes=tuple(group.total_byte_size for group in groups),
                checksum=_footer_checksum(stream),
            )

    def _label_name(self, footer: _Footer) -> str:
        return find_label_column(footer.schema, self._given_label, footer.file.name)

    @cached_property
    def _label_columns(self) -> dict[str, LabelColumn]:
        return {footer.file.name: self._read_labels(footer) for footer in self._footers}

    def _read_labels(self, footer: _Footer) -> LabelColumn:
        name = self._label_name(footer)
        check_apart(self._image_columns[footer.file.name], name, footer.file.name)
        as_dictionary = [name] if is_text(footer.schema.field(name).type) else None
        with self._files.errors_named(footer.file), self._files.open(footer.file) as stream:
            reader = pq.ParquetFile(stream, read_dictionary=as_dictionary)
            field = footer.schema.field(name)
            if nesting(_storage_type(field.type))[0]:  # values that repeat may take far more than their file
                groups = [_RowGroup(footer=footer, group=idx, first_row=0) for idx in range(reader.num_row_groups)]
                _check_expansion(footer.file, sum(_decoded_bytes(reader, group, name) for group in groups))
            column = reader.read(columns=[name]).column(name)
            return LabelColumn.of(column, lambda row: f"{footer.file.name}, row {row}, column {name!r}", field)

    @cached_property
    def _text_names(self) -> tuple[str, ...] | None:
        try:
            return number_texts(list(self._label_columns.values()))
        except ValueError as error:
            raise DataError(f"{self._files.uri}: {error}", "convert the label columns to one type") from None

    @cached_property
    def _metadata_names(self) -> tuple[str, ...] | None:
        names = {
            footer.file.name: class_names_of(footer.schema, self._label_name(footer)) for footer in self._footers
        }
        first = next(iter(names.values()))
        for file, other in names.items():
            if other != first:
                raise DataError(
                    f"{file} in {self._files.uri}: its metadata has the class names {_short(other)}, the "
                    f"first file's {_short(first)}",
                    "write all files with the same class names in the schema's metadata",
                )
        return first

    def _groups(self, split: Split) -> Iterator[_RowGroup]:
        first_row = 0
        for footer in self._of(split):
            for group, num_rows in enumerate(footer.group_rows):
                yield _RowGroup(footer=footer, group=group, first_row=first_row)
                first_row += num_rows

    def _num_open(self, groups: list[_RowGroup]) -> int:
        if self._files.remote:
            held, most = [group.num_bytes for group in groups], _REMOTE_OPEN_BYTES
        else:
            held, most = [_page_bytes(group) for group in groups], _LOCAL_OPEN_BYTES
        return max(1, min(OPEN_STREAMS, most // max([1, *held])))

    def _read_group(self, group: _RowGroup, wanted: np.ndarray) -> Iterator[RawImage]:
        footer = group.footer
        column = self._image_columns[footer.file.name]
        cells = image_cells(footer.schema.field(column))
        row = group.first_row
        with self._files.errors_named(footer.file), self._files.open(footer.file) as stream:
            # A buffered stream keeps a large row group out of memory; over the network it would be slow.
            remote = self._files.remote
            reader = pq.ParquetFile(stream, pre_buffer=remote, buffer_size=0 if remote else _BUFFER_BYTES)
            batch_rows = _batch_rows(group, _decoded_bytes(reader, group, column))
            for batch in reader.iter_batches(batch_rows, row_groups=[group.group], columns=[column]):
                chosen = np.flatnonzero(wanted[row : row + batch.num_rows])
                images = cells(batch.column(column).take(pa.array(chosen))) if len(chosen) else ()
                yield from map(RawImage, (chosen + row).tolist(), images)
                row += batch.num_rows

    def _locate(self, split: Split, row: int) -> tuple[_Footer, int]:
        for footer in self._of(split):
            if row < footer.num_rows:
                return footer, row
            row -= footer.num_rows
        raise IndexError(row)


def _check_rows(file: DataFile, num_rows: int) -> None:
    if num_rows > max(_FREE_ROWS, file.num_bytes):
        raise DataError(
            f"{file.name}: {num_rows} rows in a file of {file.num_bytes} bytes, want at most one for each byte",
            "give files whose rows hold images or tensors",
        )


def _span(group: _RowGroup) -> slice:
    return slice(group.first_row, group.first_row + group.num_rows)


def _check_expansion(file: DataFile, num_bytes: int) -> None:
    if num_bytes > max(_FREE_BYTES, _MAX_EXPANSION * file.num_bytes):
        raise DataError(
            f"{file.name}: a row group of this file of {file.num_bytes} bytes would take {num_bytes} in memory, "
            f"want at most {_MAX_EXPANSION} times its size",
            "write the file again with smaller row groups, if it is what you want to train on",
        )


def _decoded_bytes(reader: pq.ParquetFile, group: _RowGroup, column: str) -> int:
    """Returns what a column of a row group takes as numbers or encoded files; at most that, if it repeats."""
    stored = _storage_type(reader.schema_arrow.field(column).type)
    if pa.types.is_fixed_size_binary(stored):
        num_bytes = group.num_rows * stored.byte_width
    elif pa.types.is_nested(stored) and not pa.types.is_struct(stored):
        # Of pixels that repeat the file holds one and a count. Asked for here only: where the rest of a column's
        # metadata is damaged, pyarrow ends the process (version 26), instead of raising as it does when it reads.
        metadata = reader.metadata.row_group(group.group)
        leaves = [metadata.column(idx) for idx in range(metadata.num_columns)]
        num_values = max(leaf.num_values for leaf in leaves if f"{leaf.path_in_schema}.".startswith(f"{column}."))
        num_bytes = num_values * _item_bytes(stored)
    else:
        num_bytes = group.num_bytes
    _check_expansion(group.footer.file, num_bytes)
    return num_bytes


def _storage_type(kind: pa.DataType) -> pa.DataType:
    return kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind


def _item_bytes(kind: pa.DataType) -> int:
    value = nesting(kind)[1]
    return max(1, value.bit_width // 8) if pa.types.is_primitive(value) else 1


def _batch_rows(group: _RowGroup, decoded_bytes: int) -> int:
    """Returns how many rows are decoded at once, at least one."""
    rows = min(_BATCH_ROWS, _BATCH_BYTES // (decoded_bytes // max(1, group.num_rows) + 1))
    if decoded_bytes == group.num_bytes:  # then every row could be the one large value of a dictionary
        rows = min(rows, _DICTIONARY_BATCH_BYTES // max(1, decoded_bytes))
    return max(1, rows)


def _page_bytes(group: _RowGroup) -> int:
    """Estimates what reading a local row group holds: its largest page or dictionary, as stored and decompressed."""
    return 2 * group.num_bytes * min(group.num_rows, _PAGE_ROWS) // max(1, group.num_rows)


def _footer_checksum(stream: Any) -> str:
    # https://parquet.apache.org/docs/file-format/: ... footer, its length as 4 bytes, "PAR1"
    stream.seek(-8, 2)
    length = int.from_bytes(stream.read(8)[:4], "little")
    stream.seek(-8 - length, 2)
    return hashlib.sha256(stream.read(length)).hexdigest()[:16]


def _short(names: tuple[str, ...] | None) -> str:
    return "none" if names is None else f"({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"
