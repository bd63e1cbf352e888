"""What is stored of the blocks' rounds: which are committed, whether they can be built on, which nobody needs.

Reads and deletes; starts nothing. Entry class: `RoundStore`.
"""

import logging
from collections.abc import Iterable, Sequence

from nf_pipeline.config import RunConfig
from nf_pipeline.driver.round_schedule import Round
from nf_pipeline.driver.stage_runner import StageRunner
from nf_pipeline.driver.stages import block_stage
from nf_pipeline.errors import ObjectCorrupt, ObjectMissing, StageOutdated, StorageError
from nf_pipeline.plans import Plan
from nf_pipeline.storage.layout import RunLayout
from nf_pipeline.storage.manifest import StageManifest, read_manifest, verify_manifest
from nf_pipeline.storage.sealed import repair_command
from nf_pipeline.worker.stage_input import read_block, read_ingest
from nf_pipeline.worker.tasks import block_fingerprint, chain_checksum, num_rounds

logger = logging.getLogger(__name__)


class RoundStore:
    """The committed rounds of one run.

    Attributes:
        skipped_s: seconds that finished blocks took in earlier drivers.
    """

    def __init__(self, config: RunConfig, plan: Plan, layout: RunLayout, runner: StageRunner) -> None:
        self.skipped_s = 0.0
        self._config = config
        self._plan = plan
        self._layout = layout
        self._runner = runner
        self._store = runner.store
        self._num_rounds = num_rounds(config)
        self._stored: set[Round] = set()

    def key(self, work: Round) -> str:
        """Returns the key of a round's commit."""
        return self._layout.round_manifest(work.block_idx, work.round_idx, self._num_rounds)

    def manifest(self, work: Round) -> StageManifest | None:
        """Reads a round's commit; None if it is not finished, or retired."""
        return read_manifest(self._store, self.key(work))

    def find_done(self, ingest: StageManifest) -> list[int]:
        """Counts every block's committed rounds, after checking the newest.

        Args:
            ingest: what the first block reads.

        Raises:
            ObjectCorrupt: a commit belongs to other work, or names objects that are not there.
            ObjectMissing: a round would have to be read that is no longer stored.
        """
        done: list[int] = []
        finals: list[StageManifest | None] = [ingest]
        for block_idx, block in enumerate(self._plan.blocks):
            final = self._find_final(block_idx, finals[block.source_block + 1 :])
            done.append(self._num_rounds if final else self._count_rounds(block_idx))
            finals.append(final)
        if self._num_rounds > 1:
            self._check_inputs(done)
        return done

    def find_ahead(self, done: list[int]) -> frozenset[int]:
        """Lists the blocks that are finished though one before them is not: somebody took its commit away."""
        unfinished = [block_idx for block_idx, count in enumerate(done) if count < self._num_rounds]
        return frozenset(idx for idx in unfinished if self.manifest(Round(idx, self._num_rounds - 1)) is not None)

    def take(self, work: Round) -> None:
        """Notes that a round is committed.

        Raises:
            StageOutdated: the last round's commit is not of this work: it was trained on another input.
        """
        self._stored.add(work)
        if work.round_idx < self._num_rounds - 1:
            return
        if work.block_idx > 0:
            self._check_fingerprint(work)

    def retire(self, rounds: Iterable[Round]) -> None:
        """Deletes rounds that nobody reads any more: the commit first, so that it never names what is gone."""
        for work in rounds:
            if work not in self._stored:
                continue
            self._stored.discard(work)
            try:
                self._delete(work)
            except StorageError as error:
                logger.warning("round %d of block %d could not be deleted: %s", work.round_idx, work.block_idx, error)

    def count_attempts(self, block_idx: int) -> int:
        """Counts the attempts at a block that have stored something."""
        prefix = self._layout.block(block_idx)
        depth = prefix.count("/") + 1
        names = {key.split("/")[depth] for key, _ in self._store.list(prefix)}
        return sum(name.startswith("attempt-") for name in names)

    def _find_final(self, block_idx: int, stage_input: Sequence[StageManifest | None]) -> StageManifest | None:
        if None in stage_input:
            return None
        fingerprint = self._fingerprint(block_idx, stage_input)
        key = self._layout.block_manifest(block_idx)
        done = self._runner.committed(block_stage(block_idx), key, fingerprint, self._repeat())
        if done is not None:
            self.skipped_s += done.facts["train_s"] + done.facts["write_s"]
        return done

    def _check_fingerprint(self, work: Round) -> None:
        source = self._plan.blocks[work.block_idx].source_block
        stage_input = [read_block(self._store, self._layout, idx) for idx in range(max(source, 0), work.block_idx)]
        if source < 0:
            stage_input.insert(0, read_ingest(self._store, self._layout))
        final, wanted = self.manifest(work), self._fingerprint(work.block_idx, stage_input)
        if final is None or final.fingerprint != wanted:
            raise StageOutdated(
                f"{self.key(work)} was committed for another input than what block {work.block_idx - 1} stored",
                self._store.uri,
                self._repeat(),
                self.key(work),
            )

    def _fingerprint(self, block_idx: int, stage_input: Sequence[StageManifest]) -> str:
        """Identifies a block's last round by what it reads and by the blocks that it runs again."""
        checksum = chain_checksum([part.content_checksum for part in stage_input])
        return block_fingerprint(self._config, self._plan, block_idx, self._num_rounds - 1, checksum)

    def _count_rounds(self, block_idx: int) -> int:
        listed = [self._layout.round_of(key) for key, _ in self._store.list(self._layout.rounds(block_idx))]
        rounds = [Round(block_idx, round_idx) for round_idx in listed if round_idx is not None]
        self._stored.update(rounds)
        if not rounds:
            return 0
        problems = verify_manifest(self._store, self.manifest(max(rounds)))
        if problems:
            raise ObjectCorrupt(
                f"round {max(rounds).round_idx + 1} of {block_stage(block_idx)} is committed, but not all of its "
                f"objects are there: {'; '.join(problems[:3])}",
                self._store.uri,
                self._repeat(),
            )
        return max(rounds).round_idx + 1

    def _check_inputs(self, done: list[int]) -> None:
        """Refuses what cannot be continued: rounds that must be read again are gone."""
        for block_idx in self.find_ahead(done):
            raise self._lost(f"{block_stage(block_idx)} is finished, but a block before it has lost its commit")
        for block_idx, count in enumerate(done[1:], start=1):
            if count == self._num_rounds or done[block_idx - 1] <= count:
                continue
            if self.manifest(Round(block_idx - 1, count)) is None:
                raise self._lost(f"{block_stage(block_idx)} continues with round {count + 1}, whose input is gone")

    def _lost(self, what: str) -> ObjectMissing:
        return ObjectMissing(what, self._store.uri, self._repeat())

    def _repeat(self) -> str:
        """Says how to train anew what is damaged, and how much that is."""
        command = repair_command(self._store, self._layout.run)
        if self._num_rounds > 1:
            return f"{command}: all blocks are trained again, as rounds were deleted when they had been read"
        return f"{command}: the block is trained again from its input, and later ones that do not fit it then"

    def _delete(self, work: Round) -> None:
        manifest = self.manifest(work)
        if manifest is None:
            return
        shards = [shard.key for infos in manifest.shards.values() for shard in infos]
        # The state may be an earlier attempt's. Documents go first, so that none ever names what is gone.
        record = self._layout.checkpoint_record(manifest.weights.key.rpartition("/")[0])
        self._store.delete([self.key(work), record])
        self._store.delete([*shards, manifest.weights.key])
