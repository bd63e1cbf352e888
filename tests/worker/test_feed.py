import threading
import time
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from nf_pipeline.core.memory import measure_peak
from nf_pipeline.samples import InputSpec, TargetSpec
from nf_pipeline.storage.manifest import StageManifest
from nf_pipeline.storage.reader import BATCHES_AHEAD
from nf_pipeline.storage.shard_writer import ShardWriter
from nf_pipeline.storage.shards import TensorSpec
from nf_pipeline.storage.store import Store, open_store
from nf_pipeline.worker.feed import Augmentation, DeviceBatch, Feed, _Maker, open_feed

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
    inputs = InputSpec(shape=(2, 4, 4), mean=(127.0, 64.0), std=(50.0, 25.0))
    facts = {"inputs": asdict(inputs), "target": asdict(TargetSpec(size=3))}
    manifest = write_split(store, TensorSpec("uint8", (2, 4, 4)), pixels_NCHW, facts)
    (batch,) = open_feed(store, manifest, "train", batch_size=10, device=CPU).batches()
    x_NCHW = batch.take_x()
    want_NCHW = (pixels_NCHW - np.array([127, 64]).reshape(2, 1, 1)) / np.array([50, 25]).reshape(2, 1, 1)
    assert x_NCHW.dtype == torch.float32
    np.testing.assert_allclose(x_NCHW.numpy(), want_NCHW, rtol=1e-5, atol=1e-6)
    assert batch.y_N.tolist() == [row % 3 for row in range(10)]


def test_tokens_are_given_as_int64(store: Store) -> None:
    tokens_NL = np.random.default_rng(0).integers(0, 70_000, (10, 6)).astype(np.int32)
    inputs = InputSpec(shape=(6,), dtype="int32", num_tokens=70_000)
    facts = {"inputs": asdict(inputs), "target": asdict(TargetSpec(size=3))}
    manifest = write_split(store, TensorSpec("int32", (6,)), tokens_NL, facts)
    (batch,) = open_feed(store, manifest, "train", batch_size=10, device=CPU).batches()
    x_NL = batch.take_x()
    assert x_NL.dtype == torch.int64
    np.testing.assert_array_equal(x_NL.numpy(), tokens_NL)


@pytest.mark.parametrize(("dtype", "largest"), [("uint16", 65_535), ("int16", 32_767)])
@pytest.mark.parametrize("kind", [None, "crop_flip"])
def test_images_of_16_bits_are_normalised_and_moved(store: Store, dtype: str, largest: int, kind: str | None) -> None:
    pixels_NCHW = np.full((6, 1, 8, 8), largest, dtype)
    inputs = InputSpec(shape=(1, 8, 8), dtype=dtype, mean=(1000.0,), std=(2.0,))
    facts = {"inputs": asdict(inputs), "target": asdict(TargetSpec(size=3))}
    manifest = write_split(store, TensorSpec(dtype, (1, 8, 8)), pixels_NCHW, facts)
    how = None if kind is None else Augmentation(kind=kind, seed=0)
    (batch,) = open_feed(store, manifest, "train", batch_size=6, device=CPU, augmentation=how).batches()
    # Borders that come in with a shift are zero as stored.
    assert set(batch.take_x().unique().tolist()) == {(largest - 1000) / 2, *([-500.0] if kind else [])}


def test_numbers_without_statistics_are_given_as_they_are_and_not_by_the_loaders_buffer(store: Store) -> None:
    values_NF = np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32)
    facts = {"inputs": asdict(InputSpec(shape=(5,), dtype="float32")), "target": asdict(TargetSpec(size=3))}
    manifest = write_split(store, TensorSpec("float32", (5,)), values_NF, facts)
    batches = [batch.take_x() for batch in open_feed(store, manifest, "train", batch_size=2, device=CPU).batches()]
    np.testing.assert_array_equal(torch.cat(batches).numpy(), values_NF)
    assert all(x_NF.untyped_storage().nbytes() == x_NF.nbytes for x_NF in batches)


