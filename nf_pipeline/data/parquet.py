"""Parquet files as a source: local or in object storage, images encoded or as uint8 tensors.

Labels are read alone; images are streamed row group by row group, only those that are wanted are kept.
Memory: a shuffle window (see `shuffle`) and one small batch for each open row group; in object storage also
the open row groups themselves, because each is fetched whole. Entry: `ParquetSource`.
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
from nf_pipeline.data.columns import class_names_of, find_image_column, find_label_column, image_cells
from nf_pipeline.data.files import DataFile, FileSet
from nf_pipeline.data.labels import LabelColumn, number_texts, renumber
from nf_pipeline.data.shuffle import OPEN_STREAMS, interleave, shuffle_window
from nf_pipeline.data.split_names import split_of
from nf_pipeline.errors import DataError

_BATCH_BYTES = 4 * 2**20
# Sizes in the footer are of encoded pages: with a dictionary, rows can be far larger than they tell.
_BATCH_ROWS = 64
_BUFFER_BYTES = 2**20
_REMOTE_OPEN_BYTES = 128 * 2**20


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
            footer.file.name: find_image_column(footer.schema, image_column, footer.file.name)
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
        """Returns the label of every row, int64 [num_rows]."""
        parts = [renumber(self._label_columns[footer.file.name], self._text_names) for footer in self._of(split)]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

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
        with self._files.errors_named(footer.file), self._files.open(footer.file) as stream:
            column = pq.ParquetFile(stream).read(columns=[name]).column(0)
        return LabelColumn.of(column, lambda row: f"{footer.file.name}, row {row}, column {name!r}")

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
        if not self._files.remote or not groups:
            return OPEN_STREAMS
        largest = max(group.footer.group_bytes[group.group] for group in groups)
        return max(1, min(OPEN_STREAMS, _REMOTE_OPEN_BYTES // max(1, largest)))

    def _read_group(self, group: _RowGroup, wanted: np.ndarray) -> Iterator[RawImage]:
        footer = group.footer
        column = self._image_columns[footer.file.name]
        cells = image_cells(footer.schema.field(column))
        average = footer.group_bytes[group.group] // max(1, group.num_rows) + 1
        batch_rows = max(1, min(_BATCH_ROWS, _BATCH_BYTES // average))
        row = group.first_row
        with self._files.errors_named(footer.file), self._files.open(footer.file) as stream:
            # A buffered stream keeps a large row group out of memory; over the network it would be slow.
            remote = self._files.remote
            reader = pq.ParquetFile(stream, pre_buffer=remote, buffer_size=0 if remote else _BUFFER_BYTES)
            for batch in reader.iter_batches(batch_rows, row_groups=[group.group], columns=[column]):
                chosen = np.flatnonzero(wanted[row : row + batch.num_rows])
                images = cells(batch.column(0).take(pa.array(chosen))) if len(chosen) else ()
                yield from map(RawImage, (chosen + row).tolist(), images)
                row += batch.num_rows

    def _locate(self, split: Split, row: int) -> tuple[_Footer, int]:
        for footer in self._of(split):
            if row < footer.num_rows:
                return footer, row
            row -= footer.num_rows
        raise IndexError(row)


def _span(group: _RowGroup) -> slice:
    return slice(group.first_row, group.first_row + group.num_rows)


def _footer_checksum(stream: Any) -> str:
    # https://parquet.apache.org/docs/file-format/: ... footer, its length as 4 bytes, "PAR1"
    stream.seek(-8, 2)
    length = int.from_bytes(stream.read(8)[:4], "little")
    stream.seek(-8 - length, 2)
    return hashlib.sha256(stream.read(length)).hexdigest()[:16]


def _short(names: tuple[str, ...] | None) -> str:
    return "none" if names is None else f"({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"
