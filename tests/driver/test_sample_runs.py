"""Runs whose units look at the network's own samples: what lies beside activations, and that nothing moves it."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from damaged_runs import Run, config_of, finish

from nf_pipeline.data.activation_shards import ActivationShards
from nf_pipeline.driver.gc import collect_garbage
from nf_pipeline.driver.run import resume, train
from nf_pipeline.driver.run_record import load_plan
from nf_pipeline.driver.verify import verify_run
from nf_pipeline.errors import DataError
from nf_pipeline.events import EpochDone, Event, StageDone, StageStarted
from nf_pipeline.storage.layout import RunLayout
from nf_pipeline.storage.manifest import StageManifest, read_manifest
from nf_pipeline.storage.reader import ShardReader
from nf_pipeline.storage.store import open_store
from nf_pipeline.worker.augment import augment_images

LAYOUT = RunLayout("run")
SAMPLED = {"train__context": "sample", "storage__cache": "shards"}
VIEWED = {**SAMPLED, "train__augment": "crop_flip", "train__views": 2, "train__epochs": 2}
PIPELINED = {**VIEWED, "train__mode": "pipelined", "train__epochs": 4, "train__round_epochs": 2}
SIDES = (1, 8, 8)


@pytest.fixture(scope="module")
def viewed_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run with two views and samples beside them that nobody may change."""
    return finish(tmp_path_factory.mktemp("sampled"), **VIEWED)


@pytest.fixture(scope="module")
def pipelined_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same in rounds."""
    return finish(tmp_path_factory.mktemp("rounds"), **PIPELINED)


def manifest_of(run: Run, block_idx: int) -> StageManifest:
    """Returns a block's manifest, or with -1 that of the ingested samples."""
    key = LAYOUT.ingest_manifest if block_idx < 0 else LAYOUT.block_manifest(block_idx)
    return read_manifest(open_store(str(run.store)), key)


def stored(run: Run, split: str, block_idx: int) -> dict[int, np.ndarray]:
    """Returns the samples of a split by id: as they were ingested, or as a block has stored them."""
    manifest, found = manifest_of(run, block_idx), {}
    reader = ShardReader(open_store(str(run.store)), manifest.shards[split], manifest.spec, batch_size=64)
    for batch in reader.batches(seed=0, epoch=0, shuffle=False):
        rows = batch.tensors if block_idx < 0 else batch.samples
        found.update(zip(batch.sample_ids.tolist(), rows.reshape(-1, *SIDES).copy(), strict=True))
    return found


def changed(images: dict[int, np.ndarray], view: int) -> dict[int, np.ndarray]:
    ids = np.array(list(images))
    x_NCHW = torch.from_numpy(np.stack(list(images.values())))
    rows = augment_images(x_NCHW, ids, kind="crop_flip", seed=0, view=view)
    return dict(zip(ids.tolist(), rows.numpy(), strict=True))


def assert_same(found: dict[int, np.ndarray], wanted: dict[int, np.ndarray]) -> None:
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[sample_id], wanted[sample_id]) for sample_id in wanted)


@pytest.mark.parametrize("block_idx", [0, 1])
def test_every_block_stores_the_sample_of_each_row_as_its_view_has_changed_it(
    viewed_run: Run, block_idx: int
) -> None:
    images = stored(viewed_run, "train", -1)
    assert_same(stored(viewed_run, "train", block_idx), images)
    second = stored(viewed_run, "train-view1", block_idx)
    assert_same(second, changed(images, VIEWED["train__epochs"] + 1))
    assert any(not np.array_equal(second[sample_id], images[sample_id]) for sample_id in images)
    assert_same(stored(viewed_run, "val", block_idx), stored(viewed_run, "val", -1))


@pytest.mark.parametrize("block_idx", [0, 1])
def test_last_round_stores_the_samples_that_it_has_changed_anew(pipelined_run: Run, block_idx: int) -> None:
    images, last = stored(pipelined_run, "train", -1), 1
    for view, split in enumerate(("train", "train-view1")):
        wanted = changed(images, PIPELINED["train__epochs"] + last * 2 + view)
        assert_same(stored(pipelined_run, split, block_idx), wanted)


def test_plan_prices_the_samples_that_are_stored(viewed_run: Run) -> None:
    plan = load_plan(open_store(str(viewed_run.store)), LAYOUT)
    assert len(plan.blocks) > 2
    for block in plan.blocks[:-1]:
        manifest = manifest_of(viewed_run, block.block_idx)
        rows = sum(manifest.num_rows(split) for split in manifest.shards)
        assert block.shard_bytes == rows * (manifest.spec.nbytes + 64)


