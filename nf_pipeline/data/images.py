"""Images or tensors for a finished model: any input, in stored order, of the shape and type that the model takes.

Knows nothing of models beyond what they take and predict, and the class names. Entry: `open_images` for inputs
without labels, `open_labelled` for inputs with labels.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from nf_pipeline.config import DataConfig
from nf_pipeline.data.base import RawImage, Source, Split, printable
from nf_pipeline.data.classes import check_label_range, settled_classes, settled_values
from nf_pipeline.data.decode import decode_stream
from nf_pipeline.data.files import is_parquet_name
from nf_pipeline.data.image_folder import list_images, read_inside
from nf_pipeline.data.skipped import SkippedImages
from nf_pipeline.data.sources import DIGITS, has_parquet, local_path, open_source, source_readable
from nf_pipeline.errors import DataError
from nf_pipeline.samples import InputSpec, TargetSpec


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelledBatch:
    """Some images with their labels.

    Attributes:
        ids: unique names of the images, N of them.
        images: [N, *shape], of the type that the model takes.
        labels: int64 [N], positions in the model's class names; or float32 [N, K], values in their own units.
    """

    ids: list[str]
    images: np.ndarray
    labels: np.ndarray


def open_images(
    cfg: DataConfig, inputs: InputSpec, skipped: SkippedImages | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Streams every image of an input, all splits, labels not needed.

    Args:
        cfg: `source` may also be one image file or a folder of images without class folders.
        inputs: what the model takes. Grey images become RGB for a model of colour images; sizes must agree unless
            `cfg.image_size` says to resize.
        skipped: counts undecodable images; None makes one with the policy of `cfg.on_bad_image`.

    Yields:
        The image's id, unique in the input, and an array of the model's shape and type.

    Raises:
        DataError: nothing there, an undecodable image, or one of another shape or type; names it.
    """
    skipped = skipped or SkippedImages(cfg.on_bad_image)
    with source_readable(cfg.source):
        files = _plain_images(cfg.source)
    if files is not None:
        yield from _file_images(*files, cfg, inputs, skipped)
        return
    source = open_source(cfg)
    for split in source.splits:
        for rows, images in _decoded(source, split, cfg, inputs, skipped):
            yield from zip((source.image_id(split, row) for row in rows.tolist()), images, strict=True)


def open_labelled(
    cfg: DataConfig,
    inputs: InputSpec,
    target: TargetSpec,
    class_names: tuple[str, ...],
    *,
    skipped: SkippedImages | None = None,
) -> Iterator[LabelledBatch]:
    """Streams the labelled images of a data set: its test split if it brings one, else all its rows.

    Named classes are matched by name, numbers are taken as they are.

    Args:
        cfg: the data set.
        inputs: as `open_images`.
        target: what the model predicts.
        class_names: of the model, by label; none where it predicts values.
        skipped: as `open_images`.

    Raises:
        DataError: as `open_images`, or a label that the model does not know.
    """
    skipped = skipped or SkippedImages(cfg.on_bad_image)
    source = open_source(cfg)
    splits: tuple[Split, ...] = ("test",) if "test" in source.splits else source.splits
    for split in splits:
        labels = _model_labels(source, split, target, class_names)
        for rows, images in _decoded(source, split, cfg, inputs, skipped):
            ids = [source.image_id(split, row) for row in rows.tolist()]
            yield LabelledBatch(ids=ids, images=images, labels=labels[rows])


def resize_for(inputs: InputSpec) -> int | None:
    """Returns the `image_size` with which images fit a model; None where it takes no squares: sizes must agree."""
    return inputs.shape[1] if inputs.is_image and inputs.shape[1] == inputs.shape[2] else None


def _model_values(source: Source, split: Split, size: int) -> np.ndarray:
    values = settled_values(source, split, source.labels(split))
    if values.shape[1] != size:
        raise DataError(
            f"{source.where(split, 0, 'label')}: {values.shape[1]} value(s), the model predicts {size}",
            "evaluate on data with the values that the model was trained on",
        )
    return values


def _model_labels(source: Source, split: Split, target: TargetSpec, class_names: tuple[str, ...]) -> np.ndarray:
    if target.kind == "values":
        return _model_values(source, split, target.size)
    labels = settled_classes(source, split, source.labels(split))
    names = source.class_names
    numbered = tuple(str(label) for label in range(len(class_names)))
    if names is None or class_names == numbered:
        check_label_range(source, split, labels, len(class_names))
        return labels
    check_label_range(source, split, labels, len(names))
    position = {name: label for label, name in enumerate(class_names)}
    mapped = np.array([position.get(name, -1) for name in names], np.int64)[labels]
    if (mapped < 0).any():
        row = int(np.argmax(mapped < 0))
        raise DataError(
            f"{source.where(split, row, 'label')}: class {names[labels[row]]!r} is none of the model's "
            f"{len(class_names)} classes",
            "evaluate on data with the classes that the model was trained on",
        )
    return mapped


def _decoded(
    source: Source, split: Split, cfg: DataConfig, inputs: InputSpec, skipped: SkippedImages
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    wanted = np.ones(source.num_rows(split), bool)

    def where(row: int) -> str:
        return source.where(split, row, "image")

    for batch in decode_stream(
        source.read(split, wanted, seed=None),
        inputs=inputs,
        image_size=cfg.image_size,
        threads=cfg.decode_threads,
        where=where,
    ):
        for row, reason in batch.bad:
            skipped.add(where(row), reason)
        yield batch.rows, batch.images


def _plain_images(source: str) -> tuple[Path, list[str]] | None:
    # A file that is no Parquet, or a folder without any; None leaves the source to `open_source`.
    if source == DIGITS or source.startswith(("s3://", "torchvision:")):
        return None
    path = local_path(source)
    if path.is_file() and not is_parquet_name(path.name):
        return path.parent, [path.name]
    if not path.is_dir() or has_parquet(path):
        return None
    found = list_images(path)
    if not found:
        raise DataError(f"{printable(source)}: no images and no Parquet files", "a folder with images")
    return path, found


def _file_images(
    root: Path, names: list[str], cfg: DataConfig, inputs: InputSpec, skipped: SkippedImages
) -> Iterator[tuple[str, np.ndarray]]:
    real_root = str(root.resolve())
    images = (RawImage(row, partial(read_inside, real_root, root / name)) for row, name in enumerate(names))

    def where(row: int) -> str:
        return printable(names[row])

    for batch in decode_stream(
        images, inputs=inputs, image_size=cfg.image_size, threads=cfg.decode_threads, where=where
    ):
        for row, reason in batch.bad:
            skipped.add(where(row), reason)
        yield from zip((where(row) for row in batch.rows.tolist()), batch.images, strict=True)
