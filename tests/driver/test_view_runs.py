"""Runs that store several augmented views: what they hold, how they go on, and that nothing of them is forgotten."""

import threading
import time
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from damaged_runs import Run, config_of, finish, flip_bit

from nf_pipeline.config import RunConfig
from nf_pipeline.data.activation_shards import ActivationShards
from nf_pipeline.driver.gc import collect_garbage
from nf_pipeline.driver.run import resume, train
from nf_pipeline.driver.run_record import load_plan
from nf_pipeline.driver.verify import verify_run
from nf_pipeline.errors import ConfigError
from nf_pipeline.events import EpochDone, Event, StageDone, StageStarted
from nf_pipeline.storage.layout import RunLayout
from nf_pipeline.storage.manifest import StageManifest, read_manifest
from nf_pipeline.storage.published import Publication
from nf_pipeline.storage.shards import read_shard
from nf_pipeline.storage.store import open_store
from nf_pipeline.worker.augment import augment_maps
from nf_pipeline.worker.block_input import BlockInput
from nf_pipeline.worker.feed import Feed
from nf_pipeline.worker.tasks import BlockTask

MakeConfig = Callable[..., RunConfig]
CPU = torch.device("cpu")
LAYOUT = RunLayout("run")
VIEWED = {"train__augment": "crop_flip", "train__views": 2, "train__epochs": 3}
PIPELINED = {**VIEWED, "train__mode": "pipelined", "train__epochs": 4, "train__round_epochs": 2}


@pytest.fixture(scope="module")
def viewed_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run with two views that nobody may change."""
    return finish(tmp_path_factory.mktemp("viewed"), **VIEWED)


@pytest.fixture
def viewed(viewed_run: Run, tmp_path: Path) -> Run:
    """A copy of it."""
    return viewed_run.copy(tmp_path / "copy")


def manifest_of(run: Run, block_idx: int = 0) -> StageManifest:
    return read_manifest(open_store(str(run.store)), LAYOUT.block_manifest(block_idx))


def rows_of(run: Run, split: str, block_idx: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Returns the tensors as bytes and the sample ids, in stored order."""
    manifest, store = manifest_of(run, block_idx), open_store(str(run.store))
    shards = [read_shard(store, shard, manifest.spec) for shard in manifest.shards[split]]
    tensors, ids = zip(*[(shard.tensors, shard.sample_ids) for shard in shards], strict=True)
    return np.concatenate(tensors), np.concatenate(ids)


def checksums(manifest: StageManifest, split: str) -> list[str]:
    return [shard.checksum for shard in manifest.shards[split]]


def started(events: list[Event]) -> set[str]:
    return {event.stage for event in events if isinstance(event, StageStarted)}


@pytest.mark.parametrize("block_idx", [0, 1])
def test_views_hold_the_same_samples_changed_otherwise_and_validation_once(viewed_run: Run, block_idx: int) -> None:
    assert len(viewed_run.summary["blocks"]) > block_idx + 1, "a later block reads it"
    assert set(manifest_of(viewed_run, block_idx).shards) == {"train", "train-view1", "val"}
    first, second = (rows_of(viewed_run, split, block_idx) for split in ("train", "train-view1"))
    assert np.array_equal(first[1], second[1])
    changed = (first[0] != second[0]).any(axis=1)
    assert changed.mean() > 0.9
    assert not set(first[1]) & set(rows_of(viewed_run, "val", block_idx)[1])


def test_first_view_is_what_a_run_with_one_view_stores(viewed_run: Run, tmp_path: Path) -> None:
    one = manifest_of(finish(tmp_path, **{**VIEWED, "train__views": 1}))
    several = manifest_of(viewed_run)
    assert set(one.shards) == {"train", "val"}
    assert all(checksums(several, split) == checksums(one, split) for split in one.shards)
    assert several.weights.checksum == one.weights.checksum, "the images are read as before"


def test_plan_prices_what_is_stored(viewed_run: Run) -> None:
    plan = load_plan(open_store(str(viewed_run.store)), LAYOUT)
    for block in plan.blocks[:-1]:
        manifest = manifest_of(viewed_run, block.block_idx)
        rows = sum(manifest.num_rows(split) for split in manifest.shards)
        assert block.shard_bytes == rows * manifest.spec.nbytes
    assert "stores 2 views of the train split" in plan.blocks[0].reason


def test_run_stopped_after_any_epoch_ends_with_the_same_weights(viewed_run: Run, tmp_path: Path) -> None:
    config, seen = config_of(tmp_path, **VIEWED), set()

    def stop(event: Event) -> None:
        if isinstance(event, EpochDone) and (event.stage, event.epoch) not in seen:
            seen.add((event.stage, event.epoch))
            raise KeyboardInterrupt

    num_epochs = VIEWED["train__epochs"] * len(viewed_run.summary["blocks"])
    for _ in range(num_epochs):
        with pytest.raises(KeyboardInterrupt):
            train(config, on_event=stop)
        collect_garbage(f"{tmp_path}/run", dry_run=False)
    assert len(seen) == num_epochs
    assert train(config)["weights_checksum"] == viewed_run.summary["weights_checksum"]


