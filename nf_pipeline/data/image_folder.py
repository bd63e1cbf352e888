"""Folders of image files as a source: DIR/CLASS/* or DIR/train/CLASS/*, with val and test beside train.

Every regular file below a class folder is taken for an image, so that one that is none gets noticed. Links
that lead out of the folder are not followed. Files are read by the threads that decode them.
Entry: `ImageFolderSource`, and `list_images` for folders without classes.
"""

import hashlib
import os
import stat
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nf_pipeline.data.base import SPLITS, Column, RawImage, Split, Unusable, printable
from nf_pipeline.data.split_names import split_of
from nf_pipeline.errors import DataError

MAX_FILE_BYTES = 256 * 2**20
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


class ImageFolderSource:
    """A data set of image files, one folder for each class.

    Args:
        root: DIR.

    Raises:
        DataError: no class folders, or an image that lies in none.
    """

    def __init__(self, root: Path) -> None:
        self.name = printable(root.resolve().name)
        self._root = root
        self._real_root = os.path.realpath(root)
        folders = _split_folders(root)
        self.splits = tuple(split for split in SPLITS if split in folders)
        listed = {split: _list_classes(root, folders[split]) for split in self.splits}
        self._classes = sorted({name for classes in listed.values() for name in classes})
        if not self._classes:
            raise DataError(
                f"{printable(str(root))}: neither Parquet files nor class folders with images",
                "DIR/CLASS/*.png, DIR/train/CLASS/*.png or DIR/*.parquet",
            )
        self._paths = {
            split: [path for name in sorted(found) for path in found[name]] for split, found in listed.items()
        }
        self._labels = {split: self._number(found) for split, found in listed.items()}

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the class folders of all splits, sorted."""
        return tuple(printable(name) for name in self._classes)

    def describe(self) -> dict[str, Any]:
        """Returns the number of files and a checksum over their names and sizes."""
        digest = hashlib.sha256()
        for split in self.splits:
            for path in self._paths[split]:
                digest.update(os.fsencode(f"{split}/{path}\0{_num_bytes(self._root / path)}\n"))
        counts = {split: self.num_rows(split) for split in self.splits}
        return {"kind": "image folder", "files": counts, "checksum": digest.hexdigest()[:16]}

    def num_rows(self, split: Split) -> int:
        """Counts the files of a split."""
        return len(self._paths[split])

    def labels(self, split: Split) -> np.ndarray:
        """Returns the index of every file's class folder, int64 [num_rows]."""
        return self._labels[split]

    def read(self, split: Split, wanted: np.ndarray, seed: int | None) -> Iterator[RawImage]:
        """Yields the wanted files, in random order if there is a seed."""
        rows = np.flatnonzero(wanted)
        if seed is not None:
            rows = np.random.default_rng([seed, 1]).permutation(rows)
        paths = self._paths[split]
        for row in rows.tolist():
            yield RawImage(row, partial(read_inside, self._real_root, self._root / paths[row]))

    def where(self, split: Split, row: int, column: Column) -> str:
        """Names a file; image folders have neither rows nor columns."""
        return printable(self._paths[split][row])

    def image_id(self, split: Split, row: int) -> str:
        """Returns the file's path below DIR."""
        return self.where(split, row, "image")

    def _number(self, found: dict[str, list[str]]) -> np.ndarray:
        position = {name: label for label, name in enumerate(self._classes)}
        return np.repeat(
            np.array([position[name] for name in sorted(found)], np.int64),
            [len(found[name]) for name in sorted(found)],
        )


def read_inside(real_root: str, path: Path) -> bytes | Unusable:
    """Reads a file that lies inside a folder, links resolved.

    Args:
        real_root: the folder, without links.
        path: of the file.

    Returns:
        Its bytes, or why it was not read: a link out of the folder, no regular file, too large, forbidden.
    """
    real = os.path.realpath(path)
    if os.path.commonpath([real_root, real]) != real_root:
        return Unusable("it is a link that leads out of the data folder")
    try:
        status = os.stat(real)
        if not stat.S_ISREG(status.st_mode):
            return Unusable("it is no regular file")
        if status.st_size > MAX_FILE_BYTES:
            return Unusable(f"it has {status.st_size} bytes, want at most {MAX_FILE_BYTES}")
        return Path(real).read_bytes()
    except OSError as error:
        return Unusable(error.strerror or type(error).__name__)


def list_images(root: Path) -> list[str]:
    """Lists every file below a folder that looks like an image, relative and sorted; not hidden ones."""
    return [path for path in _walk(root, root) if path.lower().endswith(IMAGE_SUFFIXES)]


def _split_folders(root: Path) -> dict[Split, Path]:
    # A folder "train" makes a split only if it holds folders itself: it may be a class of vehicles.
    folders = {entry.name: Path(entry.path) for entry in os.scandir(root) if _is_folder(entry)}
    named = {split_of(name): path for name, path in sorted(folders.items()) if split_of(name) is not None}
    if "train" not in named or not any(_is_folder(entry) for entry in os.scandir(named["train"])):
        return {"train": root}
    return {split: path for split, path in named.items() if split is not None}


def _list_classes(root: Path, folder: Path) -> dict[str, list[str]]:
    classes = {}
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        if _is_folder(entry) or (entry.is_symlink() and entry.is_dir()):
            classes[entry.name] = list(_walk(root, Path(entry.path)))
        elif entry.name.lower().endswith(IMAGE_SUFFIXES):
            raise DataError(
                f"{printable(os.path.relpath(entry.path, root))}: an image outside a class folder",
                "move it into the folder of its class",
            )
    return classes


def _walk(root: Path, folder: Path) -> Iterator[str]:
    # A link to a folder is yielded like a file: it is never entered, and reading it says why.
    if folder.is_symlink() and folder != root:
        yield os.path.relpath(folder, root)
        return
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        if _is_folder(entry):
            yield from _walk(root, Path(entry.path))
        else:
            yield os.path.relpath(entry.path, root)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir(follow_symlinks=False) and not entry.name.startswith(".")


def _num_bytes(path: Path) -> int:
    return os.lstat(path).st_size
