"""Whatever a run has been through, `gc` and the retention policy never delete what a manifest names.

Drivers that are killed at any of their writes and deletions make random histories of a run in a real store; the
real code releases and collects, which may be killed as well.
"""

import random
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

import pytest
from small_plans import chain_plan

from nf_pipeline.driver.gc import clear_run
from nf_pipeline.driver.retention import Retention
from nf_pipeline.errors import AlreadyExists
from nf_pipeline.storage.layout import RunLayout
from nf_pipeline.storage.local import LocalStore
from nf_pipeline.storage.manifest import (
    ObjectInfo,
    StageManifest,
    checksum_of,
    commit_manifest,
    read_manifest,
    verify_manifest,
)
from nf_pipeline.storage.sealed import seal
from nf_pipeline.storage.shards import ShardInfo, TensorSpec
from nf_pipeline.storage.store import Data
from nf_pipeline.worker.checkpoint_record import CheckpointRecord, read_record

LAYOUT = RunLayout("run")
NUM_BLOCKS = 4
PLAN = chain_plan(NUM_BLOCKS)
NUM_HISTORIES = 15
STEPS = 40


class Killed(Exception):
    """The process was killed between two operations on the store."""


class MortalStore(LocalStore):
    """A folder whose user dies after so many changes to it."""

    changes_left = 10**9

    def _change(self) -> None:
        if self.changes_left == 0:
            raise Killed
        self.changes_left -= 1

    def put(self, key: str, data: Data) -> None:
        self._change()
        super().put(key, data)

    def create(self, key: str, data: Data) -> None:
        self._change()
        super().create(key, data)

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            self._change()
            super().delete([key])


