"""Checks the labels of a whole source before any image is read, settles what they are, and names the classes.

Knows nothing of where labels come from. Entry: `read_labels`.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from nf_pipeline.data.base import Source, Split
from nf_pipeline.errors import DataError
from nf_pipeline.samples import TargetSpec

MAX_NAME_CHARS = 1000
"""Characters of a class's name: every record of the run repeats all names."""

_MOST_WHOLE = 2**24  # from here on float32 skips whole numbers


@dataclass(frozen=True, kw_only=True)
class Labels:
    """Checked labels.

    Attributes:
        by_split: per split that the data brings: int64 [N], each in [0, len(class_names)), or float32 [N, K].
        class_names: by label; numbers as text where the data has no names. Empty where labels are values.
    """

    by_split: dict[Split, np.ndarray]
    class_names: tuple[str, ...]

    @property
    def target(self) -> TargetSpec:
        """What is to be predicted."""
        if self.class_names:
            return TargetSpec(size=len(self.class_names))
        return TargetSpec(kind="values", size=self.by_split["train"].shape[1])

    @property
    def num_strata(self) -> int:
        """Groups of rows that every split has its share of: the classes; of values one."""
        return max(1, len(self.class_names))

    @cached_property
    def strata(self) -> dict[Split, np.ndarray]:
        """The group of every row, int64 [N]; made once: they are asked for with every batch that is written."""
        if self.class_names:
            return self.by_split
        return {split: np.zeros(len(labels), np.int64) for split, labels in self.by_split.items()}


def read_labels(source: Source, target: Literal["auto", "class", "values"] = "auto") -> Labels:
    """Reads and checks every label of every split.

    Args:
        source: whose labels are int64 where they are classes, float32 where they are values.
        target: "class" takes whole values for classes, "values" numbered classes for one value each.

    Raises:
        DataError: a label is null, negative, out of range or not what `target` says, a split has no rows, fewer than
            two classes, or a class has no image in train; names the file, the row and the column of the first one.
    """
    if "train" not in source.splits:
        raise DataError(
            f"{source.name}: split train is empty: the data brings only {', '.join(source.splits)}",
            "add a train split, or rename the files of the one there is",
        )
    by_split = {split: _settled(source, split, source.labels(split), target) for split in source.splits}
    for split, labels in by_split.items():
        _check_rows(source, split, labels)
    if by_split["train"].ndim == 2:
        return Labels(by_split=by_split, class_names=())
    for split, labels in by_split.items():
        _check_range(source, split, labels)
    names = source.class_names or tuple(str(label) for label in _numbered(source, by_split))
    _check_train_has_all(source, by_split, names)
    if len(names) < 2:
        raise DataError(f"{source.name}: got 1 class, want at least 2", "a data set with two or more classes")
    longest = max(names, key=len)
    if len(longest) > MAX_NAME_CHARS:
        raise DataError(
            f"{source.name}: the class name {longest[:40]!r}... has {len(longest)} characters, want at most "
            f"{MAX_NAME_CHARS}",
            "name the classes shortly: is this the label column?",
        )
    return Labels(by_split=by_split, class_names=names)


def check_label_range(source: Source, split: Split, labels: np.ndarray, num_classes: int | None) -> None:
    """Refuses labels outside [0, num_classes).

    Raises:
        DataError: names the first row at fault.
    """
    wrong = labels < 0 if num_classes is None else (labels < 0) | (labels >= num_classes)
    if not wrong.any():
        return
    row = int(np.argmax(wrong))
    label = int(labels[row])
    problem = "is negative" if label < 0 else "is out of range"
    want = "0 or more" if num_classes is None else f"0 to {num_classes - 1}"
    raise DataError(
        f"{source.where(split, row, 'label')}: label {label} {problem}, want {want}",
        "correct or remove the row",
    )


def settled_values(source: Source, split: Split, labels: np.ndarray) -> np.ndarray:
    """Returns labels as values, float32 [N, K]; numbered classes as one value each.

    Raises:
        DataError: the classes have names other than their numbers.
    """
    if labels.ndim == 2:
        return labels
    names = source.class_names or ()
    if names != tuple(str(label) for label in range(len(names))):
        raise DataError(
            f"{source.where(split, 0, 'label')}: the label is one of {len(names)} named classes, want values",
            "--set data.target=class, or a label column with numbers",
        )
    return labels[:, None].astype(np.float32)


def settled_classes(source: Source, split: Split, labels: np.ndarray) -> np.ndarray:
    """Returns labels as classes, int64 [N]; one whole value for each row as the number of its class.

    Raises:
        DataError: there are several, or one that is not whole; names the row.
    """
    if labels.ndim == 1:
        return labels
    wrong = (labels != np.rint(labels)).any(axis=1) if labels.shape[1] == 1 else np.ones(len(labels), bool)
    wrong |= (np.abs(labels) >= _MOST_WHOLE).any(axis=1)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise DataError(
            f"{source.where(split, row, 'label')}: label {labels[row].tolist()[:5]}, want the number of a class",
            "--set data.target=values, or a label column with whole numbers or text",
        )
    return labels[:, 0].astype(np.int64)


def _settled(source: Source, split: Split, labels: np.ndarray, target: str) -> np.ndarray:
    if target == "auto":
        return labels
    return settled_values(source, split, labels) if target == "values" else settled_classes(source, split, labels)


def _check_rows(source: Source, split: Split, labels: np.ndarray) -> None:
    if len(labels) == 0:
        raise DataError(f"{source.name}: split {split} is empty", f"add rows to {split}, or remove its files")


def _check_range(source: Source, split: Split, labels: np.ndarray) -> None:
    names = source.class_names
    check_label_range(source, split, labels, len(names) if names else None)


def _numbered(source: Source, by_split: dict[Split, np.ndarray]) -> range:
    # Gaps are looked for before a range as long as the largest label is walked: it may be 10**15.
    present = np.unique(by_split["train"])
    gap = np.flatnonzero(present != np.arange(len(present)))
    if len(gap):
        raise _missing(source, str(gap[0]), f"its labels go up to {present[-1]}")
    return range(len(present))


def _check_train_has_all(source: Source, by_split: dict[Split, np.ndarray], names: tuple[str, ...]) -> None:
    present = np.unique(by_split["train"])
    for split, labels in by_split.items():
        absent = ~np.isin(labels, present)
        if absent.any():
            row = int(np.argmax(absent))
            place = source.where(split, row, "label")
            raise _missing(source, _class_text(names, int(labels[row])), f"first seen at {place} in {split}")
    unseen = np.setdiff1d(np.arange(len(names)), present)
    if len(unseen):
        raise _missing(source, _class_text(names, int(unseen[0])), f"the data names {len(names)} classes")


def _class_text(names: tuple[str, ...], label: int) -> str:
    return f"{label} ({names[label]!r})" if label < len(names) and names[label] != str(label) else str(label)


def _missing(source: Source, label: str, why: str) -> DataError:
    return DataError(
        f"{source.name}: class {label} has no image in split train; {why}",
        "add images of this class to train, or number (name) only the classes that are there",
    )
