"""Runs that store 8-bit activations: half the bytes, one set of scales per block, and the same result each time."""

from collections.abc import Callable
from pathlib import Path

import pytest

from nf_pipeline.config import RunConfig
from nf_pipeline.driver.run import resume, train
from nf_pipeline.events import Event, Note
from nf_pipeline.storage.layout import RunLayout
from nf_pipeline.storage.manifest import StageManifest, read_manifest
from nf_pipeline.storage.shards import read_shard
from nf_pipeline.storage.store import open_store

MakeConfig = Callable[..., RunConfig]
SMALL = {"storage__dtype": "uint8", "storage__cache": "shards", "storage__shard_bytes": "64KiB"}


def block_of(root: Path, run: str, block_idx: int = 0) -> StageManifest:
    manifest = read_manifest(open_store(str(root / "runs")), RunLayout(run).block_manifest(block_idx))
    assert manifest is not None
    return manifest


def test_bytes_take_half_the_room_and_every_shard_has_the_scales_of_its_manifest(
    digits_config: MakeConfig, tmp_path: Path
) -> None:
    events: list[Event] = []
    small = train(digits_config(run="small", **SMALL), on_event=events.append)
    large = train(digits_config(run="large", **{**SMALL, "storage__dtype": "float16"}))
    assert small["blocks"][0]["shard_bytes"] < 0.55 * large["blocks"][0]["shard_bytes"]
    manifest, store = block_of(tmp_path, "small"), open_store(str(tmp_path / "runs"))
    assert len(manifest.spec.affine.scales) == manifest.spec.shape[0]
    assert len(manifest.named_shards) > 2
    assert all(read_shard(store, shard, manifest.spec).affine for shard in manifest.named_shards)
    notes = [event.text for event in events if isinstance(event, Note) and "8-bit" in event.text]
    assert len(notes) == len(small["blocks"]) - 1
    assert "were clipped" in notes[0]


def test_a_block_that_is_stored_again_has_the_same_bytes(digits_config: MakeConfig, tmp_path: Path) -> None:
    config = digits_config(**SMALL)
    first = train(config)
    before = block_of(tmp_path, config.run)
    store, layout = open_store(str(tmp_path / "runs")), RunLayout(config.run)
    store.put(before.shards["train"][0].key, b"damaged")
    again = resume(f"{tmp_path / 'runs'}/{config.run}", repair=True)
    after = block_of(tmp_path, config.run)
    assert after.attempt != before.attempt
    assert after.spec == before.spec
    assert after.content_checksum == before.content_checksum
    assert again["weights_checksum"] == first["weights_checksum"]
    assert read_manifest(store, layout.block_manifest(0)).spec.affine == before.spec.affine


@pytest.mark.ray
def test_several_workers_and_a_reader_of_unfinished_shards_agree_on_the_scales(
    digits_config: MakeConfig, tmp_path: Path
) -> None:
    short = {"train__epochs": 1, "data__max_train_images": 200}
    settings = {**SMALL, **short, "cluster__executor": "ray", "storage__codec": "zstd", "train__workers_per_block": 2}
    rounds = train(digits_config(run="rounds", train__mode="pipelined", **settings))
    manifest, store = block_of(tmp_path, "rounds"), open_store(str(tmp_path / "runs"))
    assert all(read_shard(store, shard, manifest.spec).affine for shard in manifest.named_shards)
    assert rounds["chosen_exit"] is not None
    overlapped = train(digits_config(run="overlapped", **{**settings, "train__workers_per_block": 1}))
    inline = train(
        digits_config(run="inline", **{**settings, "train__workers_per_block": 1, "cluster__executor": "inline"})
    )
    assert overlapped["weights_checksum"] == inline["weights_checksum"]
