"""What a data set is, before its images are read: labels, splits, and the shape of one image.

Knows nothing of storage. Entry: `survey`.
"""

from dataclasses import dataclass

import numpy as np

from nf_pipeline.config import RunConfig
from nf_pipeline.data.base import SPLITS, Source, Split
from nf_pipeline.data.classes import Labels, read_labels
from nf_pipeline.data.decode import Undecodable, decode_image
from nf_pipeline.data.skipped import SkippedImages
from nf_pipeline.data.sources import open_source
from nf_pipeline.data.splits import TRAIN, UNUSED, cut_splits
from nf_pipeline.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Survey:
    """A source whose labels are checked and whose splits are cut.

    Attributes:
        cfg: of the run.
        source: open for reading.
        labels: checked.
        codes: per split that the data brings, where each row goes; see `cut_splits`.
        skipped: images that could not be decoded so far.
        image_shape: (C, H, W) of the first image in stored order.
    """

    cfg: RunConfig
    source: Source
    labels: Labels
    codes: dict[Split, np.ndarray]
    skipped: SkippedImages
    image_shape: tuple[int, int, int]

    @property
    def num_images(self) -> int:
        """Images that are used."""
        return sum(int((codes != UNUSED).sum()) for codes in self.codes.values())

    @property
    def split_rows(self) -> dict[str, int]:
        """Rows per split, before any image is skipped."""
        return {
            split: sum(int((codes == code).sum()) for codes in self.codes.values())
            for code, split in enumerate(SPLITS)
        }

    def first_sample_id(self, split: Split) -> int:
        """Returns the number of a split's first row: rows are counted through the source's splits."""
        before = self.source.splits[: self.source.splits.index(split)]
        return sum(self.source.num_rows(earlier) for earlier in before)


def survey(cfg: RunConfig) -> Survey:
    """Opens the data set, checks every label, cuts the splits and decodes one image.

    Raises:
        DataError: the data cannot be used; names file, row and column.
        StorageError: the data cannot be reached.
    """
    source = open_source(cfg.data)
    labels = read_labels(source)
    codes = cut_splits(
        labels.by_split,
        seed=cfg.train.seed,
        val_fraction=cfg.data.val_fraction,
        test_fraction=cfg.data.test_fraction,
        max_train_images=cfg.data.max_train_images,
    )
    skipped = SkippedImages(cfg.data.on_bad_image)
    shape = _first_shape(source, codes["train"] == TRAIN, cfg.data.image_size, skipped)
    return Survey(cfg=cfg, source=source, labels=labels, codes=codes, skipped=skipped, image_shape=shape)


def _first_shape(
    source: Source, wanted: np.ndarray, image_size: int | None, skipped: SkippedImages
) -> tuple[int, int, int]:
    # The first image in stored order decides, not the first one read: errors must not depend on the seed.
    for row, cell in source.read("train", wanted, seed=None):
        try:
            channels, height, width = decode_image(cell, image_size).shape
        except Undecodable as error:
            skipped.check(source.where("train", row, "image"), str(error))
            continue
        return channels, height, width
    raise DataError(
        f"{source.name}: split train is empty: none of its {int(wanted.sum())} images can be decoded",
        "replace the data set",
    )
