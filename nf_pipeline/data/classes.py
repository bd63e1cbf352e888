"""Checks the labels of a whole source before any image is read, and names the classes.

Knows nothing of where labels come from. Entry: `read_labels`.
"""

from dataclasses import dataclass

import numpy as np

from nf_pipeline.data.base import Source, Split
from nf_pipeline.errors import DataError

MAX_NAME_CHARS = 1000
"""Characters of a class's name: every record of the run repeats all names."""


@dataclass(frozen=True, kw_only=True)
class Labels:
    """Checked labels.

    Attributes:
        by_split: int64 per split that the data brings, each in [0, len(class_names)).
        class_names: by label; numbers as text where the data has no names.
    """

    by_split: dict[Split, np.ndarray]
    class_names: tuple[str, ...]


def read_labels(source: Source) -> Labels:
    """Reads and checks every label of every split.

    Raises:
        DataError: a label is null, negative or out of range, a split has no rows, fewer than two classes,
            or a class has no image in train; names the file, the row and the column of the first one.
    """
    if "train" not in source.splits:
        raise DataError(
            f"{source.name}: split train is empty: the data brings only {', '.join(source.splits)}",
            "add a train split, or rename the files of the one there is",
        )
    by_split = {split: source.labels(split) for split in source.splits}
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


def _check_range(source: Source, split: Split, labels: np.ndarray) -> None:
    if len(labels) == 0:
        raise DataError(f"{source.name}: split {split} is empty", f"add rows to {split}, or remove its files")
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