@pytest.fixture(scope="module")
def pipelined_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished pipelined run of two rounds with two views each."""
    return finish(tmp_path_factory.mktemp("pipelined"), **PIPELINED)


def test_pipelined_run_keeps_the_views_of_its_last_round(pipelined_run: Run) -> None:
    assert set(manifest_of(pipelined_run).shards) == {"train", "train-view1", "val"}
    first, second = (rows_of(pipelined_run, split)[0] for split in ("train", "train-view1"))
    assert (first != second).any(axis=1).mean() > 0.9
    assert verify_run(pipelined_run.uri).is_whole and collect_garbage(pipelined_run.uri, dry_run=True) == []


def input_of(run: Run, block_idx: int, round_idx: int = 0, **settings: object) -> BlockInput:
    """Opens what a block of a finished run has read."""
    store = open_store(str(run.store))
    task = BlockTask(
        config=config_of(run.store, **settings),
        plan=load_plan(store, LAYOUT),
        block_idx=block_idx,
        round_idx=round_idx,
        batch_size=50,
        attempt="test",
        num_attempts=1,
        num_threads=1,
    )
    return BlockInput(store, LAYOUT, task)


def samples(feed: Feed, epoch: int = 0) -> tuple[torch.Tensor, np.ndarray]:
    batches = [(batch.sample_ids, batch.take_x()) for batch in feed.batches(epoch=epoch)]
    return torch.cat([x_NCHW for _, x_NCHW in batches]), np.concatenate([ids for ids, _ in batches])


def test_images_are_changed_otherwise_in_every_round_view_and_epoch(pipelined_run: Run) -> None:
    rounds = [input_of(pipelined_run, 0, round_idx, **PIPELINED) for round_idx in range(2)]
    seen = [samples(opened.open_view(50, CPU, view))[0] for opened in rounds for view in range(2)]
    seen += [samples(rounds[0].open_train(50, CPU), epoch)[0] for epoch in range(PIPELINED["train__epochs"])]
    # Of 18 crops and flips of so small an image two are the same now and then.
    assert all(bool((a != b).flatten(1).any(1).float().mean() > 0.7) for a, b in combinations(seen, 2))


@pytest.mark.parametrize("epoch", [0, 1])
def test_maps_of_the_view_whose_turn_it_is_are_changed_by_sample_epoch_and_block(viewed_run: Run, epoch: int) -> None:
    plain = samples(input_of(viewed_run, 1, **VIEWED).open_view(50, CPU, epoch))
    opened = input_of(viewed_run, 1, **VIEWED, train__feature_augment="flip_shift")
    x_NCHW, ids = samples(opened.open_train(50, CPU), epoch)
    wanted_NCHW = augment_maps(*plain, kind="flip_shift", seed=0, epoch=epoch, block_idx=1)
    assert np.array_equal(ids, plain[1]) and torch.equal(x_NCHW, wanted_NCHW)
    for untouched in (opened.open_view(50, CPU, epoch), opened.open_val(50, CPU)):
        same = samples(untouched, epoch)[0]
        assert torch.equal(same, samples(untouched, epoch + 1)[0])


def test_views_that_are_still_being_written_are_read_as_if_they_were_all_there(viewed: Run) -> None:
    store, commit = open_store(str(viewed.store)), LAYOUT.block_manifest(0)
    manifest, committed = manifest_of(viewed), store.get(commit)
    stored = input_of(viewed, 1, **VIEWED).open_train(50, CPU)
    wanted = [samples(stored, epoch) for epoch in range(3)]
    store.delete([commit])
    publication = Publication(store, LAYOUT.publication(0, 0, 0), manifest.attempt)

    def write() -> None:
        for split in ("train", "train-view1"):
            for shard_idx, shard in enumerate(manifest.shards[split]):
                time.sleep(0.1)
                publication.add(split, shard_idx, shard)
            publication.flush()
        time.sleep(0.3)
        store.put(commit, bytes(committed))

    opened, writer = input_of(viewed, 1, **VIEWED), threading.Thread(target=write)
    assert opened.manifest is None
    feed = opened.open_train(50, CPU)
    writer.start()
    found = [samples(feed, epoch) for epoch in range(2)]
    list(opened.wait_committed())
    found.append(samples(feed, 2))
    writer.join()
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.equal(ours[0], theirs[0]) and np.array_equal(ours[1], theirs[1])
    assert not torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][0], found[2][0])


@pytest.mark.parametrize("num_events", [8, 17])
def test_pipelined_run_stopped_anywhere_ends_with_the_same_weights(
    pipelined_run: Run, num_events: int, tmp_path: Path
) -> None:
    seen: list[Event] = []

    def stop(event: Event) -> None:
        if isinstance(event, StageStarted | EpochDone | StageDone):
            seen.append(event)
            if len(seen) == num_events:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config_of(tmp_path, **PIPELINED), on_event=stop)
    collect_garbage(f"{tmp_path}/run", dry_run=False)
    assert resume(f"{tmp_path}/run")["weights_checksum"] == pipelined_run.summary["weights_checksum"]


def test_every_shard_of_every_view_is_known_to_verify_and_no_garbage(viewed: Run) -> None:
    report = verify_run(viewed.uri)
    assert report.is_whole and report.num_leftovers == 0
    assert collect_garbage(viewed.uri, dry_run=True) == []


def test_damaged_shard_of_another_view_is_found_and_made_anew(viewed: Run) -> None:
    flip_bit(viewed.path("blocks/000/attempt-*/activations/train-view1-*.parquet"))
    (problem,) = verify_run(viewed.uri).problems
    assert problem.stage == "block-000" and "train-view1" in problem.key
    events: list[Event] = []
    repaired = resume(viewed.uri, repair=True, on_event=events.append)
    assert repaired["weights_checksum"] == viewed.summary["weights_checksum"]
    assert started(events) == {"block-000"}
    assert verify_run(viewed.uri).is_whole


@pytest.mark.parametrize("keep", ["last", "none"])
def test_shards_of_all_views_are_given_up_together(viewed: Run, keep: str) -> None:
    resume(viewed.uri, keep=keep)
    blocks = sorted({path.relative_to(viewed.folder).parts[1] for path in viewed.folder.rglob("train-view1-*")})
    num_storing = len(viewed.summary["blocks"]) - 1
    assert blocks == ([] if keep == "none" else [f"{num_storing - 1:03d}"])
    assert verify_run(viewed.uri).is_whole


def test_blocks_that_start_from_the_images_need_no_views_and_others_read_them(tmp_path: Path) -> None:
    mixed = {"storage__cache": "recompute", "memory__join_threshold": 0.0, "data__max_train_images": 300}
    run = finish(tmp_path, **{**VIEWED, **mixed})
    sources = [block.source_block for block in load_plan(open_store(str(tmp_path)), LAYOUT).blocks]
    assert sources == [-1, -1, 0], "the last block reads what the first one stores"
    assert set(manifest_of(run).shards) == {"train", "train-view1", "val"}
    assert not manifest_of(run, 1).shards
    assert verify_run(run.uri).is_whole


def test_bytes_have_the_same_scales_in_all_views(tmp_path: Path) -> None:
    run = finish(tmp_path, **VIEWED, storage__dtype="uint8")
    first, second = (rows_of(run, split)[0] for split in ("train", "train-view1"))
    assert manifest_of(run).spec.affine is not None
    assert first.shape == second.shape and not np.array_equal(first, second)
    assert ActivationShards(run.uri, 0, "train-view1").num_rows == ActivationShards(run.uri, 0).num_rows


def test_maps_are_changed_for_training_alone_and_cost_no_storage(tmp_path: Path) -> None:
    run = finish(tmp_path / "changed", storage__dtype="uint8", train__feature_augment="flip_shift")
    plain = finish(tmp_path / "plain", storage__dtype="uint8")
    ours, theirs = manifest_of(run), manifest_of(plain)
    assert all(checksums(ours, split) == checksums(theirs, split) for split in ("train", "val"))
    assert manifest_of(run, 1).weights.checksum != manifest_of(plain, 1).weights.checksum


def test_coloured_views_are_stored_of_grey_images(tmp_path: Path) -> None:
    run = finish(tmp_path, **{**VIEWED, "train__augment": "color"})
    first, second = (rows_of(run, split)[0] for split in ("train", "train-view1"))
    assert not np.array_equal(first, second)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        pytest.param({"train__augment": "none"}, "views 2 with augment none would all be the same", id="no changes"),
        pytest.param({"train__epochs": 1}, "an epoch reads one, epochs 1 would leave some unread", id="few epochs"),
        pytest.param({"train__mode": "pipelined"}, "round_epochs 1 would leave some unread", id="short rounds"),
        pytest.param(
            {"train__mode": "pipelined", "train__epochs": 1, "train__round_epochs": 9},
            "epochs 1 would leave some unread",
            id="rounds longer than the run",
        ),
        pytest.param({"train__views": 0}, "views", id="none at all"),
    ],
)
def test_views_that_nobody_would_read_or_tell_apart_are_refused(
    changes: dict[str, object], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=words):
        config_of(tmp_path, **{**VIEWED, **changes})


@pytest.mark.ray
def test_workers_that_overlap_end_with_the_weights_of_one_process(viewed_run: Run, tmp_path: Path) -> None:
    config = config_of(tmp_path, **VIEWED, cluster__executor="ray")
    assert train(config)["weights_checksum"] == viewed_run.summary["weights_checksum"]


@pytest.mark.ray
def test_gang_stores_every_view_of_all_its_members_samples(viewed_run: Run, tmp_path: Path) -> None:
    run = finish(tmp_path, **VIEWED, cluster__executor="ray", train__workers_per_block=2)
    wanted = sorted(rows_of(viewed_run, "train")[1])
    for split in ("train", "train-view1"):
        assert sorted(rows_of(run, split)[1]) == wanted
    assert verify_run(run.uri).is_whole and collect_garbage(run.uri, dry_run=True) == []