class History:
    """A run as its drivers, killed again and again, leave it."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.draw = random.Random(seed)
        self.store = MortalStore(str(folder))
        self.keep = ("all", "last", "none")[seed % 3]
        self.num_attempts = 0
        self._live(lambda: self.store.put(LAYOUT.run_json, b"{}"))

    def step(self) -> None:
        """One thing that happens, most often cut short."""
        happens = self.draw.choice([self.ingest, self.train, self.train, self.train, self.assemble, self.collect])
        self._live(happens, changes=self.draw.choice([0, 1, 2, 3, 4, 6, 8, 12, 10**9]))

    def finish(self) -> None:
        """Brings every stage to its commit, undisturbed, as the driver does: what was cut short is made up for."""
        for act in (self.ingest, *[self.train] * NUM_BLOCKS, self.assemble):
            self._live(act)
        for block_idx in range(NUM_BLOCKS):
            self._retention().block_done(block_idx)
        self._retention().run_done(NUM_BLOCKS)

    def ingest(self) -> None:
        attempt = self._attempt()
        keys = [LAYOUT.ingest_shard(LAYOUT.ingest_attempt(attempt), "train", idx) for idx in range(2)]
        self.store.put(LAYOUT.dataset_file("train", 0), b"x")
        self._commit(LAYOUT.ingest_manifest, "ingest", attempt, keys)
        self.store.delete([LAYOUT.dataset_file("train", 0)])

    def train(self) -> None:
        """An attempt at the first block that is not committed, or a late one at any other."""
        blocks = [read_manifest(self.store, LAYOUT.block_manifest(idx)) for idx in range(NUM_BLOCKS)]
        block_idx = next((idx for idx, manifest in enumerate(blocks) if manifest is None), 0)
        before = LAYOUT.block_manifest(block_idx - 1) if block_idx else LAYOUT.ingest_manifest
        stage_input = read_manifest(self.store, before)
        if stage_input is None:
            return
        attempt = self._attempt()
        prefix = LAYOUT.block_attempt(block_idx, attempt)
        self._checkpoints(prefix)
        self.store.put(LAYOUT.publication(block_idx, 0, 0), b"{}")
        shards = [LAYOUT.shard(prefix, "train", idx) for idx in range(2 if block_idx < NUM_BLOCKS - 1 else 0)]
        weights, key = LAYOUT.weights(block_idx, attempt), LAYOUT.block_manifest(block_idx)
        self._commit(key, f"block-{block_idx:03d}", attempt, shards, weights, stage_input.content_checksum)
        self.store.delete([LAYOUT.publication(block_idx, 0, 0)])
        self._retention().block_done(block_idx)

    def assemble(self) -> None:
        if read_manifest(self.store, LAYOUT.block_manifest(NUM_BLOCKS - 1)) is None:
            return
        self._commit(LAYOUT.model_manifest, "model", self._attempt(), [], LAYOUT.model_weights)
        self._retention().run_done(NUM_BLOCKS)

    def collect(self) -> None:
        clear_run(self.store, LAYOUT, is_idle=self.draw.random() < 0.7, dry_run=False)

    def missing(self) -> list[str]:
        """Lists what a manifest names and is not there."""
        manifests = [read_manifest(self.store, key) for key in self._manifest_keys()]
        return [problem for found in manifests if found is not None for problem in verify_manifest(self.store, found)]

    def named(self) -> set[str]:
        """Lists the manifests, and all that they name."""
        keys = {key for key in self._manifest_keys() if self.store.size(key) is not None}
        return keys | {entry.key for key in keys for entry in read_manifest(self.store, key).named_objects}

    def below(self, block_idx: int) -> list[str]:
        """Lists the objects of a block."""
        return [key for key, _ in self.store.list(LAYOUT.block(block_idx))]

    def is_committed(self, block_idx: int) -> bool:
        return self.store.size(LAYOUT.block_manifest(block_idx)) is not None

    def newest_checkpoints(self) -> dict[tuple[int, int], int]:
        """Maps blocks that are not committed and batch sizes to the epoch that their next attempt goes on from."""
        newest: dict[tuple[int, int], int] = {}
        for block_idx in range(NUM_BLOCKS):
            if not self.is_committed(block_idx):
                for key in self.below(block_idx):
                    record = read_record(self.store, key) if key.endswith("/checkpoint.json") else None
                    if record is not None and self.store.size(record.key) is not None:
                        work = (block_idx, record.batch_size)
                        newest[work] = max(record.epoch, newest.get(work, -1))
        return newest

    def _manifest_keys(self) -> list[str]:
        return [LAYOUT.ingest_manifest, LAYOUT.model_manifest, *map(LAYOUT.block_manifest, range(NUM_BLOCKS))]

    def _live(self, act: Callable[[], None], changes: int = 10**9) -> None:
        self.store.changes_left = changes
        try:
            act()
        except (Killed, AlreadyExists):
            pass
        finally:
            self.store.changes_left = 10**9

    def _attempt(self) -> str:
        self.num_attempts += 1
        return f"{self.num_attempts:08x}"

    def _retention(self) -> Retention:
        return Retention(self.store, LAYOUT, self.keep, PLAN)

    def _checkpoints(self, prefix: str) -> None:
        for epoch in range(self.draw.randrange(3)):
            key = LAYOUT.checkpoint_tensors(prefix, epoch)
            self.store.put(key, b"state")
            record = CheckpointRecord(fingerprint="f", batch_size=self.draw.choice([8, 16]), epoch=epoch, key=key)
            self.store.put(LAYOUT.checkpoint_record(prefix), seal({"record": asdict(record)}))

    def _commit(
        self, key: str, stage: str, attempt: str, shards: list[str], weights: str = "", input_checksum: str = ""
    ) -> None:
        data = stage.encode()  # attempts at the same work give the same result
        infos = [
            ShardInfo(key=shard, num_bytes=len(data), num_rows=1, checksum=checksum_of(data)) for shard in shards
        ]
        for name in [*shards, *([weights] if weights else [])]:
            self.store.put(name, data)
        manifest = StageManifest(
            stage=stage,
            fingerprint="f",
            attempt=attempt,
            input_checksum=input_checksum,
            spec=TensorSpec("uint8", (1,)),
            shards={"train": tuple(infos)},
            weights=ObjectInfo(key=weights, num_bytes=len(data), checksum=checksum_of(data)) if weights else None,
        )
        commit_manifest(self.store, key, manifest)


@pytest.mark.parametrize("seed", range(NUM_HISTORIES))
def test_no_history_makes_gc_delete_what_a_manifest_names(seed: int, tmp_path: Path) -> None:
    history = History(tmp_path, seed)
    for _ in range(STEPS):
        resumable = history.newest_checkpoints()
        history.step()
        assert history.missing() == []
        newest = history.newest_checkpoints()
        lost = [work for work, epoch in resumable.items() if epoch > newest.get(work, -1)]
        assert not [block_idx for block_idx, _ in lost if not history.is_committed(block_idx)]
    history.finish()
    assert history.missing() == []
    clear_run(history.store, LAYOUT, is_idle=True, dry_run=False)
    left = {key for key, _ in history.store.list("run")}
    assert left == history.named() | {LAYOUT.run_json}
    stored = [idx for idx in range(NUM_BLOCKS) if any(map(LAYOUT.is_shard, history.below(idx)))]
    assert stored == {"all": [0, 1, 2], "last": [2], "none": []}[history.keep]
