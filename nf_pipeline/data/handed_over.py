"""A data set that the caller holds as an object: copied once into the run's folder, as Parquet that ingest reads.

`with_dataset` lets the configuration name that folder, `settle_dataset` fills it unless it is filled or no longer
needed, `drop_dataset` removes it after ingest. The copy is made by whoever calls `train`, in bounded memory; it
counts from its manifest on, which is written last, and is a snapshot: it is not made again while it is there.
Only the image and the label column are kept. Pixels become PPM, which costs a header: one type of column takes
images of every size, whatever tensor type they came in. Other tensors are stored as ingest would store them.

Knows Ray Data by the name of its class and never imports it.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import pyarrow.parquet as pq

from nf_pipeline.config import DataConfig, RunConfig
from nf_pipeline.data.base import SPLITS, Split, StoredImage, Undecodable, Unusable
from nf_pipeline.data.columns import (
    check_apart,
    find_image_column,
    find_label_column,
    image_cells,
    is_text,
    num_axes_of_values,
)
from nf_pipeline.data.files import first_line
from nf_pipeline.data.labels import value_lists
from nf_pipeline.data.skipped import SkippedImages
from nf_pipeline.data.tensors import is_image, stored_tensor, tensor_inputs
from nf_pipeline.errors import AlreadyExists, ConfigError, DataError, StorageError
from nf_pipeline.run_uri import join_run_uri
from nf_pipeline.samples import InputSpec
from nf_pipeline.storage.layout import RunLayout
from nf_pipeline.storage.shards import TensorSpec, tensor_field
from nf_pipeline.storage.store import Store, open_store
from nf_pipeline.units import format_bytes

FORMAT_VERSION = 1
FILE_BYTES = 32 * 2**20
"""Images of one file, before compression; a single larger image gets a file of its own."""

_DEFAULT_SOURCE = DataConfig().source
_GROUP_BYTES = 4 * 2**20  # rows are shuffled by row group when they are read
_ROW_BYTES = 16  # of a row beside its image
_CONVERTED_ROWS = 64  # at a time: a batch of Ray Data may hold 128 MiB
_WANTED = "a ray.data.Dataset, a pyarrow.dataset.Dataset, a pyarrow.Table, or a mapping of train, val, test to these"
_FIX_DATASET = "train(config, dataset={'train': ..., 'test': ...}), or train(config, dataset=...)"
_HUGGINGFACE = b"huggingface"  # class names, see `columns.class_names_of`

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """One file of the copy.

    Attributes:
        key: relative to the store.
        num_bytes: of the object.
        num_rows: images in it.
    """

    key: str
    num_bytes: int
    num_rows: int


def with_dataset(config: RunConfig, dataset: Any) -> RunConfig:
    """Returns the configuration of a run whose data is handed over; nothing is read yet.

    Args:
        config: of the run; `data.source` is replaced, the other settings of `data` hold for the dataset.
        dataset: None (the configuration stays as it is), a `ray.data.Dataset`, a `pyarrow.dataset.Dataset`, a
            `pyarrow.Table`, or a mapping of "train", "val" and "test" to these. One dataset alone is the train
            split, from which the others are cut.

    Raises:
        ConfigError: the dataset is something else, the mapping has other keys or no train split, or
            `data.source` names another data set.
    """
    if dataset is None:
        return config
    _by_split(dataset)
    uri = _dataset_uri(open_store(config.storage.uri), RunLayout(config.run))
    if config.data.source not in (_DEFAULT_SOURCE, uri):
        raise ConfigError(
            f"data.source: got {config.data.source!r}, and a dataset object as well", "give one of the two"
        )
    return config.model_copy(update={"data": config.data.model_copy(update={"source": uri})})


def settle_dataset(store: Store, layout: RunLayout, config: RunConfig, dataset: Any) -> list[StoredFile]:
    """Makes sure that ingest finds the data set that was handed over; does nothing for other data.

    Call it after the run was opened and before ingest. Rows keep the order in which the dataset yields them, which
    Ray Data does not promise to be the same every time.

    Args:
        store, layout: of the run.
        config: as `with_dataset` returned it, or as the run's record holds it.
        dataset: as for `with_dataset`; None when a run is resumed.

    Returns:
        The files written now; none if ingest is committed or the copy is complete.

    Raises:
        DataError: no copy is there and no dataset was given; or the dataset has no rows, no image or no label
            column, or an image that is null.
        StorageError: the copy cannot be written, or somebody else writes one for the same run.
    """
    is_ours = is_handed_over(store, layout, config)
    if not is_ours or store.size(layout.ingest_manifest) is not None or _is_complete(store, layout):
        return []
    if dataset is None:
        raise DataError(
            f"run {layout.run!r} at {store.uri} was started with a dataset object, and its copy is not complete",
            "call train(config, dataset=...) again: the command line cannot resume this run before its ingest",
        )
    store.delete([key for key, _ in store.list(layout.dataset)])
    files: list[StoredFile] = []
    for split, part in _by_split(dataset).items():
        files += _store_split(store, layout, split, part, config.data)
    _commit(store, layout, files)
    return files


def drop_dataset(store: Store, layout: RunLayout) -> None:
    """Removes the copy, if there is one. Call it when ingest is committed: nothing reads the copy after that."""
    keys = [key for key, _ in store.list(layout.dataset)]
    # The commit goes first: whoever is interrupted leaves no copy that looks complete.
    store.delete(sorted(keys, key=lambda key: key != layout.dataset_manifest))


def describe_files(files: list[StoredFile]) -> str:
    """Returns one line for the log."""
    rows, num_bytes = sum(file.num_rows for file in files), sum(file.num_bytes for file in files)
    return f"copied {rows:,} rows of the given dataset into {len(files)} file(s), {format_bytes(num_bytes)}"


def is_ray_dataset(candidate: Any) -> bool:
    """Tells whether an object is a `ray.data.Dataset`, without Ray."""
    return any(
        kind.__name__ == "Dataset" and kind.__module__.split(".")[:2] == ["ray", "data"]
        for kind in type(candidate).__mro__
    )


def is_handed_over(store: Store, layout: RunLayout, config: RunConfig) -> bool:
    """Tells whether a run's images came as an object."""
    return config.data.source == _dataset_uri(store, layout)


