"""Which blocks' activations a run may give up, and how: the policy `storage.keep_activations`.

Giving up is two steps that may be cut anywhere: first the block's manifest is replaced by one of the same result that
names no shard any more, then the shards are deleted, those of lost attempts as well. So no manifest ever names what
is gone, and what a crash in between leaves goes at the next start (or by `driver.gc`). Ingested images are data, not
activations: they stay. Deliberately knows nothing of the schedule; only the holder of the run may call it.
Entries: `Retention`, `check_readable`.
"""

import logging
from collections.abc import Iterator

from nf_pipeline.driver.stages import block_stage
from nf_pipeline.errors import ObjectMissing, StorageError
from nf_pipeline.plans import Plan
from nf_pipeline.storage.layout import RunLayout
from nf_pipeline.storage.manifest import StageManifest, read_manifest, replace_manifest
from nf_pipeline.storage.sealed import repair_command
from nf_pipeline.storage.store import Store
from nf_pipeline.worker.tasks import chain_checksum

logger = logging.getLogger(__name__)


class Retention:
    """The policy of one run at work.

    Args:
        store, layout: of the run.
        keep: "all", "last" or "none"; see `StorageConfig.keep_activations`.
        plan: of the run.
    """

    def __init__(self, store: Store, layout: RunLayout, keep: str, plan: Plan) -> None:
        self._store = store
        self._layout = layout
        self._keep = keep
        self._plan = plan

    def block_done(self, block_idx: int) -> None:
        """Gives up what this block, which is committed, was the last to read; what cannot be deleted `gc` will."""
        source = self._plan.blocks[block_idx].source_block
        num_blocks = len(self._plan.blocks)
        if source in self._releasable(num_blocks, is_model_done=False):
            self._release(source, num_blocks)

    def run_done(self, num_blocks: int) -> None:
        """Gives up what the policy keeps no longer once the final model is committed.

        Args:
            num_blocks: that are trained: fewer than planned if the run ended early.
        """
        for block_idx in self._releasable(num_blocks, is_model_done=True):
            self._release(block_idx, num_blocks)

    def find(self, num_blocks: int, *, is_model_done: bool) -> Iterator[tuple[int, StageManifest]]:
        """Yields the blocks that have activations to give up, with their manifests.

        Args:
            num_blocks: that the run has, or has had to train if it is finished.
            is_model_done: whether the final model is committed.
        """
        for block_idx in self._releasable(num_blocks, is_model_done=is_model_done):
            manifest = self._read_to_the_end(block_idx, num_blocks)
            if manifest is not None and manifest.named_shards:
                yield block_idx, manifest

    def _releasable(self, num_blocks: int, *, is_model_done: bool) -> list[int]:
        """Returns the blocks whose activations are not kept once they have been read."""
        storing = [block_idx for block_idx in range(num_blocks) if self._plan.stores(block_idx)]
        if self._keep == "all":
            return []
        if self._keep == "none" and is_model_done:
            return storing
        # A run that ended early goes on from these once it is told to.
        unread = {block.source_block for block in self._plan.blocks[num_blocks:]}
        return [block_idx for block_idx in storing[:-1] if block_idx not in unread]

    def _release(self, block_idx: int, num_blocks: int) -> None:
        try:
            manifest = self._read_to_the_end(block_idx, num_blocks)
            if manifest is not None:
                _release(self._store, self._layout, block_idx, manifest)
        except StorageError as error:
            logger.warning("the activations of %s could not be given up: %s", block_stage(block_idx), error)

    def _read_to_the_end(self, block_idx: int, num_blocks: int) -> StageManifest | None:
        """Returns a block's manifest if all that read it were trained on these very activations, otherwise None."""
        readers = [reader for reader in self._plan.readers(block_idx) if reader.block_idx < num_blocks]
        last = max((reader.block_idx for reader in readers), default=block_idx)
        indices = range(block_idx, last + 1)
        chain = [read_manifest(self._store, self._layout.block_manifest(idx)) for idx in indices]
        if None in chain:
            return None
        checksums = [manifest.content_checksum for manifest in chain]
        # A commit says what its block was trained on: nobody has to read that again.
        is_read = all(
            chain[reader.block_idx - block_idx].input_checksum
            == chain_checksum(checksums[: reader.block_idx - block_idx])
            for reader in readers
        )
        return chain[0] if is_read else None


def check_readable(store: Store, layout: RunLayout, plan: Plan, block_idx: int) -> None:
    """Finds out before a block is trained whether its input was given up.

    Raises:
        ObjectMissing: names the blocks that have to be trained again first.
    """
    source = plan.blocks[block_idx].source_block
    stored = read_manifest(store, layout.block_manifest(source)) if source >= 0 else None
    if stored is None or not stored.is_released:
        return
    repeated = ", ".join(block_stage(idx) for idx in blocks_to_repeat(store, layout, plan, block_idx))
    raise ObjectMissing(
        f"{block_stage(block_idx)} has to be trained again, but the activations of {block_stage(source)} that "
        f"it reads were given up (storage.keep_activations)",
        store.uri,
        f"{repair_command(store, layout.run)}, which trains {repeated} again",
    )


def blocks_to_repeat(store: Store, layout: RunLayout, plan: Plan, block_idx: int) -> list[int]:
    """Lists the blocks that must be trained again before a block finds its input.

    That is its source if that was given up, then the source's own, and so on.

    Returns:
        Indices in order; empty if the input is there.
    """
    repeated: list[int] = []
    source = plan.blocks[block_idx].source_block
    while source >= 0:
        manifest = read_manifest(store, layout.block_manifest(source))
        if manifest is not None and not manifest.is_released:
            break
        repeated.insert(0, source)
        source = plan.blocks[source].source_block
    return repeated


def _release(store: Store, layout: RunLayout, block_idx: int, manifest: StageManifest) -> None:
    if manifest.named_shards:
        replace_manifest(store, layout.block_manifest(block_idx), manifest.without_shards())
    stored = [key for key, _ in store.list(layout.block(block_idx)) if layout.is_shard(key)]
    if stored:
        store.delete(stored)
        logger.info("%s: %d shards of activations were given up", block_stage(block_idx), len(stored))
