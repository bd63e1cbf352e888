"""The network's own sample comes with every batch as its first layer takes it, and as the writer is to store it."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from nf_pipeline.core.exit_model import Normalise
from nf_pipeline.core.frozen import FrozenUnits
from nf_pipeline.core.local_unit import LocalUnit
from nf_pipeline.core.memory import measure_peak
from nf_pipeline.samples import InputSpec, TargetSpec
from nf_pipeline.storage.affine import Affine
from nf_pipeline.storage.manifest import StageManifest
from nf_pipeline.storage.shard_writer import ShardWriter
from nf_pipeline.storage.shards import TensorSpec
from nf_pipeline.storage.store import Store, open_store
from nf_pipeline.worker.augment import augment_images
from nf_pipeline.worker.feed import Augmentation, DeviceBatch, open_feed

CPU = torch.device("cpu")
TARGET = TargetSpec(size=3)
PIXELS = InputSpec(shape=(2, 16, 16), mean=(127.0, 64.0), std=(50.0, 25.0))
INPUTS = {
    "pixels": PIXELS,
    "16 bits": InputSpec(shape=(1, 16, 16), dtype="uint16", mean=(1000.0,), std=(7.0,)),
    "numbers as they are": InputSpec(shape=(5,), dtype="float32"),
    "tokens": InputSpec(shape=(6,), dtype="int32", num_tokens=70_000),
}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path))


def samples_of(inputs: InputSpec, num_rows: int = 40) -> np.ndarray:
    random = np.random.default_rng(1)
    return random.integers(0, 200, (num_rows, *inputs.shape)).astype(inputs.dtype)


def write(store: Store, spec: TensorSpec, tensors: np.ndarray, samples: np.ndarray | None = None) -> StageManifest:
    """Writes rows whose sample ids are their positions."""
    ids, rows = np.arange(len(tensors)), [as_bytes(tensors), None if samples is None else as_bytes(samples)]
    with ShardWriter(store, lambda idx: f"s/{idx}.parquet", spec, 7 * spec.tensor_bytes) as writer:
        writer.append(rows[0], ids % 3, ids, rows[1])
    shards = {"train": tuple(writer.close())}
    return StageManifest(stage="block", fingerprint="f", attempt="a", spec=spec, shards=shards)


def as_bytes(rows: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(rows).reshape(len(rows), -1).view(np.uint8)


def ingested(store: Store, inputs: InputSpec) -> StageManifest:
    manifest = write(store, TensorSpec(inputs.dtype, inputs.shape), samples_of(inputs))
    manifest.facts.update({"inputs": asdict(inputs), "target": asdict(TARGET)})
    return manifest


def beside(store: Store, inputs: InputSpec, dtype: str = "float16", affine: Affine | None = None) -> StageManifest:
    spec = TensorSpec(dtype, (3, 2, 2), affine=affine, sample=TensorSpec(inputs.dtype, inputs.shape))
    random = np.random.default_rng(2)
    return write(store, spec, random.integers(0, 99, (40, 3, 2, 2)).astype(dtype), samples_of(inputs))


def shuffled(store: Store, manifest: StageManifest, inputs: InputSpec | None, **how: object) -> list[DeviceBatch]:
    how = {"device": CPU, "target": TARGET, **how}
    feed = open_feed(store, manifest, "train", batch_size=16, samples=inputs, **how)
    return list(feed.batches(seed=3, epoch=1, shuffle=True, even=True))


@pytest.mark.parametrize("inputs", INPUTS.values(), ids=INPUTS.keys())
def test_sample_of_ingested_rows_is_the_very_input_and_its_stored_bytes(store: Store, inputs: InputSpec) -> None:
    rows = as_bytes(samples_of(inputs))
    for batch in shuffled(store, ingested(store, inputs), inputs):
        np.testing.assert_array_equal(batch.stored_samples, rows[batch.sample_ids])
        assert batch.take_x() is batch.sample_N


@pytest.mark.parametrize("inputs", INPUTS.values(), ids=INPUTS.keys())
@pytest.mark.parametrize("dtype", ["float16", "uint8"])
def test_stored_sample_is_given_as_the_first_layer_takes_it(store: Store, inputs: InputSpec, dtype: str) -> None:
    affine = Affine((0.5,) * 3, (1, 2, 3)) if dtype == "uint8" else None
    manifest, rows = beside(store, inputs, dtype, affine), samples_of(inputs)
    wanted = Normalise(inputs)(torch.from_numpy(rows))
    for batch in shuffled(store, manifest, inputs):
        assert torch.equal(batch.sample_N, wanted[batch.sample_ids])
        np.testing.assert_array_equal(batch.stored_samples, as_bytes(rows)[batch.sample_ids])
        assert batch.sample_N.untyped_storage().nbytes() == batch.sample_N.nbytes, "not the loader's own buffer"
        assert batch.take_x().shape == (len(batch.y_N), 3, 2, 2)


@pytest.mark.parametrize("kind", ["crop_flip", "flip"])
@pytest.mark.parametrize("name", ["pixels", "16 bits"])
def test_changed_sample_is_stored_as_it_was_changed(store: Store, name: str, kind: str) -> None:
    inputs, rows = INPUTS[name], torch.from_numpy(samples_of(INPUTS[name]))
    how = Augmentation(kind=kind, seed=5, view=2)
    for batch in shuffled(store, ingested(store, inputs), inputs, augmentation=how):
        chosen = torch.from_numpy(rows.numpy()[batch.sample_ids])
        changed = augment_images(chosen, batch.sample_ids, kind=kind, seed=5, view=2)
        np.testing.assert_array_equal(batch.stored_samples, as_bytes(changed.numpy()))
        assert torch.equal(Normalise(inputs)(changed), batch.sample_N)


def test_nothing_comes_with_a_batch_where_no_unit_looks_at_it(store: Store) -> None:
    for batch in shuffled(store, ingested(store, PIXELS), None):
        assert batch.sample_N is None and batch.stored_samples is None


@pytest.mark.parametrize("make", [ingested, beside])
def test_sample_counts_once_as_memory_and_stays_after_the_inputs_are_gone(
    store: Store, make: Callable[[Store, InputSpec], StageManifest]
) -> None:
    manifest, meter = make(store, PIXELS), measure_peak(CPU)
    batch = shuffled(store, manifest, PIXELS)[0]
    num_rows = len(batch.y_N)
    batch.track(meter)
    x_NCHW = batch.take_x()
    kept = num_rows * (512 * 4 + 8)
    assert meter.current_bytes == kept + (0 if x_NCHW is batch.sample_N else x_NCHW.nbytes)
    del x_NCHW
    assert meter.current_bytes == kept


@pytest.mark.gpu
@pytest.mark.parametrize("make", [ingested, beside])
@pytest.mark.parametrize("inputs", INPUTS.values(), ids=INPUTS.keys())
def test_samples_on_a_gpu_are_those_on_a_cpu(
    store: Store, inputs: InputSpec, make: Callable[[Store, InputSpec], StageManifest]
) -> None:
    manifest = make(store, inputs)
    devices = (CPU, torch.device("cuda"))
    for ours, theirs in zip(*(shuffled(store, manifest, inputs, device=device) for device in devices), strict=True):
        torch.testing.assert_close(theirs.sample_N.cpu(), ours.sample_N)
        np.testing.assert_array_equal(theirs.stored_samples, ours.stored_samples)
        assert theirs.sample_N.is_cuda and (theirs.take_x() is theirs.sample_N) == (make is ingested)


class _Doubled(nn.Module):
    def added_to(self, x: torch.Tensor, sample_N: torch.Tensor) -> torch.Tensor:
        return x + 2 * sample_N.mean()


def test_layers_that_run_again_see_the_sample_too(store: Store) -> None:
    frozen = FrozenUnits([LocalUnit([nn.Identity()], nn.Identity(), context=_Doubled())], "fp32")
    plain, again = (shuffled(store, beside(store, PIXELS), PIXELS, frozen=units) for units in (None, frozen))
    for before, after in zip(plain, again, strict=True):
        assert torch.equal(after.take_x(), before.take_x() + 2 * before.sample_N.mean())
