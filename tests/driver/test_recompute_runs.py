"""Runs whose blocks compute their input again from an earlier source: what is stored, resumed, repaired, given up."""

from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
from damaged_runs import Run, config_of, finish, flip_bit

from nf_pipeline.data.activation_shards import ActivationShards
from nf_pipeline.driver.gc import collect_garbage
from nf_pipeline.driver.run import resume, train
from nf_pipeline.driver.run_record import load_plan
from nf_pipeline.driver.verify import verify_run
from nf_pipeline.errors import ConfigError, ObjectCorrupt, ObjectMissing, StageOutdated
from nf_pipeline.events import EpochDone, Event, Note, StageStarted
from nf_pipeline.plans import Plan
from nf_pipeline.storage.layout import RunLayout
from nf_pipeline.storage.manifest import read_manifest, replace_manifest, store_object
from nf_pipeline.storage.store import Store, open_store

LAYOUT = RunLayout("run")

# Three blocks. With 4 MiB the last one has no room for all layers before it: it reads what the first one stores.
MIXED = {
    "storage__cache": "recompute",
    "memory__join_threshold": 0.0,
    "data__max_train_images": 300,
    "exits__patience": "never",
}
FROM_IMAGES = {**MIXED, "memory__max_batch_size": 32, "train__epochs": 1}


