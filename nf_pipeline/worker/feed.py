"""Batches of stored samples as tensors on the training device.

Images (uint8) are normalised with the train split's mean and standard deviation; stored activations are widened
to float32, on the device, and where bytes stand for numbers, scaled there. On a CPU the stored bytes are the loader's
host memory; only the float32 batch counts as device memory, from the moment the consumer tracks it.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from nf_pipeline.core.dtypes import TORCH_DTYPES
from nf_pipeline.core.exit_model import Normalise
from nf_pipeline.core.frozen import FrozenUnits
from nf_pipeline.core.layout import laid_out
from nf_pipeline.core.memory import PeakMeter
from nf_pipeline.storage.affine import Affine
from nf_pipeline.storage.manifest import StageManifest
from nf_pipeline.storage.parts import WHOLE, Part
from nf_pipeline.storage.reader import Batch, ShardReader
from nf_pipeline.storage.shards import TensorSpec
from nf_pipeline.storage.store import Store
from nf_pipeline.worker.augment import augment_images


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How images are changed as they are read.

    Attributes:
        kind: "flip" or "crop_flip".
        seed: of the run.
        view: fixed for every pass; None changes the images anew each epoch.
    """

    kind: str
    seed: int
    view: int | None = None


class DeviceBatch:
    """One batch, whose inputs can be handed over so that nobody else keeps them alive.

    Attributes:
        y_N: int64 labels on the device.
        sample_ids: int64 [N] on the host.
    """

    def __init__(
        self, x_NCHW: torch.Tensor, y_N: torch.Tensor, sample_ids: np.ndarray, frozen: FrozenUnits | None = None
    ) -> None:
        self._x_NCHW: torch.Tensor | None = x_NCHW
        self._frozen = frozen
        self.y_N = y_N
        self.sample_ids = sample_ids

    def track(self, meter: PeakMeter) -> None:
        """Counts the batch as device memory."""
        meter.track(self._x_NCHW, self.y_N)

    def take_x(self) -> torch.Tensor:
        """Hands over the inputs, float32; once. A block's first unit is done with them long before its last.

        Where the block starts from an earlier one's activations, or the images, the layers between run here.
        """
        return self._take_stored() if self._frozen is None else self._frozen.output(self._take_stored())

    def _take_stored(self) -> torch.Tensor:
        x_NCHW, self._x_NCHW = self._x_NCHW, None
        return x_NCHW


class Feed:
    """One split of a stage's output, batch by batch on a device."""

    def __init__(
        self,
        reader: ShardReader,
        spec: TensorSpec,
        device: torch.device,
        normalise: Normalise | None,
        augmentation: Augmentation | None = None,
        frozen: FrozenUnits | None = None,
    ) -> None:
        self._reader = reader
        self._augmentation = augmentation
        self._frozen = frozen
        self._spec = spec
        self._device = device
        self._normalise = normalise
        self._wait_s = 0.0
        self._scales: torch.Tensor | None = None
        self._zero_points: torch.Tensor | None = None

    @property
    def num_rows(self) -> int:
        """Samples that this feed yields: the split's, or those of one part of it."""
        return self._reader.num_rows

    @property
    def num_rows_total(self) -> int:
        """Samples of the whole split."""
        return self._reader.num_rows_total

    @property
    def wait_s(self) -> float:
        """Seconds that consumers have waited for batches so far, until they were on the device."""
        return self._wait_s

    def num_batches(self, *, even: bool) -> int:
        """Returns the steps of one pass."""
        return self._reader.num_batches(even=even)

    def step_sizes(self) -> list[int]:
        """Returns the samples of every training step of one pass, over all parts of the split."""
        return self._reader.step_sizes()

    def batches(
        self,
        *,
        seed: int = 0,
        epoch: int = 0,
        shuffle: bool = False,
        shuffle_shards: bool = True,
        even: bool = False,
    ) -> Iterator[DeviceBatch]:
        """Yields the split once, in stored order unless `shuffle`; see `ShardReader.batches`."""
        stored = self._reader.batches(
            seed=seed, epoch=epoch, shuffle=shuffle, shuffle_shards=shuffle_shards, even=even
        )
        while (batch := self._awaited(stored, epoch)) is not None:
            yield batch

    def _awaited(self, stored: Iterator[Batch], epoch: int) -> DeviceBatch | None:
        start = time.perf_counter()
        batch = next(stored, None)
        if batch is not None:
            labels_N = torch.from_numpy(batch.labels).to(self._device)
            x_NCHW = laid_out(self._to_device(batch, epoch))
            batch = DeviceBatch(x_NCHW, labels_N, batch.sample_ids, self._frozen)
        self._wait_s += time.perf_counter() - start
        return batch

    def _to_device(self, batch: Batch, epoch: int) -> torch.Tensor:
        stored = torch.from_numpy(batch.tensors).view(TORCH_DTYPES[self._spec.dtype])
        stored = stored.view(len(batch.labels), *self._spec.shape)
        if self._augmentation is not None:
            stored = self._augmented(self._augmentation, stored, batch.sample_ids, epoch)
        if self._device.type == "cuda":
            stored = stored.pin_memory().to(self._device, non_blocking=True)
        if self._normalise is not None:
            return self._normalise(stored)
        # copy: float32 shards would otherwise hand out the loader's own buffer.
        numbers = stored.to(dtype=torch.float32, copy=True)
        return numbers if batch.affine is None else self._scaled(numbers, batch.affine)

    def _scaled(self, numbers_NCHW: torch.Tensor, affine: Affine) -> torch.Tensor:
        """Turns bytes into what they stand for, in place; the same arithmetic as in `Affine.decode`."""
        if self._scales is None:  # the same for all shards of a stage
            self._scales = _per_channel(affine.scales, numbers_NCHW)
            self._zero_points = _per_channel(affine.zero_points, numbers_NCHW) if any(affine.zero_points) else None
        if self._zero_points is not None:
            numbers_NCHW.sub_(self._zero_points)
        return numbers_NCHW.mul_(self._scales)

    @staticmethod
    def _augmented(
        augmentation: Augmentation, x_NCHW: torch.Tensor, sample_ids: np.ndarray, epoch: int
    ) -> torch.Tensor:
        view = epoch if augmentation.view is None else augmentation.view
        return augment_images(x_NCHW, sample_ids, kind=augmentation.kind, seed=augmentation.seed, view=view)


def _per_channel(values_C: Sequence[float], like_NCHW: torch.Tensor) -> torch.Tensor:
    sides = (-1, *[1] * (like_NCHW.ndim - 2))
    return torch.tensor(values_C, dtype=torch.float32).view(sides).to(like_NCHW.device)


def open_feed(
    store: Store,
    manifest: StageManifest,
    split: str,
    *,
    batch_size: int,
    device: torch.device,
    part: Part = WHOLE,
    augmentation: Augmentation | None = None,
    frozen: FrozenUnits | None = None,
) -> Feed:
    """Opens one split, or a part of it, of an ingest or block manifest for reading; `frozen` runs on every batch."""
    reader = ShardReader(store, manifest.shards[split], manifest.spec, batch_size=batch_size, part=part)
    # Only images carry statistics; activations are stored as the layers made them.
    facts = manifest.facts
    normalise = Normalise(facts["mean"], facts["std"]).to(device) if "mean" in facts else None
    return Feed(reader, manifest.spec, device, normalise, augmentation, frozen)
