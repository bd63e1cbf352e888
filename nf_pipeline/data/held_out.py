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

UNKNOWN = -1
"""What the shards of the test split hold in place of labels."""

_SCHEMA = pa.schema(
    [pa.field("sample_id", pa.int64(), nullable=False), pa.field("label", pa.int64(), nullable=False)]
)


class HeldOutLabels:
    """Labels by sample; made empty, filled batch by batch. Takes 16 bytes per sample."""

    def __init__(self) -> None:
        self._sample_ids = np.zeros(0, np.int64)
        self._labels = np.zeros(0, np.int64)
        self._added: list[tuple[np.ndarray, np.ndarray]] = []

    def hold_back(self, labels: np.ndarray, sample_ids: np.ndarray) -> np.ndarray:
        """Takes the labels of some samples, int64 [N], and returns what is stored beside their images instead."""
        self._added.append((sample_ids, labels))
        return np.full_like(labels, UNKNOWN)

    def of(self, sample_ids: np.ndarray) -> np.ndarray:
        """Returns the labels of samples, int64 [N].

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
        table = pa.table([pa.array(self._sample_ids), pa.array(self._labels)], schema=_SCHEMA)
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
    if not table.schema.equals(_SCHEMA) or any(column.null_count for column in table.columns):
        raise ValueError(f"got the columns {table.schema.names}, want {_SCHEMA.names} without nulls")
    labels = HeldOutLabels()
    labels.hold_back(table["label"].to_numpy(), table["sample_id"].to_numpy())
    return labels
