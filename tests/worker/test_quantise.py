"""Activations as bytes: near, counted where clipped, refused where not finite, and decoded alike everywhere."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nf_pipeline.errors import Diverged, ObjectCorrupt
from nf_pipeline.gang import Gang
from nf_pipeline.storage.affine import Affine, fit_affine
from nf_pipeline.storage.manifest import StageManifest
from nf_pipeline.storage.reader import ShardReader
from nf_pipeline.storage.shard_writer import ShardWriter
from nf_pipeline.storage.shards import ShardInfo, TensorSpec
from nf_pipeline.storage.store import Store, open_store
from nf_pipeline.worker.data_parallel import Replicas
from nf_pipeline.worker.feed import open_feed
from nf_pipeline.worker.write_activations import ChannelRanges, quantise_activations

CPU = torch.device("cpu")
ALONE = Replicas("block-000", Gang(), CPU)


def fitted(x_NCHW: torch.Tensor) -> Affine:
    ranges = ChannelRanges(x_NCHW.shape[1])
    ranges.add(x_NCHW, "block-000")
    return ranges.fit(ALONE)


def stored_split(store: Store, spec: TensorSpec, rows: np.ndarray, first: int = 0) -> tuple[ShardInfo, ...]:
    with ShardWriter(store, lambda idx: f"s/{first + idx}.parquet", spec, 5 * spec.nbytes) as writer:
        writer.append(rows, np.zeros(len(rows), np.int64), np.arange(len(rows)))
    return tuple(writer.close())


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    shape=st.sampled_from([(5, 3, 2, 2), (1, 1, 1, 1), (4, 7), (2, 8, 5, 1)]),
    size=st.sampled_from([1e-20, 1e-3, 1.0, 70_000.0, 1e20]),
    shift=st.sampled_from([-100.0, -1.0, 0.0, 1.0, 100.0]),
    rectified=st.booleans(),
)
def test_quantised_activations_are_off_by_half_a_step_at_most(seed, shape, size, shift, rectified):
    x_NCHW = size * (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + shift)
    x_NCHW = x_NCHW.relu() if rectified else x_NCHW
    affine = fitted(x_NCHW)
    stored, num_clipped = quantise_activations(x_NCHW, affine, "block-000")
    decoded = affine.decode(stored.reshape(shape))
    sides = (-1, *[1] * (len(shape) - 2))
    steps = np.asarray(affine.scales).reshape(sides)
    assert num_clipped == 0
    assert (np.abs(decoded - x_NCHW.numpy()) <= 0.5001 * steps).all()
    assert (decoded[x_NCHW.numpy() == 0] == 0).all()


def test_numbers_beyond_the_measured_range_are_clipped_and_counted() -> None:
    affine = fit_affine((-1.0,), (1.0,))
    x_NCHW = torch.tensor([0.5, 100.0, -100.0, 1.1]).view(4, 1, 1, 1)
    stored, num_clipped = quantise_activations(x_NCHW, affine, "block-000")
    assert num_clipped == 2
    assert (stored[1, 0], stored[2, 0]) == (255, 0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_activations_that_are_not_finite_are_refused_when_measured_and_when_stored(value: float) -> None:
    x_NCHW = torch.ones(3, 2, 4, 4)
    x_NCHW[1, 1, 3, 2] = value
    with pytest.raises(Diverged, match="NaN or infinite"):
        ChannelRanges(2).add(x_NCHW, "block-000")
    with pytest.raises(Diverged, match="NaN or infinite"):
        quantise_activations(x_NCHW, fit_affine((0.0, 0.0), (1.0, 1.0)), "block-000")


def test_layout_and_precision_of_the_outputs_do_not_change_the_bytes() -> None:
    x_NCHW = torch.randn(4, 8, 5, 5).bfloat16().float()
    affine = fitted(x_NCHW)
    want, _ = quantise_activations(x_NCHW, affine, "block-000")
    for other in (x_NCHW.contiguous(memory_format=torch.channels_last), x_NCHW.bfloat16()):
        assert np.array_equal(quantise_activations(other, affine, "block-000")[0], want)


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_feed_reads_bit_for_bit_what_decode_gives(tmp_path: Path, codec: str) -> None:
    store, x_NCHW = open_store(str(tmp_path)), torch.randn(23, 4, 3, 3)
    affine = fitted(x_NCHW)
    spec = TensorSpec("uint8", (4, 3, 3), codec, affine)
    rows, _ = quantise_activations(x_NCHW, affine, "block-000")
    shards = {"train": stored_split(store, spec, rows)}
    manifest = StageManifest(stage="block-000", fingerprint="f", attempt="a", spec=spec, shards=shards)
    batches = list(open_feed(store, manifest, "train", batch_size=10, device=CPU).batches())
    got_NCHW = torch.cat([batch.take_x() for batch in batches])
    assert np.array_equal(got_NCHW.numpy(), affine.decode(rows.reshape(-1, 4, 3, 3)))
    assert (got_NCHW - x_NCHW).abs().max() <= 0.51 * max(affine.scales)


def test_reader_without_a_manifest_takes_the_scales_from_the_shards(tmp_path: Path) -> None:
    store, affine = open_store(str(tmp_path)), fit_affine((0.0, -1.0), (3.0, 2.0))
    spec = TensorSpec("uint8", (2, 2), affine=affine)
    shards = stored_split(store, spec, np.arange(48, dtype=np.uint8).reshape(12, 4))
    reader = ShardReader(store, shards, replace(spec, affine=None), batch_size=4)
    batches = list(reader.batches(seed=0, epoch=0, shuffle=True))
    assert [batch.affine for batch in batches] == [affine] * 3


def test_shards_with_scales_of_their_own_are_refused(tmp_path: Path) -> None:
    store, rows = open_store(str(tmp_path)), np.zeros((10, 4), np.uint8)
    specs = [TensorSpec("uint8", (2, 2), affine=fit_affine((0.0, 0.0), (1.0, top))) for top in (1.0, 2.0)]
    shards = [shard for spec in specs for shard in stored_split(store, spec, rows, 10 * specs.index(spec))]
    with pytest.raises(ObjectCorrupt, match="not those of the manifest"):
        list(ShardReader(store, shards, specs[0], batch_size=4).batches(seed=0, epoch=0, shuffle=False))
    unknown = replace(specs[0], affine=None)
    with pytest.raises(ObjectCorrupt, match="different scales"):
        list(ShardReader(store, shards, unknown, batch_size=4).batches(seed=0, epoch=0, shuffle=True))
