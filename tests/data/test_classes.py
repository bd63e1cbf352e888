import numpy as np
import pytest

from nf_pipeline.data.classes import Labels, read_labels
from nf_pipeline.errors import DataError


class LabelsOnly:
    """A source without images."""

    name = "set"

    def __init__(self, class_names=None, **labels):
        self._labels = {split: np.asarray(values, np.int64) for split, values in labels.items()}
        self.class_names = class_names
        self.splits = tuple(labels)

    def labels(self, split):
        return self._labels[split]

    def where(self, split, row, column):
        return f"{split}.parquet, row {row}, column '{column}'"


def test_numbers_name_themselves():
    labels = read_labels(LabelsOnly(train=[1, 0, 2], test=[2]))

    assert labels.class_names == ("0", "1", "2")
    assert labels.by_split["test"].tolist() == [2]


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (LabelsOnly(train=[0, 1, -1]), "train.parquet, row 2, column 'label': label -1 is negative"),
        (
            LabelsOnly(("a", "b"), train=[0, 1, 2]),
            "train.parquet, row 2, column 'label': label 2 is out of range",
        ),
        (
            LabelsOnly(("a", "b"), train=[0, 1], test=[7]),
            "test.parquet, row 0, column 'label': label 7 is out of",
        ),
        (LabelsOnly(train=[0, 1, 3]), "class 2 has no image in split train; its labels go up to 3"),
        (LabelsOnly(train=[0, 10**15]), "class 1 has no image in split train"),
        (LabelsOnly(train=[1, 2]), "class 0 has no image in split train"),
        (
            LabelsOnly(train=[0, 1], test=[0, 2]),
            "class 2 has no image in split train; first seen at test.parquet, row 1",
        ),
        (LabelsOnly(("a", "b", "c"), train=[0, 2]), r"class 1 \('b'\) has no image in split train"),
        (LabelsOnly(train=[0, 1], test=[]), "split test is empty"),
        (LabelsOnly(train=[]), "split train is empty"),
        (LabelsOnly(test=[0, 1]), "split train is empty: the data brings only test"),
        (LabelsOnly(train=[0, 0]), "got 1 class, want at least 2"),
    ],
)
def test_unusable_labels_are_refused_with_their_place(source, text):
    with pytest.raises(DataError, match=text) as caught:
        read_labels(source)
    assert "Fix:" in str(caught.value)


def test_groups_of_values_are_one_for_all_rows_and_made_once():
    labels = Labels(by_split={"train": np.zeros((3, 2), np.float32)}, class_names=())

    assert labels.num_strata == 1
    assert labels.strata["train"].tolist() == [0, 0, 0]
    assert labels.strata is labels.strata


def test_groups_of_classes_are_the_classes():
    labels = Labels(by_split={"train": np.array([1, 0])}, class_names=("a", "b"))

    assert labels.num_strata == 2
    assert labels.strata["train"].tolist() == [1, 0]