def test_run_with_samples_is_whole_and_has_no_garbage(viewed_run: Run) -> None:
    report = verify_run(viewed_run.uri)
    assert report.is_whole and report.num_leftovers == 0
    assert collect_garbage(viewed_run.uri, dry_run=True) == []


@pytest.mark.slow
def test_run_with_samples_stopped_after_any_epoch_ends_with_the_same_weights(viewed_run: Run, tmp_path: Path) -> None:
    config, seen = config_of(tmp_path, **VIEWED), set()

    def stop(event: Event) -> None:
        if isinstance(event, EpochDone) and (event.stage, event.epoch) not in seen:
            seen.add((event.stage, event.epoch))
            raise KeyboardInterrupt

    for _ in range(VIEWED["train__epochs"] * len(viewed_run.summary["blocks"])):
        with pytest.raises(KeyboardInterrupt):
            train(config, on_event=stop)
    assert train(config)["weights_checksum"] == viewed_run.summary["weights_checksum"]


def test_rounds_with_samples_stopped_on_the_way_end_with_the_same_weights(pipelined_run: Run, tmp_path: Path) -> None:
    seen: list[Event] = []

    def stop(event: Event) -> None:
        if isinstance(event, StageStarted | EpochDone | StageDone):
            seen.append(event)
            if len(seen) == 9:  # in the second block's first round
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config_of(tmp_path, **PIPELINED), on_event=stop)
    collect_garbage(f"{tmp_path}/run", dry_run=False)
    assert resume(f"{tmp_path}/run")["weights_checksum"] == pipelined_run.summary["weights_checksum"]


def test_samples_that_a_loss_looks_at_lie_beside_bytes_as_they_are(tmp_path: Path) -> None:
    run = finish(tmp_path, train__loss="infopro", storage__cache="shards", storage__dtype="uint8")
    *storing, last = range(len(run.summary["blocks"]))
    assert storing and manifest_of(run, last).spec is None
    for block_idx in storing:
        assert manifest_of(run, block_idx).spec.affine is not None
        assert_same(stored(run, "train", block_idx), stored(run, "train", -1))
    for block in run.summary["blocks"]:
        assert block["measured_peak_bytes"] <= block["predicted_peak_bytes"]


def test_block_that_starts_from_an_earlier_source_runs_contexts_again(tmp_path: Path) -> None:
    mixed = {"storage__cache": "recompute", "memory__join_threshold": 0.0, "data__max_train_images": 300}
    run = finish(tmp_path, **{**SAMPLED, **mixed})
    sources = [block.source_block for block in load_plan(open_store(str(tmp_path)), LAYOUT).blocks]
    assert sources[-1] < len(sources) - 2, "layers run again before the last block"
    assert verify_run(run.uri).is_whole


def test_samples_are_decoded_beside_the_activations(viewed_run: Run) -> None:
    shards, images = ActivationShards(viewed_run.uri, 1), stored(viewed_run, "train", -1)
    table = pq.read_table(shards.paths)
    columns = {name: table[name].to_numpy() for name in table.column_names}
    batch = shards.decode(columns)
    assert batch["sample"].dtype == np.uint8 and batch["sample"].shape == (shards.num_rows, *SIDES)
    assert_same(dict(zip(batch["sample_id"].tolist(), batch["sample"], strict=True)), images)
    with pytest.raises(DataError, match=f"{shards.num_rows} rows have {3 * shards.num_rows} bytes, want 64 each"):
        shards.decode({**columns, "sample": np.array([b"abc"] * shards.num_rows, object)})


@pytest.mark.ray
def test_workers_that_overlap_with_samples_end_with_the_weights_of_one_process(
    pipelined_run: Run, tmp_path: Path
) -> None:
    config = config_of(tmp_path, **PIPELINED, cluster__executor="ray")
    assert train(config)["weights_checksum"] == pipelined_run.summary["weights_checksum"]


@pytest.mark.ray
def test_gang_stores_the_sample_of_every_row_of_all_its_members(viewed_run: Run, tmp_path: Path) -> None:
    run = finish(tmp_path, **VIEWED, cluster__executor="ray", train__workers_per_block=2)
    for block_idx in (0, 1):
        for split in ("train", "train-view1", "val"):
            assert_same(stored(run, split, block_idx), stored(viewed_run, split, block_idx))
    assert verify_run(run.uri).is_whole and collect_garbage(run.uri, dry_run=True) == []
