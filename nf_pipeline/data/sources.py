"""From the configuration's `data.source` to an open source. Entry: `open_source`; for records `absolute_source`.

`digits` is the 8x8 grey images of the test part of "Optical Recognition of Handwritten Digits" (E. Alpaydin
and C. Kaynak, UCI Machine Learning Repository 1998, https://doi.org/10.24432/C50P49, CC BY 4.0). The packaged
file was made once with scikit-learn:

    digits = sklearn.datasets.load_digits()
    pixels = np.rint(digits.images * 255 / 16).astype(np.uint8)      # 0..16 -> 0..255
    one row for each: image {bytes: PNG of the pixels, path: null}, label: int64; zstd, row groups of 600
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path

from nf_pipeline.config import DataConfig
from nf_pipeline.data.base import Source, printable
from nf_pipeline.data.files import is_parquet_name, list_parquet_files
from nf_pipeline.data.image_folder import ImageFolderSource
from nf_pipeline.data.parquet import ParquetSource
from nf_pipeline.errors import DataError

DIGITS = "digits"
_TORCHVISION = "torchvision:"
_DEFAULT_ROOT = "./data"  # of torchvision's data sets
_FILE = "file://"


def open_source(cfg: DataConfig) -> Source:
    """Opens the data set that the configuration names; reads names, footers and sizes, no images.

    Args:
        cfg: `source` is `digits`, a folder or file, file:///..., s3://..., a class of torchvision.datasets,
            or torchvision:NAME:ROOT.

    Raises:
        DataError: there is no such data set, or it cannot be used.
        StorageError: object storage cannot be reached.
    """
    source = cfg.source
    if source == DIGITS:
        digits = resources.files("nf_pipeline.data").joinpath("digits.parquet")
        with resources.as_file(digits) as path:
            return _parquet(DIGITS, str(path), cfg)
    if source.startswith(_TORCHVISION):
        return _torchvision(*source.removeprefix(_TORCHVISION).split(":", 1))
    if source.startswith("s3://"):
        return _parquet(source.rstrip("/").rsplit("/", 1)[-1], source, cfg)
    with source_readable(source):
        return _open_local(source, cfg)


def absolute_source(source: str) -> str:
    """Names the same data whatever folder a program is started in.

    Loads torch only for a bare name that is no file or folder here: it may be one of torchvision.datasets.

    Args:
        source: as `open_source` takes it.

    Returns:
        `digits` and URIs of object storage as they are, torchvision:NAME:ROOT with an absolute root, and the
        absolute path of anything else, without file://. The same text if given again.
    """
    if source == DIGITS:
        return source
    if source.startswith(_TORCHVISION):
        return _absolute_torchvision(*source.removeprefix(_TORCHVISION).split(":", 1))
    if "://" in source and not source.startswith(_FILE):
        return source
    path = _expanded(source)
    if not os.path.exists(path) and _is_torchvision_name(source):
        return _absolute_torchvision(source)
    return os.path.abspath(path)


def local_path(source: str) -> Path:
    """Returns the path that a source names, with or without file://.

    Raises:
        DataError: it is a URI of another kind.
    """
    scheme, separator, _ = source.partition("://")
    if separator and scheme != "file":
        raise DataError(
            f"data source {printable(source)}: unknown scheme {scheme!r}", "a folder or s3://bucket/prefix"
        )
    return Path(_expanded(source))


@contextmanager
def source_readable(source: str) -> Iterator[None]:
    """Turns what listing local files can raise into an error that names the source.

    Raises:
        DataError: a folder or file cannot be read.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        where = f" ({printable(os.fsdecode(error.filename))})" if isinstance(error.filename, str | bytes) else ""
        raise DataError(
            f"data source {printable(source)}: cannot be read: {reason}{where}", "give data that can be read"
        ) from error
    except RecursionError:
        raise DataError(
            f"data source {printable(source)}: its folders are nested too deeply", "DIR/CLASS/* or DIR/train/CLASS/*"
        ) from None


def has_parquet(folder: Path) -> bool:
    """Tells whether a folder holds Parquet files, at any depth."""
    return any(is_parquet_name(path.name) for path in folder.rglob("*"))


def _open_local(source: str, cfg: DataConfig) -> Source:
    path = local_path(source)
    if path.is_dir() and not has_parquet(path):
        return ImageFolderSource(path)
    if path.exists():
        return _parquet(printable(path.resolve().name), str(path), cfg)
    return _by_name(source)


def _by_name(source: str) -> Source:
    if _is_torchvision_name(source):
        return _torchvision(source)
    raise DataError(
        f"data source {printable(source)}: no such folder, file or torchvision data set",
        "--data DIR with Parquet files or class folders, --data s3://bucket/prefix, or --data digits",
    )


def _parquet(name: str, uri: str, cfg: DataConfig) -> ParquetSource:
    return ParquetSource(name, list_parquet_files(uri), image_column=cfg.image_column, label_column=cfg.label_column)


def _expanded(source: str) -> str:
    return os.path.expanduser(source.removeprefix(_FILE))


def _is_torchvision_name(source: str) -> bool:
    if not source.isidentifier():
        return False
    from nf_pipeline.data.torchvision_sets import is_torchvision_name  # loads torch

    return is_torchvision_name(source)


def _absolute_torchvision(name: str, root: str = _DEFAULT_ROOT) -> str:
    return f"{_TORCHVISION}{name}:{os.path.abspath(os.path.expanduser(root))}"


def _torchvision(name: str, root: str = _DEFAULT_ROOT) -> Source:
    from nf_pipeline.data.torchvision_sets import TorchvisionSource  # loads torch

    return TorchvisionSource(name, os.path.expanduser(root))
