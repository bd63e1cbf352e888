"""The labels of the test split, apart from its images: ingest stores the images with `UNKNOWN` in place of a label.

So whoever reads the shards of the test split reads no label, whatever it does. The labels are one object of the
ingest stage; `nf_pipeline.worker.choice.read_test_labels` alone opens it, once an exit is chosen. Knows nothing of
stores and choices. Entries: `HeldOutLabels`, `decode_labels`.
"""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nf_pipeline.errors import ObjectCorrupt
from nf_pipeline.storage.label_column import label_array, label_field, labels_of, num_values_of

UNKNOWN = -1
"""What the shards of the test split hold in place of classes; NaN stands for values."""


class HeldOutLabels:
    """Labels by sample; made empty, filled batch by batch. Takes 8 bytes per sample and those of its label."""

    def __init__(self) -> None:
        self._sample_ids = np.zeros(0, np.int64)
        self._labels = np.zeros(0, np.int64)
        self._added: list[tuple[np.ndarray, np.ndarray]] = []

    def hold_back(self, labels: np.ndarray, sample_ids: np.ndarray) -> np.ndarray:
        """Takes the labels of some samples, int64 [N] or float32 [N, K], and returns what is stored instead."""
        self._added.append((sample_ids, labels))
        return np.full_like(labels, UNKNOWN if labels.ndim == 1 else np.nan)

    def of(self, sample_ids: np.ndarray) -> np.ndarray:
        """Returns the labels of samples, int64 [N] or float32 [N, K].

        Raises:
            ObjectCorrupt: a sample has none.
        """
        self._sort()
        places = np.searchsorted(self._sample_ids, sample_ids).clip(max=max(0, len(self._sample_ids) - 1))
        if len(sample_ids) and not (len(self._labels) and np.array_equal(self._sample_ids[places], sample_ids)):
            raise ObjectCorrupt(f"the held-out labels of {len(self._labels)} samples are not those of the test split")
        return self._labels[places]

    def encode(self) -> bytes:
        """Returns a Parquet file of all labels, by sample id: the same labels give the same bytes."""
        self._sort()
        num_values = self._labels.shape[1] if self._labels.ndim == 2 else 0
        columns = [pa.array(self._sample_ids), label_array(np.ascontiguousarray(self._labels))]
        table = pa.table(columns, schema=_schema(num_values))
        file = io.BytesIO()
        pq.write_table(table, file)
        return file.getvalue()

    def _sort(self) -> None:
        if self._added:
            sample_ids, labels = (np.concatenate(column) for column in zip(*self._added, strict=True))
            order = sample_ids.argsort()
            self._sample_ids, self._labels = sample_ids[order], labels[order]
            self._added = [(self._sample_ids, self._labels)]


def decode_labels(data: bytes) -> HeldOutLabels:
    """Reads what `HeldOutLabels.encode` returned.

    Raises:
        ValueError: it is something else.
    """
    try:
        table = pq.read_table(io.BytesIO(data))
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"no Parquet file: {error}") from None
    num_values = num_values_of(table.schema)
    if not table.schema.equals(_schema(num_values)) or any(column.null_count for column in table.columns):
        raise ValueError(f"got the columns {table.schema.names}, want {_schema(0).names} without nulls")
    labels = HeldOutLabels()
    labels.hold_back(labels_of(table["label"]), table["sample_id"].to_numpy())
    return labels


def _schema(num_values: int) -> pa.Schema:
    return pa.schema([pa.field("sample_id", pa.int64(), nullable=False), label_field(num_values)])
