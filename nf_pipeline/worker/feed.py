"""Batches of stored samples as tensors on the training device.

What was ingested becomes what the network takes: numbers normalised with the train split's mean and standard
deviation, tokens int64. Stored activations are widened to float32, and where bytes stand for numbers, scaled. Labels
that are values are standardised. Where units look at the network's own samples, these come with every batch: what was
ingested, or what is stored beside activations. On a GPU that happens there, and the threads that gather leave the
stored bytes in pinned memory. On a CPU these threads do it all, so that a step takes over a float32 batch that is
ready. What they have made ahead, `BATCHES_AHEAD` batches, is the loader's host memory; a batch counts as device
memory from the moment the consumer tracks it.
"""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from nf_pipeline.core.dtypes import TORCH_DTYPES
from nf_pipeline.core.exit_model import Normalise, own_units
from nf_pipeline.core.frozen import FrozenUnits
from nf_pipeline.core.layout import laid_out
from nf_pipeline.core.memory import PeakMeter
from nf_pipeline.samples import InputSpec, TargetSpec, inputs_of, target_of
from nf_pipeline.storage.affine import Affine
from nf_pipeline.storage.manifest import StageManifest
from nf_pipeline.storage.parts import WHOLE, Part
from nf_pipeline.storage.reader import Batch, ShardReader
from nf_pipeline.storage.shards import TensorSpec
from nf_pipeline.storage.store import Store
from nf_pipeline.storage.views import ViewReader
from nf_pipeline.worker.augment import augment_images, augment_maps
from nf_pipeline.worker.runtime import compute_alone


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How samples are changed as they are read.

    Attributes:
        kind: as `train.augment`, or for stored activations as `train.feature_augment`.
        seed: of the run.
        view: fixed for every pass; None changes the samples anew each epoch.
        block_idx: the block that reads stored activations; None for images.
    """

    kind: str
    seed: int
    view: int | None = None
    block_idx: int | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class _Made:
    """What the gathering threads make of a batch: as the network takes it on a CPU, the stored type in pinned memory
    for a GPU. `sample_N` is the very `x_NCHW` where that is it."""

    x_NCHW: torch.Tensor
    y_N: torch.Tensor
    labels: np.ndarray
    sample_ids: np.ndarray
    affine: Affine | None
    sample_N: torch.Tensor | None = None
    stored_samples: np.ndarray | None = None


class DeviceBatch:
    """One batch, whose inputs can be handed over so that nobody else keeps them alive.

    Attributes:
        y_N: labels on the device as units are trained on them: int64 classes [N], or float32 standardised values
            [N, K].
        labels: the same as they are stored, on the host: int64 [N], or float32 [N, K] in their own units.
        sample_ids: int64 [N] on the host.
        sample_N: the network's own input for the same samples, as its first layer takes it, on the device: the very
            inputs where these are what was ingested. None where no unit looks at it.
        stored_samples: the same as they are stored, changed as this pass has them, on the host: uint8 [N, bytes of a
            sample].
    """

    def __init__(
        self,
        x_NCHW: torch.Tensor,
        y_N: torch.Tensor,
        stored: "_Made",
        frozen: FrozenUnits | None = None,
        sample_N: torch.Tensor | None = None,
    ) -> None:
        self._x_NCHW: torch.Tensor | None = x_NCHW
        self._frozen = frozen
        self.y_N = y_N
        self.labels = stored.labels
        self.sample_ids = stored.sample_ids
        self.sample_N = sample_N
        self.stored_samples = stored.stored_samples

    def track(self, meter: PeakMeter) -> None:
        """Counts the batch as device memory."""
        meter.track(self._x_NCHW, self.y_N, *([] if self.sample_N is None else [self.sample_N]))

    def take_x(self) -> torch.Tensor:
        """Hands over what layers take; once. A block's first unit is done with it long before its last.

        Where the block starts from an earlier one's activations, or the images, the layers between run here.
        """
        if self._frozen is None:
            return self._take_stored()
        return self._frozen.output(self._take_stored(), self.sample_N)

    def _take_stored(self) -> torch.Tensor:
        x_NCHW, self._x_NCHW = self._x_NCHW, None
        return x_NCHW


class _Maker:
    """Makes tensors of stored batches; apart from `Feed`, which threads that work ahead must not keep alive."""

    def __init__(
        self,
        spec: TensorSpec,
        device: torch.device,
        normalise: Normalise | None,
        augmentation: Augmentation | None,
        target: TargetSpec | None,
        samples: InputSpec | None = None,
    ) -> None:
        self._own_units = own_units(target) if target is not None else None
        self._spec = spec
        self._device = device
        self._normalise = normalise
        self._normalise_samples = Normalise(samples).to(device) if samples is not None else None
        self._augmentation = augmentation
        self._scaling: tuple[torch.Tensor, torch.Tensor | None] | None = None

    def make(self, epoch: int, batch: Batch) -> _Made:
        """Does what needs no device; runs in the threads that gather, several times at once."""
        compute_alone()
        stored = _numbers_of(batch.tensors, self._spec)
        if self._augmentation is not None:
            stored = self._augmented(self._augmentation, stored, batch.sample_ids, epoch)
        x_NCHW = self._sent(stored, lambda stored: self.numbers(stored, batch.affine))
        y_N = torch.from_numpy(batch.labels)
        if self._own_units is not None:
            y_N = self._own_units.standardised(y_N)
        return _Made(
            x_NCHW=x_NCHW,
            y_N=y_N,
            labels=batch.labels,
            sample_ids=batch.sample_ids,
            affine=batch.affine,
            **self._samples(batch, stored, x_NCHW),
        )

    def numbers(self, stored: torch.Tensor, affine: Affine | None) -> torch.Tensor:
        """Turns what is stored into what layers take, wherever it is."""
        if self._normalise is not None:
            return self._normalise(stored)
        # copy: scaling works in place, and float32 shards would hand out the loader's own buffer.
        numbers = stored.to(dtype=torch.float32, copy=True)
        return numbers if affine is None else self._scaled(numbers, affine)

    def sample_numbers(self, stored: torch.Tensor) -> torch.Tensor:
        """Does the same with samples that are stored beside activations."""
        return self._normalise_samples(stored)

    def _sent(self, stored: torch.Tensor, numbers: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Returns what is made of stored numbers before they are on the device: for a CPU, all of it."""
        if self._device.type == "cuda":
            return stored.pin_memory()
        made = laid_out(numbers(stored))
        # float32 that stays as it is would hand out the loader's own buffer.
        return made.clone() if made.data_ptr() == stored.data_ptr() else made

    def _samples(self, batch: Batch, stored: torch.Tensor, x_NCHW: torch.Tensor) -> dict[str, Any]:
        if self._normalise_samples is None:
            return {}
        if self._spec.sample is None:  # what was ingested
            own = np.ascontiguousarray(stored.numpy()).reshape(len(stored), -1).view(np.uint8)
            return {"sample_N": x_NCHW, "stored_samples": own}
        sample_N = self._sent(_numbers_of(batch.samples, self._spec.sample), self.sample_numbers)
        return {"sample_N": sample_N, "stored_samples": batch.samples}

    def _scaled(self, numbers_NCHW: torch.Tensor, affine: Affine) -> torch.Tensor:
        """Turns bytes into what they stand for, in place; the same arithmetic as in `Affine.decode`."""
        if self._scaling is None:  # the same for all shards of a stage
            zero_points = _per_channel(affine.zero_points, numbers_NCHW) if any(affine.zero_points) else None
            self._scaling = _per_channel(affine.scales, numbers_NCHW), zero_points
        scales, zero_points = self._scaling
        if zero_points is not None:
            numbers_NCHW.sub_(zero_points)
        return numbers_NCHW.mul_(scales)

    @staticmethod
    def _augmented(how: Augmentation, x_NCHW: torch.Tensor, sample_ids: np.ndarray, epoch: int) -> torch.Tensor:
        view = epoch if how.view is None else how.view
        if how.block_idx is None:
            return augment_images(x_NCHW, sample_ids, kind=how.kind, seed=how.seed, view=view)
        return augment_maps(x_NCHW, sample_ids, kind=how.kind, seed=how.seed, epoch=view, block_idx=how.block_idx)


