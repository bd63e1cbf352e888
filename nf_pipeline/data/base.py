"""What every data source offers, and the words that errors use for a place in it.

Knows nothing of storage, splits that are cut here, or decoding. Entry: the protocol `Source`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from PIL import Image

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")

Column = Literal["image", "label"]


@dataclass(frozen=True)
class Unusable:
    """Stands for an image that the source itself cannot deliver.

    Attributes:
        reason: completes "cannot be read: ...".
    """

    reason: str


class Undecodable(Exception):
    """A sample cannot be decoded; the text says why."""


StoredImage = bytes | np.ndarray | Image.Image | Unusable
"""An encoded file, uint8 pixels of shape [H, W] or [H, W, C] with C of 1, 3 or 4, what Pillow opened, or a tensor: an
array of another type, rank or number of channels, channels first."""

ImageCell = StoredImage | Callable[[], StoredImage]
"""A callable is fetched by the thread that decodes it, so that slow disks are read in parallel."""


class RawImage(NamedTuple):
    """One image as the source holds it.

    Attributes:
        row: 0-based, within its split.
        image: not decoded yet.
    """

    row: int
    image: ImageCell


class Source(Protocol):
    """A labelled set of images, or tensors, in one or more splits; labels are read without touching images.

    Attributes:
        name: short, for summaries, such as "digits".
        splits: those the data brings, in the order of `SPLITS`.
    """

    name: str
    splits: tuple[Split, ...]

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names by label, or None where labels are bare numbers or values."""
        ...

    def describe(self) -> dict[str, Any]:
        """Returns JSON facts that change when the data changes: part of the ingest fingerprint."""
        ...

    def num_rows(self, split: Split) -> int:
        """Counts the rows of a split that the data brings."""
        ...

    def labels(self, split: Split) -> np.ndarray:
        """Returns the label of every row: classes, int64 [num_rows], or finite values, float32 [num_rows, K].

        Range checks of classes are the caller's.

        Raises:
            DataError: no label column, or a label that is no number or name, not finite or of another length.
        """
        ...

    def read(self, split: Split, wanted: np.ndarray, seed: int | None) -> Iterator[RawImage]:
        """Yields the wanted rows.

        Args:
            split: one of `splits`.
            wanted: bool [num_rows].
            seed: of the order, which is the same for the same seed; None keeps the stored order.

        Raises:
            DataError: a file cannot be read.
        """
        ...

    def where(self, split: Split, row: int, column: Column) -> str:
        """Names a cell for an error: file, and row (0-based in that file) and column where it has them."""
        ...

    def image_id(self, split: Split, row: int) -> str:
        """Names a row in predictions, unique in the source."""
        ...


def printable(name: str) -> str:
    """Escapes what a file name may hold but a log, JSON or a terminal must not see.

    Control characters, line breaks and bytes that are no UTF-8 become backslash escapes.
    """
    text = name.encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
