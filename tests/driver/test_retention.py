"""Activations that a run gives up: which, when, and that nothing else changes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nf_pipeline.config import RunConfig
from nf_pipeline.data.activation_shards import ActivationShards
from nf_pipeline.driver.gc import collect_garbage
from nf_pipeline.driver.run import resume, train
from nf_pipeline.errors import ConfigError, ObjectMissing
from nf_pipeline.events import EpochDone, Event, StageStarted
from nf_pipeline.storage.layout import RunLayout
from nf_pipeline.storage.manifest import read_manifest, replace_manifest, verify_manifest
from nf_pipeline.storage.store import Store, open_store

MakeConfig = Callable[..., RunConfig]
LAYOUT = RunLayout("run")


@pytest.fixture
def three_blocks(digits_config: MakeConfig) -> MakeConfig:
    """Makes configurations of runs with three blocks, of which two store activations."""

    def make(**changes: Any) -> RunConfig:
        small = {"data__max_train_images": 200, "train__epochs": 1, "memory__join_threshold": 0.0}
        return digits_config(**{**small, **changes})

    return make


def store_of(config: RunConfig) -> Store:
    return open_store(config.storage.uri)


def blocks_with_shards(config: RunConfig) -> list[int]:
    store = store_of(config)
    return [idx for idx in range(3) if any(LAYOUT.is_shard(key) for key, _ in store.list(LAYOUT.block(idx)))]


def checksums(config: RunConfig) -> list[str]:
    return [read_manifest(store_of(config), LAYOUT.block_manifest(idx)).content_checksum for idx in range(3)]


@pytest.mark.parametrize("mode", ["sequential", "pipelined"])
def test_policies_end_with_the_same_weights_and_less_and_less_stored(
    three_blocks: MakeConfig, tmp_path: Path, mode: str
) -> None:
    ends = {}
    for keep in ("all", "last", "none") if mode == "sequential" else ("all", "none"):
        changes = {"storage__uri": str(tmp_path / keep), "storage__keep_activations": keep, "train__mode": mode}
        config = three_blocks(**changes, train__epochs=2 if mode == "pipelined" else 1)
        summary = train(config)
        ends[keep] = (summary["weights_checksum"], checksums(config))
        assert blocks_with_shards(config) == {"all": [0, 1], "last": [1], "none": []}[keep]
        manifests = [read_manifest(store_of(config), LAYOUT.block_manifest(idx)) for idx in range(3)]
        assert [verify_manifest(store_of(config), manifest) for manifest in manifests] == [[], [], []]
        assert all(manifest.num_rows("train") > 0 for manifest in manifests[:2])
    assert all(end == ends["all"] for end in ends.values())


def test_run_stopped_after_a_release_resumes_to_the_same_weights(three_blocks: MakeConfig, tmp_path: Path) -> None:
    straight = train(three_blocks(storage__uri=str(tmp_path / "straight")))
    config = three_blocks(storage__keep_activations="last")

    def stop(event: Event) -> None:
        if isinstance(event, EpochDone) and event.stage == "block-002":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, on_event=stop)
    assert blocks_with_shards(config) == [1]
    resumed = resume(f"{config.storage.uri}/run", on_event=(events := []).append)
    assert resumed["weights_checksum"] == straight["weights_checksum"]
    assert {event.stage for event in events if isinstance(event, StageStarted)} == {"block-002", "model"}


def test_policy_may_change_on_a_finished_run_and_what_a_crash_left_goes(three_blocks: MakeConfig) -> None:
    config = three_blocks()
    before = train(config)["weights_checksum"]
    store, key = store_of(config), LAYOUT.block_manifest(0)
    replace_manifest(store, key, read_manifest(store, key).without_shards())  # killed before it could delete
    assert blocks_with_shards(config) == [0, 1]
    assert resume(f"{config.storage.uri}/run", keep="last")["weights_checksum"] == before
    assert blocks_with_shards(config) == [1]
    assert train(three_blocks(storage__keep_activations="none"))["weights_checksum"] == before
    assert blocks_with_shards(config) == []
    with pytest.raises(ConfigError, match=r"storage\.keep_activations"):
        resume(f"{config.storage.uri}/run", keep="some")


def test_gc_applies_a_policy_to_a_finished_run(three_blocks: MakeConfig) -> None:
    config = three_blocks()
    before, uri = train(config)["weights_checksum"], f"{config.storage.uri}/run"
    stored = store_of(config).list("run")
    listed = collect_garbage(uri, dry_run=True, keep="none")
    assert [entry for entry in store_of(config).list("run") if "/lock/" not in entry[0]] == [
        entry for entry in stored if "/lock/" not in entry[0]
    ]
    assert {item.kind for item in listed} == {"activations"}
    assert collect_garbage(uri, dry_run=False, keep="none") == listed
    assert blocks_with_shards(config) == []
    assert resume(uri)["weights_checksum"] == before
    assert collect_garbage(uri, dry_run=False, keep="none") == []


def test_reader_of_released_activations_is_told_what_to_do(three_blocks: MakeConfig) -> None:
    config = three_blocks(storage__keep_activations="last")
    train(config)
    uri = f"{config.storage.uri}/run"
    assert ActivationShards(uri, 1).num_rows > 0
    with pytest.raises(ObjectMissing, match="keep activations=all"):
        ActivationShards(uri, 0)


def test_block_that_lost_its_commit_after_its_input_was_given_up_names_what_to_repeat(
    three_blocks: MakeConfig,
) -> None:
    config = three_blocks(storage__keep_activations="none")
    before, store = train(config)["weights_checksum"], store_of(config)
    store.delete([LAYOUT.block_manifest(2)])
    with pytest.raises(ObjectMissing, match="block-002 has to be trained again") as caught:
        resume(f"{config.storage.uri}/run")
    assert "--repair, which trains block-000, block-001 again" in caught.value.fix
    assert resume(f"{config.storage.uri}/run", repair=True)["weights_checksum"] == before
    assert blocks_with_shards(config) == []


def test_unread_activations_stay_whatever_the_policy(three_blocks: MakeConfig) -> None:
    config = three_blocks()
    train(config)
    store_of(config).delete([LAYOUT.block_manifest(1), LAYOUT.model_manifest])
    listed = collect_garbage(f"{config.storage.uri}/run", dry_run=True, keep="none")
    assert not [item for item in listed if item.key.startswith(f"{LAYOUT.block(0)}/")]
