"""Data sets of torchvision.datasets as a source, from a folder where they are already; nothing is downloaded.

Only data sets whose labels can be read without decoding images are offered. Images are fetched by the threads
that decode them. Entry: `TorchvisionSource`.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from nf_pipeline.data.base import SPLITS, Column, RawImage, Split, Unusable
from nf_pipeline.data.files import first_line
from nf_pipeline.errors import ConfigError, DataError
from nf_pipeline.near_names import near_names

# They unpickle a list of keys that lies beside the data, which anybody may have put there. CIFAR10 and CIFAR100 are
# pickles too, but torchvision opens only those whose MD5 it knows.
_UNSAFE = ("LSUN", "LSUNClass")

_LABEL_ATTRIBUTES = ("targets", "labels", "_labels", "y")


class TorchvisionSource:
    """One class of torchvision.datasets.

    Args:
        dataset: class name, such as "CIFAR10".
        root: folder that torchvision keeps it in.

    Raises:
        ConfigError: no such data set, with near names.
        DataError: it is not in `root`, or its labels cannot be read.
    """

    def __init__(self, dataset: str, root: str) -> None:
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
            yield RawImage(row, partial(_fetch, self._sets[split], row))

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
        *_UNSAFE,
    )


def _find(name: str) -> Any:
    from torchvision import datasets

    if not is_torchvision_name(name):
        near = near_names(name, datasets.__all__)
        raise ConfigError(
            f"torchvision has no data set {name!r}" + (f"; near: {', '.join(near)}" if near else ""),
            "--data torchvision:CIFAR10:ROOT",
        )
    return getattr(datasets, name)


def _open_splits(factory: Any, name: str, root: str) -> dict[Split, Any]:
    accepted = inspect.signature(factory).parameters
    _refuse_own_settings(accepted, name)
    given: dict[str, Any] = {"root": root}
    if "download" in accepted:
        given["download"] = False
    if "train" in accepted:
        choices: dict[Split, dict[str, Any]] = {"train": {"train": True}, "test": {"train": False}}
    elif "split" in accepted:
        choices = {split: {"split": split} for split in SPLITS}
    else:
        choices = {"train": {}}
    return {
        split: opened
        for split, choice in choices.items()
        if (opened := _open(factory, name, given | choice, optional=split != "train")) is not None
    }


def _refuse_own_settings(accepted: Mapping[str, inspect.Parameter], name: str) -> None:
    # EMNIST, for one, is six data sets, told apart by a `split` without a default.
    needed = [
        parameter.name
        for parameter in accepted.values()
        if parameter.default is parameter.empty
        and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        and parameter.name != "root"
    ]
    if needed:
        raise DataError(
            f"torchvision {name}: it cannot be opened without a choice of its own ({', '.join(needed)}), which "
            "has no setting here",
            "convert the part that you want to Parquet or an image folder",
        )


def _open(factory: Any, name: str, given: dict[str, Any], *, optional: bool) -> Any:
    try:
        return factory(**given)
    except ValueError as error:
        if optional:  # this data set has no such split
            return None
        raise DataError(
            f"torchvision {name} cannot be opened with {given}: {first_line(error)}",
            "convert it to Parquet or an image folder",
        ) from error
    except ImportError as error:
        raise DataError(f"torchvision {name} cannot be opened: {first_line(error)}", "install it") from error
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"torchvision {name} is not in {given['root']}: {first_line(error)}",
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


def _fetch(opened: Any, row: int) -> Image.Image | Unusable:
    image = opened[row][0]
    return image if isinstance(image, Image.Image) else Unusable(f"it is no image but a {type(image).__name__}")
