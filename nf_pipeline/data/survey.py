"""What a data set is, before its images are read: labels, splits, and shape and type of one image.

Knows nothing of storage. Entry: `survey`.
"""

from dataclasses import dataclass

import numpy as np

from nf_pipeline.config import DataConfig, RunConfig
from nf_pipeline.data.base import SPLITS, ImageCell, Source, Split, Undecodable
from nf_pipeline.data.classes import Labels, read_labels
from nf_pipeline.data.decode import decode_image, fetch
from nf_pipeline.data.skipped import SkippedImages
from nf_pipeline.data.sources import open_source
from nf_pipeline.data.splits import TRAIN, UNUSED, cut_splits
from nf_pipeline.data.tensors import is_image, tensor_inputs
from nf_pipeline.errors import DataError
from nf_pipeline.samples import InputSpec, TargetSpec


@dataclass(frozen=True, kw_only=True)
class Survey:
    """A source whose labels are checked and whose splits are cut.

    Attributes:
        cfg: of the run.
        source: open for reading.
        labels: checked.
        codes: per split that the data brings, where each row goes; see `cut_splits`.
        skipped: images that could not be decoded so far.
        inputs: what the first image, or tensor, in stored order is. Mean and std are not known yet; nor is the number
            of tokens where the configuration does not give it: for now it is the largest there can be.
    """

    cfg: RunConfig
    source: Source
    labels: Labels
    codes: dict[Split, np.ndarray]
    skipped: SkippedImages
    inputs: InputSpec

    @property
    def target(self) -> TargetSpec:
        """What is to be predicted; mean and std are not known yet."""
        return self.labels.target

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
    labels = read_labels(source, cfg.data.target)
    codes = cut_splits(
        labels.strata,
        seed=cfg.train.seed,
        val_fraction=cfg.data.val_fraction,
        test_fraction=cfg.data.test_fraction,
        max_train_images=cfg.data.max_train_images,
    )
    skipped = SkippedImages(cfg.data.on_bad_image)
    inputs = _first_inputs(source, codes["train"] == TRAIN, cfg.data, skipped)
    return Survey(cfg=cfg, source=source, labels=labels, codes=codes, skipped=skipped, inputs=inputs)


def _first_inputs(source: Source, wanted: np.ndarray, data: DataConfig, skipped: SkippedImages) -> InputSpec:
    # The first image in stored order decides, not the first one read: errors must not depend on the seed.
    for row, cell in source.read("train", wanted, seed=None):
        try:
            return _inputs_of(cell, data)
        except Undecodable as error:
            skipped.check(source.where("train", row, "image"), str(error))
        except DataError as error:
            raise DataError(f"{source.where('train', row, 'image')}: {error.what}", error.fix) from None
    raise DataError(
        f"{source.name}: split train is empty: none of its {int(wanted.sum())} samples can be read",
        "replace the data set",
    )


def _inputs_of(cell: ImageCell, data: DataConfig) -> InputSpec:
    stored = fetch(cell)
    if not isinstance(stored, np.ndarray) or is_image(stored):
        if data.num_tokens is not None:
            raise DataError(f"data.num_tokens is {data.num_tokens}, and it is an image", "leave data.num_tokens out")
        image = decode_image(stored, data.image_size, data.pixels)
        return InputSpec(shape=image.shape, dtype=data.pixels)
    if data.image_size is not None:
        raise DataError(
            f"data.image_size is {data.image_size}, and it is a tensor: {stored.dtype} {stored.shape}",
            "leave --image-size out: tensors are taken as they are",
        )
    return tensor_inputs(stored, data.num_tokens)