def _dataset_uri(store: Store, layout: RunLayout) -> str:
    return join_run_uri(store.uri, layout.dataset)


def _by_split(dataset: Any) -> dict[Split, Any]:
    parts = dict(dataset) if isinstance(dataset, Mapping) else {"train": dataset}
    unknown = [key for key in parts if key not in SPLITS]
    if unknown or "train" not in parts:
        raise ConfigError(
            f"dataset: got the splits {list(parts)}, want train and, if there are, val and test", _FIX_DATASET
        )
    for split, part in parts.items():
        if not (is_ray_dataset(part) or isinstance(part, pa.dataset.Dataset | pa.Table)):
            kind = f"{type(part).__module__}.{type(part).__qualname__}"
            raise ConfigError(f"dataset: got {kind} for {split}, want {_WANTED}", _FIX_DATASET)
    return {split: parts[split] for split in SPLITS if split in parts}


def _is_complete(store: Store, layout: RunLayout) -> bool:
    found = dict(store.list(layout.dataset))
    if layout.dataset_manifest not in found:
        return False
    try:
        document = json.loads(bytes(store.get(layout.dataset_manifest)))
        named = {file["key"]: file["num_bytes"] for file in document["files"]}
    except (ValueError, KeyError, TypeError):
        return False
    del found[layout.dataset_manifest]
    return named == found


def _commit(store: Store, layout: RunLayout, files: list[StoredFile]) -> None:
    taken = StorageError(
        f"the dataset of run {layout.run!r} is being written by another program",
        store.uri,
        "end the other one, or use another run name",
    )
    if dict(store.list(layout.dataset)) != {file.key: file.num_bytes for file in files}:
        raise taken
    document = {"format_version": FORMAT_VERSION, "files": [asdict(file) for file in files]}
    try:
        store.create(layout.dataset_manifest, json.dumps(document, indent=1).encode())
    except AlreadyExists:
        raise taken from None


