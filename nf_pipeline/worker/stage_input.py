"""What a block reads: the committed output of the stage before it."""

from nf_pipeline.errors import ObjectMissing
from nf_pipeline.storage.layout import RunLayout
from nf_pipeline.storage.manifest import StageManifest, read_manifest
from nf_pipeline.storage.store import Store


def read_ingest(store: Store, layout: RunLayout) -> StageManifest:
    """Returns the manifest of the ingested images.

    Raises:
        ObjectMissing: ingest has not been committed.
    """
    return _read(store, layout.ingest_manifest)


def read_block(store: Store, layout: RunLayout, block_idx: int) -> StageManifest:
    """Returns the manifest of a finished block.

    Raises:
        ObjectMissing: the block has not been committed.
    """
    return _read(store, layout.block_manifest(block_idx))


def read_model(store: Store, layout: RunLayout) -> StageManifest:
    """Returns the manifest of the final model.

    Raises:
        ObjectMissing: it has not been committed.
    """
    return _read(store, layout.model_manifest)


def read_input(store: Store, layout: RunLayout, block_idx: int) -> StageManifest:
    """Returns the manifest that a block trains from: ingest for the first, the block before it otherwise."""
    return read_ingest(store, layout) if block_idx == 0 else read_block(store, layout, block_idx - 1)


def _read(store: Store, key: str) -> StageManifest:
    manifest = read_manifest(store, key)
    if manifest is None:
        raise ObjectMissing(f"{key} is not there", store.uri, "resume the run: it makes what is missing")
    return manifest
