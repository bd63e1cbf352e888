from pathlib import Path

import numpy as np
import pytest
import torch

from nf_pipeline.core.memory import measure_peak
from nf_pipeline.storage.manifest import StageManifest
from nf_pipeline.storage.shards import ShardWriter, TensorSpec
from nf_pipeline.storage.store import Store, open_store
from nf_pipeline.worker.feed import open_feed

CPU = torch.device("cpu")


def write_split(store: Store, spec: TensorSpec, rows: np.ndarray, facts: dict) -> StageManifest:
    with ShardWriter(store, lambda idx: f"s/{idx}.parquet", spec, 4096) as writer:
        raw = np.ascontiguousarray(rows).reshape(len(rows), -1).view(np.uint8)
        writer.append(raw, np.arange(len(rows)) % 3, np.arange(len(rows)))
        shards = tuple(writer.close())
    return StageManifest(
        stage="ingest", fingerprint="f", attempt="a", spec=spec, shards={"train": shards}, facts=facts
    )


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path))


def test_images_are_normalised_with_the_manifests_statistics(store: Store) -> None:
    pixels_NCHW = np.random.default_rng(0).integers(0, 256, (10, 2, 4, 4), dtype=np.uint8)
    manifest = write_split(
        store, TensorSpec("uint8", (2, 4, 4)), pixels_NCHW, {"mean": [0.5, 0.25], "std": [0.2, 0.1]}
    )
    (batch,) = open_feed(store, manifest, "train", batch_size=10, device=CPU).batches()
    x_NCHW = batch.take_x()
    want_NCHW = (pixels_NCHW / 255 - np.array([0.5, 0.25]).reshape(2, 1, 1)) / np.array([0.2, 0.1]).reshape(2, 1, 1)
    assert x_NCHW.dtype == torch.float32
    np.testing.assert_allclose(x_NCHW.numpy(), want_NCHW, rtol=1e-5, atol=1e-6)
    assert batch.y_N.tolist() == [row % 3 for row in range(10)]


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_activations_are_widened_and_otherwise_left_alone(store: Store, dtype: str) -> None:
    values_NCHW = torch.randn(7, 3, 2, 2).to(getattr(torch, dtype))
    stored = values_NCHW.view(torch.uint8).numpy()
    manifest = write_split(store, TensorSpec(dtype, (3, 2, 2)), stored, {})
    batches = list(open_feed(store, manifest, "train", batch_size=4, device=CPU).batches())
    got_NCHW = torch.cat([batch.take_x() for batch in batches])
    assert torch.equal(got_NCHW, values_NCHW.float())


def test_even_batches_use_every_row_and_never_leave_one_alone(store: Store) -> None:
    manifest = write_split(store, TensorSpec("uint8", (1, 2, 2)), np.zeros((9, 1, 2, 2), np.uint8), {})
    feed = open_feed(store, manifest, "train", batch_size=4, device=CPU)
    sizes = [len(batch.y_N) for batch in feed.batches(shuffle=True, even=True)]
    assert sorted(sizes) == [3, 3, 3]
    assert feed.num_batches(even=True) == 3


def test_inputs_that_were_taken_are_kept_alive_by_nobody_else(store: Store) -> None:
    manifest = write_split(store, TensorSpec("uint8", (1, 8, 8)), np.zeros((4, 1, 8, 8), np.uint8), {})
    meter = measure_peak(CPU)
    for batch in open_feed(store, manifest, "train", batch_size=4, device=CPU).batches():
        batch.track(meter)
        held = meter.current_bytes
        batch.take_x()
        assert meter.current_bytes == held - 4 * 64 * 4