@pytest.fixture(scope="module")
def mixed_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run with sources -1, -1, 0 that nobody may change."""
    return finish(tmp_path_factory.mktemp("mixed"), **MIXED)


@pytest.fixture
def mixed(mixed_run: Run, tmp_path: Path) -> Run:
    """A copy of it."""
    return mixed_run.copy(tmp_path / "copy")


def store_of(run: Run) -> Store:
    return open_store(str(run.store))


def plan_of(run: Run) -> Plan:
    return load_plan(store_of(run), LAYOUT)


def blocks_with_shards(run: Run) -> list[int]:
    keys = [key for key, _ in store_of(run).list(LAYOUT.blocks)]
    return [
        idx for idx in range(3) if any(LAYOUT.is_shard(key) and key.startswith(LAYOUT.block(idx)) for key in keys)
    ]


def started(events: list[Event]) -> set[str]:
    return {event.stage for event in events if isinstance(event, StageStarted)}


def test_block_stores_activations_only_where_a_later_block_reads_them(mixed: Run) -> None:
    plan = plan_of(mixed)
    assert [block.source_block for block in plan.blocks] == [-1, -1, 0]
    assert [plan.stores(idx) for idx in range(3)] == [True, False, False] == [b.shard_bytes > 0 for b in plan.blocks]
    assert blocks_with_shards(mixed) == [0]
    assert [block["num_shards"] > 0 for block in mixed.summary["blocks"]] == [True, False, False]
    assert [block["write_s"] > 0 for block in mixed.summary["blocks"]] == [True, False, False]
    assert "takes more than 4.0 MiB" in plan.blocks[2].reason


def test_weights_and_passes_of_what_is_computed_again_stay_within_the_budget(mixed: Run) -> None:
    for block in mixed.summary["blocks"]:
        assert block["measured_peak_bytes"] <= block["predicted_peak_bytes"] <= block["budget_bytes"]


def test_run_from_the_images_alone_stores_nothing_and_learns(tmp_path: Path) -> None:
    run = finish(tmp_path, **{**FROM_IMAGES, "data__max_train_images": 1400, "train__augment": "crop_flip"})
    assert [block.source_block for block in plan_of(run).blocks] == [-1] * len(run.summary["blocks"])
    assert blocks_with_shards(run) == []
    assert run.summary["val_accuracy"] > 0.5
    assert verify_run(run.uri).is_whole


def test_interrupted_run_ends_with_the_same_weights(mixed_run: Run, tmp_path: Path) -> None:
    config = config_of(tmp_path, **MIXED)
    seen: set[str] = set()

    def stop(event: Event) -> None:
        if isinstance(event, EpochDone) and event.stage not in seen:
            seen.add(event.stage)
            raise KeyboardInterrupt

    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            train(config, on_event=stop)
    assert seen == {"block-000", "block-001", "block-002"}
    assert train(config)["weights_checksum"] == mixed_run.summary["weights_checksum"]


def test_finished_run_is_whole_and_has_no_garbage(mixed: Run) -> None:
    assert verify_run(mixed.uri).is_whole
    assert collect_garbage(mixed.uri, dry_run=True) == []
    events: list[Event] = []
    assert resume(mixed.uri, on_event=events.append)["weights_checksum"] == mixed.summary["weights_checksum"]
    assert started(events) == set()


@pytest.mark.parametrize(("keep", "kept"), [("last", [0]), ("none", [])])
def test_activations_stay_until_all_that_read_them_are_trained(mixed: Run, keep: str, kept: list[int]) -> None:
    store = store_of(mixed)
    store.delete([LAYOUT.model_manifest])
    resume(mixed.uri, keep=keep)
    assert blocks_with_shards(mixed) == kept
    store.delete([LAYOUT.block_manifest(2)])
    if keep == "last":
        assert resume(mixed.uri)["weights_checksum"] == mixed.summary["weights_checksum"]
        return
    with pytest.raises(ObjectMissing, match="the activations of block-000 that it reads were given up") as caught:
        resume(mixed.uri)
    assert "which trains block-000 again" in caught.value.fix
    events: list[Event] = []
    repaired = resume(mixed.uri, repair=True, on_event=events.append)
    assert repaired["weights_checksum"] == mixed.summary["weights_checksum"]
    assert started(events) == {"block-000", "block-002"}


def test_lost_commit_of_a_block_that_others_run_again_is_made_anew_alone(mixed: Run) -> None:
    store_of(mixed).delete([LAYOUT.block_manifest(1)])
    events: list[Event] = []
    assert resume(mixed.uri, on_event=events.append)["weights_checksum"] == mixed.summary["weights_checksum"]
    assert started(events) == {"block-001"}


def test_damaged_weights_of_a_block_that_is_run_again_are_named_and_repaired(mixed: Run) -> None:
    store_of(mixed).delete([LAYOUT.block_manifest(2)])
    flip_bit(mixed.path("blocks/001/attempt-*/weights.safetensors"))
    with pytest.raises(ObjectCorrupt, match=r"blocks/001/.*weights"):
        resume(mixed.uri)
    assert [problem.stage for problem in verify_run(mixed.uri).problems] == ["block-001"]
    events: list[Event] = []
    repaired = resume(mixed.uri, repair=True, on_event=events.append)
    assert repaired["weights_checksum"] == mixed.summary["weights_checksum"]
    assert started(events) == {"block-001", "block-002"}


def test_block_trained_on_other_weights_before_it_is_outdated(mixed: Run) -> None:
    """The source is the same; what differs is a block that is run again, as if another machine had trained it."""
    store, key = store_of(mixed), LAYOUT.block_manifest(1)
    manifest = read_manifest(store, key)
    tensors = safetensors.torch.load(bytes(store.get(manifest.weights.key)))
    changed = safetensors.torch.save({name: tensor + 1 for name, tensor in tensors.items()})
    replace_manifest(store, key, replace(manifest, weights=store_object(store, manifest.weights.key, changed)))
    store.delete([LAYOUT.model_manifest])
    assert [problem.stage for problem in verify_run(mixed.uri).problems] == ["block-002"]
    with pytest.raises(StageOutdated, match=r"blocks/002/manifest\.json"):
        resume(mixed.uri)
    events: list[Event] = []
    resume(mixed.uri, repair=True, on_event=events.append)
    assert started(events) == {"block-002", "model"}


def test_reader_of_activations_that_are_not_stored_is_told_how_to_get_them(mixed: Run) -> None:
    assert ActivationShards(mixed.uri, 0).num_rows > 0
    with pytest.raises(ConfigError, match="block 1 of run 'run' stores no activations") as caught:
        ActivationShards(mixed.uri, 1)
    assert "--cache shards" in caught.value.fix


def test_pipelined_run_that_is_to_recompute_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"storage\.cache recompute needs train\.mode sequential"):
        config_of(tmp_path, storage__cache="recompute", train__mode="pipelined")


def test_pipelined_run_left_to_auto_stores_every_block(tmp_path: Path) -> None:
    run = finish(tmp_path, train__mode="pipelined", memory__join_threshold=0.0, train__epochs=1)
    assert [block.source_block for block in plan_of(run).blocks] == [-1, 0, 1]


def test_repair_says_what_it_trains_again(mixed: Run) -> None:
    resume(mixed.uri, keep="none")
    store_of(mixed).delete([LAYOUT.block_manifest(2)])
    notes: list[Event] = []
    resume(mixed.uri, repair=True, on_event=notes.append)
    texts = [event.text for event in notes if isinstance(event, Note)]
    assert any("block 2 has to read them" in text for text in texts)


def test_run_left_to_auto_measures_the_store_and_leaves_nothing_of_it(tmp_path: Path) -> None:
    run = finish(tmp_path, train__unit_layers=None, train__local="layer", train__epochs=1, exits__patience="never")
    plan = plan_of(run)
    assert plan.predicted_s == pytest.approx(sum(block.predicted_s for block in plan.blocks))
    assert all("computing it again" in block.reason or block.recomputed for block in plan.blocks[1:])
    assert not store_of(run).list(f"{LAYOUT.run}/plan")


def test_what_measuring_the_store_left_is_garbage_once_nobody_works_on_the_run(mixed: Run) -> None:
    key = f"{LAYOUT.attempt_prefix('plan', 'killed')}/rates-00000.parquet"
    store_of(mixed).put(key, b"cut off")
    assert [item.key for item in collect_garbage(mixed.uri, dry_run=False)] == [key]
    assert store_of(mixed).size(key) is None