def test_values_are_standardised_for_training_and_kept_in_their_own_units_beside(store: Store) -> None:
    target = TargetSpec(kind="values", size=2, mean=(10.0, -1.0), std=(5.0, 0.5))
    labels_NK = np.array([[15.0, -1.0], [10.0, 0.0], [np.nan, np.nan]], np.float32)
    spec = TensorSpec("float32", (4,), label_values=2)
    with ShardWriter(store, lambda idx: f"s/{idx}.parquet", spec, 4096) as writer:
        writer.append(np.zeros((3, 16), np.uint8), labels_NK, np.arange(3))
        shards = {"train": tuple(writer.close())}
    inputs = InputSpec(shape=(4,), dtype="float32")
    ingest = StageManifest(
        stage="ingest",
        fingerprint="f",
        attempt="a",
        spec=spec,
        shards=shards,
        facts={"inputs": asdict(inputs), "target": asdict(target)},
    )
    block = replace(ingest, stage="block", facts={})
    for manifest, given in ((ingest, None), (block, target)):
        (batch,) = open_feed(store, manifest, "train", batch_size=3, device=CPU, target=given).batches()
        assert batch.y_N.dtype == torch.float32
        torch.testing.assert_close(
            batch.y_N, torch.tensor([[1.0, 0.0], [0.0, 2.0], [np.nan, np.nan]]), equal_nan=True
        )
        np.testing.assert_array_equal(batch.labels, labels_NK)


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


def reader_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("shard-reader")]


def open_numbered(store: Store, num_rows: int = 40) -> Feed:
    manifest = write_split(store, TensorSpec("uint8", (1, 2, 2)), np.zeros((num_rows, 1, 2, 2), np.uint8), {})
    return open_feed(store, manifest, "train", batch_size=4, device=CPU)


def ids_of(batches: Iterable[DeviceBatch]) -> list[list[int]]:
    return [batch.sample_ids.tolist() for batch in batches]


@pytest.mark.parametrize("asked_for", [{"epoch": 1}, {"epoch": 2}, {"epoch": 1, "seed": 5}])
def test_a_pass_is_the_same_whether_or_not_one_was_begun_before(store: Store, asked_for: dict) -> None:
    order = {"seed": 3, "shuffle": True, "even": True}
    expected = ids_of(open_numbered(store).batches(**{**order, **asked_for}))
    feed = open_numbered(store)
    feed.prefetch(**order, epoch=1)
    for _ in range(2):
        assert ids_of(feed.batches(**{**order, **asked_for})) == expected
    assert reader_threads() == []


def test_a_pass_that_was_begun_is_ready_before_anybody_asks_for_it(store: Store, monkeypatch) -> None:
    feed, made = open_numbered(store), []
    real = _Maker.make
    monkeypatch.setattr(_Maker, "make", lambda self, epoch, batch: made.append(epoch) or real(self, epoch, batch))
    feed.prefetch(seed=0, epoch=7, shuffle=True, even=True)
    deadline = time.monotonic() + 30
    while len(made) < BATCHES_AHEAD and time.monotonic() < deadline:
        time.sleep(0.001)
    assert made == [7] * BATCHES_AHEAD
    assert len(list(feed.batches(epoch=7, shuffle=True, even=True))) == len(made) == 10


def test_a_pass_that_nobody_takes_ends_with_its_feed(store: Store) -> None:
    feed = open_numbered(store)
    feed.prefetch(seed=0, epoch=1, shuffle=True, even=True)
    assert reader_threads()
    del feed
    assert reader_threads() == []


def test_a_pass_that_was_begun_ends_when_the_feed_is_closed_and_can_be_asked_for_again(store: Store) -> None:
    feed = open_numbered(store)
    feed.prefetch(seed=0, epoch=1, shuffle=True, even=True)
    feed.close()
    assert reader_threads() == []
    assert len(list(feed.batches(epoch=1, shuffle=True, even=True))) == 10


def test_threads_that_gather_compute_alone_and_the_training_thread_as_before(store: Store, monkeypatch) -> None:
    feed, threads = open_numbered(store), []
    real = _Maker.numbers
    monkeypatch.setattr(_Maker, "numbers", lambda *args: threads.append(torch.get_num_threads()) or real(*args))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert len(list(feed.batches(even=True))) == 10
        assert (set(threads), torch.get_num_threads()) == ({1}, 2)
    finally:
        torch.set_num_threads(before)