def _store_split(store: Store, layout: RunLayout, split: Split, dataset: Any, data: DataConfig) -> list[StoredFile]:
    where = f"dataset given as {split}"
    files: list[StoredFile] = []
    for table in _tables(_batches(dataset, where), data, where):
        key, encoded = layout.dataset_file(split, len(files)), _encoded(table)
        store.put(key, encoded)
        files.append(StoredFile(key=key, num_bytes=len(encoded), num_rows=table.num_rows))
        _logger.info("stored %s: %d rows, %d bytes", key, table.num_rows, len(encoded))
    if not files:
        raise DataError(f"{where}: it has no rows", "give one with rows; a filter may have removed them all")
    return files


def _batches(dataset: Any, where: str) -> Iterator[pa.RecordBatch]:
    if is_ray_dataset(dataset):
        # What a user's own function raises in there is left as it is.
        for table in dataset.iter_batches(batch_format="pyarrow", batch_size=None):
            yield from table.to_batches()
        return
    with _errors_named(where):
        yield from dataset.to_batches() if isinstance(dataset, pa.Table) else _scanned(dataset)


def _scanned(dataset: pa.dataset.Dataset) -> Iterator[pa.RecordBatch]:
    # With threads Arrow reads far ahead of a slow consumer, whatever the limits say; with buffers, whole files.
    options = {}
    if isinstance(getattr(dataset, "format", None), pa.dataset.ParquetFileFormat):
        options["fragment_scan_options"] = pa.dataset.ParquetFragmentScanOptions(pre_buffer=False)
    yield from dataset.to_batches(
        batch_size=_CONVERTED_ROWS, batch_readahead=1, fragment_readahead=1, use_threads=False, **options
    )


