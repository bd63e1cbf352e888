"""Data sets of torchvision.datasets as a source, from a folder where they are already; nothing is downloaded.

Only data sets whose labels can be read without decoding images are offered. Entry: `TorchvisionSource`.
"""

import difflib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from nf_pipeline.data.base import Column, RawImage, Split, StoredImage
from nf_pipeline.errors import ConfigError, DataError

DEFAULT_ROOT = "./data"

_LABEL_ATTRIBUTES = ("targets", "labels", "_labels", "y")
_SPLIT_WORDS: dict[Split, str] = {"train": "train", "val": "val", "test": "test"}


class TorchvisionSource:
    """One class of torchvision.datasets.

    Args:
        dataset: class name, such as "CIFAR10".
        root: folder that torchvision keeps it in.

    Raises:
        ConfigError: no such data set, with near names.
        DataError: it is not in `root`, or its labels cannot be read.
    """

    def __init__(self, dataset: str, root: str = DEFAULT_ROOT) -> None:
        self.name = dataset
        factory = _find(dataset)
        self._sets = _open_splits(factory, dataset, root)
        self.splits = tuple(self._sets)
        self._labels = {split: _labels_of(opened, dataset) for split, opened in self._sets.items()}

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The data set's `classes`, where it has them."""
        names = getattr(self._sets[self.splits[0]], "classes", None)
        return tuple(str(name) for name in names) if isinstance(names, Sequence) and names else None

    def describe(self) -> dict[str, Any]:
        """Returns the name and the rows of each split; torchvision itself checks the files' checksums."""
        rows = {split: self.num_rows(split) for split in self.splits}
        return {"kind": "torchvision", "dataset": self.name, "rows": rows}

    def num_rows(self, split: Split) -> int:
        """Counts the rows of a split."""
        return len(self._labels[split])

    def labels(self, split: Split) -> np.ndarray:
        """Returns the label of every row, int64 [num_rows]."""
        return self._labels[split]

    def read(self, split: Split, wanted: np.ndarray, seed: int | None) -> Iterator[RawImage]:
        """Yields the wanted rows, in random order if there is a seed."""
        rows = np.flatnonzero(wanted)
        if seed is not None:
            rows = np.random.default_rng([seed, 1]).permutation(rows)
        for row in rows.tolist():
            yield RawImage(row, _pixels(self._sets[split], row))

    def where(self, split: Split, row: int, column: Column) -> str:
        """Names a row of a split."""
        return f"torchvision {self.name} {split}, row {row}, {column}"

    def image_id(self, split: Split, row: int) -> str:
        """Returns "split:row"."""
        return f"{split}:{row}"


def is_torchvision_name(name: str) -> bool:
    """Tells whether torchvision.datasets has a class of this name."""
    from torchvision import datasets  # loads torch

    return name in datasets.__all__ and name not in (
        "FakeData",
        "ImageFolder",
        "DatasetFolder",
        "VisionDataset",
    )


def _find(name: str) -> Any:
    from torchvision import datasets

    if not is_torchvision_name(name):
        near = difflib.get_close_matches(name, datasets.__all__, n=3, cutoff=0.4)
        raise ConfigError(
            f"torchvision has no data set {name!r}" + (f"; near: {', '.join(near)}" if near else ""),
            "--data torchvision:CIFAR10:ROOT",
        )
    return getattr(datasets, name)


def _open_splits(factory: Any, name: str, root: str) -> dict[Split, Any]:
    accepted = inspect.signature(factory).parameters
    given: dict[str, Any] = {"root": root}
    if "download" in accepted:
        given["download"] = False
    if "train" in accepted:
        choices: dict[Split, dict[str, Any]] = {"train": {"train": True}, "test": {"train": False}}
    elif "split" in accepted:
        choices = {split: {"split": word} for split, word in _SPLIT_WORDS.items()}
    else:
        choices = {"train": {}}
    return {
        split: opened
        for split, choice in choices.items()
        if (opened := _open(factory, name, root, given | choice, optional=split == "val")) is not None
    }


def _open(factory: Any, name: str, root: str, given: dict[str, Any], *, optional: bool) -> Any:
    try:
        return factory(**given)
    except ValueError:
        if optional:  # this data set has no such split
            return None
        raise DataError(f"torchvision {name}: it takes no {given}", "convert it to Parquet or a folder") from None
    except (RuntimeError, OSError, TypeError, ImportError) as error:
        raise DataError(
            f"torchvision {name} is not in {root}: {str(error).splitlines()[0] if str(error) else error!r}",
            f"--data torchvision:{name}:ROOT with the folder it was downloaded to",
        ) from error


def _labels_of(opened: Any, name: str) -> np.ndarray:
    for attribute in _LABEL_ATTRIBUTES:
        labels = np.asarray(getattr(opened, attribute, None))
        if labels.ndim == 1 and labels.dtype.kind in "iu" and len(labels) == len(opened):
            return labels.astype(np.int64)
    raise DataError(
        f"torchvision {name}: its labels cannot be read without its images",
        "convert it to Parquet or an image folder",
    )


def _pixels(opened: Any, row: int) -> StoredImage:
    pixels = np.asarray(opened[row][0])
    return pixels if pixels.dtype == np.uint8 else pixels.astype(np.uint8)