class Feed:
    """One split of a stage's output, batch by batch on a device."""

    def __init__(
        self,
        reader: ShardReader | ViewReader,
        spec: TensorSpec,
        device: torch.device,
        normalise: Normalise | None,
        augmentation: Augmentation | None = None,
        frozen: FrozenUnits | None = None,
        target: TargetSpec | None = None,
        samples: InputSpec | None = None,
    ) -> None:
        self._reader = reader
        self._frozen = frozen
        self._device = device
        self._maker = _Maker(spec, device, normalise, augmentation, target, samples)
        self._wait_s = 0.0
        self._begun: tuple[dict[str, Any], Generator[_Made, None, None]] | None = None

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
        order = {"seed": seed, "epoch": epoch, "shuffle": shuffle, "shuffle_shards": shuffle_shards, "even": even}
        begun, self._begun = self._begun, None
        made = begun[1] if begun is not None and begun[0] == order else None
        del begun  # another pass than this one ends here, before the next begins
        made = made or self._begin(order)
        while (batch := self._awaited(made)) is not None:
            yield batch

    def prefetch(self, *, seed: int, epoch: int, shuffle: bool, shuffle_shards: bool = True, even: bool) -> None:
        """Begins to make the first batches of a pass that `batches` is asked for next, with the same arguments.

        They stay in host memory, with the shards that they come from, until they are taken, another pass is asked
        for, or the feed is dropped.
        """
        order = {"seed": seed, "epoch": epoch, "shuffle": shuffle, "shuffle_shards": shuffle_shards, "even": even}
        self._begun = order, self._begin(order)

    def close(self) -> None:
        """Ends what `prefetch` began, and its threads."""
        begun, self._begun = self._begun, None
        if begun is not None:
            begun[1].close()

    def _begin(self, order: dict[str, Any]) -> Generator[_Made, None, None]:
        return self._reader.batches(**order, make=partial(self._maker.make, order["epoch"]))

    def _awaited(self, made: Iterator[_Made]) -> DeviceBatch | None:
        start = time.perf_counter()
        batch = next(made, None)
        if batch is not None:
            batch = self._on_device(batch)
        self._wait_s += time.perf_counter() - start
        return batch

    def _on_device(self, made: _Made) -> DeviceBatch:
        if self._device.type != "cuda":
            return DeviceBatch(made.x_NCHW, made.y_N, made, self._frozen, made.sample_N)
        x_NCHW = self._maker.numbers(made.x_NCHW.to(self._device, non_blocking=True), made.affine)
        sample_N = made.sample_N
        if sample_N is made.x_NCHW:
            sample_N = x_NCHW
        elif sample_N is not None:
            sample_N = self._maker.sample_numbers(sample_N.to(self._device, non_blocking=True))
        return DeviceBatch(x_NCHW, made.y_N.to(self._device), made, self._frozen, sample_N)


def _numbers_of(rows: np.ndarray, spec: TensorSpec) -> torch.Tensor:
    return torch.from_numpy(rows).view(TORCH_DTYPES[spec.dtype]).view(len(rows), *spec.shape)


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
    target: TargetSpec | None = None,
    samples: InputSpec | None = None,
) -> Feed:
    """Opens one split, or a part of it, of an ingest or block manifest for reading; `frozen` runs on every batch.

    What is predicted stands in the facts of an ingest manifest; for stored activations `target` says it. `samples`
    are the network's own, where they are to come with every batch.
    """
    reader = ShardReader(store, manifest.shards[split], manifest.spec, batch_size=batch_size, part=part)
    # Only what was ingested is to be normalised; activations are stored as the layers made them.
    facts = manifest.facts
    normalise = Normalise(inputs_of(facts)).to(device) if "inputs" in facts else None
    target = target_of(facts) if "target" in facts else target
    return Feed(reader, manifest.spec, device, normalise, augmentation, frozen, target, samples)