@contextmanager
def _errors_named(where: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{where}: cannot be read: {first_line(error)}", "repair its files") from error


@dataclass(kw_only=True)
class _Columns:
    image: str
    label: str
    schema: pa.Schema
    holds: Literal["images", "tensors"] | None = None  # as the first one says
    tensors: InputSpec | None = None  # what all tensors are, from the first one on

    @classmethod
    def of(cls, schema: pa.Schema, data: DataConfig, where: str) -> "_Columns":
        """Finds the columns in a batch and decides what is stored of them."""
        image = find_image_column(schema, data.image_column, where, data.label_column)
        label = find_label_column(schema, data.label_column, where)
        check_apart(image, label, where)
        kept = {key: text for key, text in (schema.metadata or {}).items() if key == _HUGGINGFACE}
        fields = [
            pa.field(image, pa.large_binary()),
            pa.field(label, _label_type(schema.field(label))),
        ]
        return cls(image=image, label=label, schema=pa.schema(fields, metadata=kept))

    def labels(self, batch: pa.RecordBatch, where: str) -> pa.Array:
        """Returns a batch's labels as they are stored."""
        column, wanted = batch.column(self.label), self.schema.field(self.label).type
        if num_axes_of_values(batch.schema.field(self.label)) == 1:
            column = value_lists(column, batch.schema.field(self.label))
        if pa.types.is_dictionary(column.type):
            column = pc.cast(column, column.type.value_type)
        if is_text(column.type) != is_text(wanted):
            raise DataError(
                f"{where}, column {self.label!r}: it begins with {wanted} and goes on with {column.type}",
                "give all labels the same type",
            )
        try:
            return pc.cast(column, wanted)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise DataError(
                f"{where}, column {self.label!r}: {first_line(error)}", "correct or remove the row"
            ) from None

    def stored(self, image: StoredImage, data: DataConfig) -> bytes:
        """Returns what is stored of an image or a tensor.

        Raises:
            Undecodable: there is none, or a tensor with NaN.
            DataError: a tensor of another shape or type than the first, or an image among tensors.
        """
        if isinstance(image, Unusable):
            raise Undecodable(image.reason)
        kind = "images" if isinstance(image, bytes) or is_image(np.asarray(image)) else "tensors"
        self.holds = self.holds or kind
        if kind != self.holds:
            raise DataError(f"it is one of the {kind}, and the first one was of the {self.holds}", "give one kind")
        if kind == "tensors":
            return self._tensor(np.asarray(image), data)
        return image if isinstance(image, bytes) else _ppm(np.asarray(image))

    def _tensor(self, tensor: np.ndarray, data: DataConfig) -> bytes:
        if self.tensors is None:
            self.tensors = tensor_inputs(tensor, data.num_tokens)
            spec = TensorSpec(self.tensors.dtype, self.tensors.shape)
            self.schema = self.schema.set(0, tensor_field(spec).with_name(self.image).with_nullable(True))
        if tensor.shape != self.tensors.shape:
            raise DataError(
                f"its shape is {tensor.shape}, the first one's {self.tensors.shape}",
                "give all the same shape: pad them, or cut them",
            )
        # A tensor with NaN that is to be skipped is left to ingest, which counts it and says why.
        stored = stored_tensor(tensor, self.tensors, with_nan=data.on_bad_image == "skip")
        return np.ascontiguousarray(stored).tobytes()


def _label_type(field: pa.Field) -> pa.DataType:
    axes = num_axes_of_values(field)
    if axes is not None:
        return pa.list_(pa.float64()) if axes else pa.float64()
    value = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    return pa.string() if is_text(value) else pa.int64()


def _tables(batches: Iterator[pa.RecordBatch], data: DataConfig, where: str) -> Iterator[pa.Table]:
    """Yields what goes into each file."""
    columns: _Columns | None = None
    skipped = SkippedImages(data.on_bad_image)
    images: list[bytes | None] = []
    labels: list[Any] = []
    num_bytes = num_rows = 0
    for batch in batches:
        if batch.num_rows == 0:  # Ray Data may give an empty block no columns
            continue
        columns = columns or _Columns.of(batch.schema, data, where)
        for image, label in _rows(batch, columns, where):
            encoded = _stored(image, columns, f"{where}, row {num_rows}, column {columns.image!r}", data, skipped)
            size = len(encoded or b"") + _ROW_BYTES
            if images and num_bytes + size > FILE_BYTES:
                yield pa.table([images, labels], schema=columns.schema)
                images, labels, num_bytes = [], [], 0
            images.append(encoded)
            labels.append(label)
            num_bytes += size
            num_rows += 1
    if images and columns is not None:
        yield pa.table([images, labels], schema=columns.schema)


def _rows(batch: pa.RecordBatch, columns: _Columns, where: str) -> Iterator[tuple[StoredImage, Any]]:
    # Another batch may hold the images as another type: Ray Data decides by what is in it.
    find_image_column(batch.schema, columns.image, where)
    find_label_column(batch.schema, columns.label, where)
    cells = image_cells(batch.schema.field(columns.image))
    images, labels = batch.column(columns.image), columns.labels(batch, where)
    for start in range(0, batch.num_rows, _CONVERTED_ROWS):
        some = labels.slice(start, _CONVERTED_ROWS).to_pylist()
        yield from zip(cells(images.slice(start, _CONVERTED_ROWS)), some, strict=True)


def _stored(
    image: StoredImage, columns: _Columns, where: str, data: DataConfig, skipped: SkippedImages
) -> bytes | None:
    """Returns an encoded image or a tensor's bytes; None stands for one that ingest will skip and count, as null."""
    try:
        return columns.stored(image, data)
    except Undecodable as error:
        skipped.check(where, str(error))
        return None
    except DataError as error:
        raise DataError(f"{where}: {error.what}", error.fix) from None


def _ppm(pixels: np.ndarray) -> bytes:
    # https://netpbm.sourceforge.net/doc/ppm.html: P5 is grey, P6 RGB; transparency is dropped, as everywhere
    height, width = pixels.shape[:2]
    is_grey = pixels.ndim == 2 or pixels.shape[2] == 1
    kept = pixels if is_grey else pixels[:, :, :3]
    return b"P%d %d %d 255\n" % (5 if is_grey else 6, width, height) + kept.tobytes()


def _encoded(table: pa.Table) -> memoryview:
    rows = max(1, _GROUP_BYTES * table.num_rows // max(1, table.nbytes))
    label = table.schema.names[1]
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        row_group_size=rows,
        compression="zstd",
        compression_level=1,
        use_dictionary=[label],
        write_statistics=[label],
    )
    return memoryview(sink.getvalue())
