"""Labels that are kept apart come back by sample, and nothing else passes for them."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nf_pipeline.data.held_out import UNKNOWN, HeldOutLabels, decode_labels
from nf_pipeline.errors import ObjectCorrupt


def held(*batches: tuple[list[int], list[int]]) -> HeldOutLabels:
    labels = HeldOutLabels()
    for ids, values in batches:
        assert labels.hold_back(np.array(values), np.array(ids)).tolist() == [UNKNOWN] * len(ids)
    return labels


def test_labels_come_back_for_samples_in_any_order() -> None:
    labels = decode_labels(held(([7, 3], [1, 2]), ([5], [0])).encode())
    assert labels.of(np.array([5, 7, 3, 7])).tolist() == [0, 1, 2, 1]


def test_values_come_back_for_samples_in_any_order() -> None:
    values = np.array([[1.5, -2.0], [0.25, 3.0], [0.0, 1e-30]], np.float32)
    labels = HeldOutLabels()
    stored = labels.hold_back(values, np.array([7, 3, 5]))

    assert stored.dtype == np.float32 and np.isnan(stored).all() and stored.shape == (3, 2)
    assert np.array_equal(decode_labels(labels.encode()).of(np.array([3, 7, 3])), values[[1, 0, 1]])


def test_same_labels_give_the_same_bytes_whatever_order_they_came_in() -> None:
    assert held(([7, 3], [1, 2]), ([5], [0])).encode() == held(([5, 7], [0, 1]), ([3], [2])).encode()


@pytest.mark.parametrize("wanted", [[4], [3, 99], [-1]])
def test_sample_without_a_label_is_no_other_ones(wanted: list[int]) -> None:
    with pytest.raises(ObjectCorrupt, match="not those of the test split"):
        held(([7, 3], [1, 2])).of(np.array(wanted))
    with pytest.raises(ObjectCorrupt, match="not those of the test split"):
        HeldOutLabels().of(np.array(wanted))


def parquet(**columns: pa.Array) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file)
    return file.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PAR1",
        held(([1], [2])).encode()[:-1],
        parquet(sample_id=pa.array([1])),
        parquet(sample_id=pa.array([1]), label=pa.array([None], pa.int64())),
        parquet(sample_id=pa.array([1]), label=pa.array(["cat"])),
    ],
)
def test_bytes_that_are_no_labels_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"Parquet|columns"):
        decode_labels(data)
