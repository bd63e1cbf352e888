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
from nf_pipeline.storage.layout import RunLayout
from nf_pipeline.storage.manifest import StageManifest, read_manifest, replace_manifest
from nf_pipeline.storage.sealed import repair_command
from nf_pipeline.storage.store import Store

logger = logging.getLogger(__name__)


class Retention:
    """The policy of one run at work.

    Args:
        store, layout: of the run.
        keep: "all", "last" or "none"; see `StorageConfig.keep_activations`.
        num_blocks: of the plan.
    """

    def __init__(self, store: Store, layout: RunLayout, keep: str, num_blocks: int) -> None:
        self._store = store
        self._layout = layout
        self._keep = keep
        self._num_blocks = num_blocks

    def block_done(self, block_idx: int) -> None:
        """Gives up what only this block, which is committed, had to read. What cannot be deleted is left to `gc`."""
        if block_idx - 1 in self._releasable(is_model_done=False):
            self._release(block_idx - 1)

    def run_done(self) -> None:
        """Gives up what the policy keeps no longer once the final model is committed."""
        for block_idx in self._releasable(is_model_done=True):
            self._release(block_idx)

    def find(self, *, is_model_done: bool) -> Iterator[tuple[int, StageManifest]]:
        """Yields the blocks that have activations to give up, with their manifests."""
        for block_idx in self._releasable(is_model_done=is_model_done):
            manifest = _read_to_the_end(self._store, self._layout, block_idx)
            if manifest is not None and manifest.named_shards:
                yield block_idx, manifest

    def _releasable(self, *, is_model_done: bool) -> range:
        """Returns the blocks whose activations are not kept once they have been read; the last block has none."""
        kept_at_end = 0 if self._keep == "none" and is_model_done else 1
        return range(0 if self._keep == "all" else max(0, self._num_blocks - 1 - kept_at_end))

    def _release(self, block_idx: int) -> None:
        try:
            manifest = _read_to_the_end(self._store, self._layout, block_idx)
            if manifest is not None:
                _release(self._store, self._layout, block_idx, manifest)
        except StorageError as error:
            logger.warning("the activations of %s could not be given up: %s", block_stage(block_idx), error)


def check_readable(store: Store, layout: RunLayout, block_idx: int) -> None:
    """Finds out before a block is trained whether its input was given up.

    Raises:
        ObjectMissing: names the blocks that have to be trained again first.
    """
    before = read_manifest(store, layout.block_manifest(block_idx - 1)) if block_idx > 0 else None
    if before is None or not before.is_released:
        return
    repeated = ", ".join(block_stage(idx) for idx in blocks_to_repeat(store, layout, block_idx))
    raise ObjectMissing(
        f"{block_stage(block_idx)} has to be trained again, but the activations of {block_stage(block_idx - 1)} that "
        f"it reads were given up (storage.keep_activations)",
        store.uri,
        f"{repair_command(store, layout.run)}, which trains {repeated} again",
    )


def blocks_to_repeat(store: Store, layout: RunLayout, block_idx: int) -> list[int]:
    """Lists the blocks that must be trained again before a block finds its input: those before it that were given up.

    Returns:
        Indices in order; empty if the input is there.
    """
    repeated: list[int] = []
    for before in reversed(range(block_idx)):
        manifest = read_manifest(store, layout.block_manifest(before))
        if manifest is not None and not manifest.is_released:
            break
        repeated.insert(0, before)
    return repeated


def _release(store: Store, layout: RunLayout, block_idx: int, manifest: StageManifest) -> None:
    if manifest.named_shards:
        replace_manifest(store, layout.block_manifest(block_idx), manifest.without_shards())
    stored = [key for key, _ in store.list(layout.block(block_idx)) if layout.is_shard(key)]
    if stored:
        store.delete(stored)
        logger.info("%s: %d shards of activations were given up", block_stage(block_idx), len(stored))


def _read_to_the_end(store: Store, layout: RunLayout, block_idx: int) -> StageManifest | None:
    """Returns a block's manifest if the next block was trained on these very activations, otherwise None."""
    manifest = read_manifest(store, layout.block_manifest(block_idx))
    reader = read_manifest(store, layout.block_manifest(block_idx + 1)) if manifest is not None else None
    # The commit says what its block was trained on: nobody has to read that again.
    is_read = reader is not None and reader.input_checksum == manifest.content_checksum
    return manifest if is_read else None
