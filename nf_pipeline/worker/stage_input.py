"""What a stage reads: the run's store, and the committed output of the stage before."""

from nf_pipeline.config import RunConfig
from nf_pipeline.errors import ObjectMissing, StorageError
from nf_pipeline.host import worker_name
from nf_pipeline.storage.layout import RunLayout
from nf_pipeline.storage.manifest import StageManifest, read_manifest
from nf_pipeline.storage.store import Store, open_store


def open_run_store(config: RunConfig) -> tuple[Store, RunLayout]:
    """Opens the store as this worker sees it and checks that the run is there.

    Raises:
        StorageError: the driver's record of the run cannot be seen from here.
    """
    store, layout = open_store(config.storage.uri), RunLayout(config.run)
    if store.size(layout.run_json) is None:
        raise StorageError(
            f"worker {worker_name()} does not see {layout.run_json}, which the driver wrote",
            store.uri,
            "--store s3://bucket/prefix, or a folder that all machines share",
        )
    return store, layout


def read_ingest(store: Store, layout: RunLayout) -> StageManifest:
    """Returns the manifest of the ingested images.

    Raises:
        ObjectMissing: ingest has not been committed.
    """
    return _read(store, layout.ingest_manifest)


def read_round(store: Store, layout: RunLayout, block_idx: int, round_idx: int, num_rounds: int) -> StageManifest:
    """Returns the manifest of a finished round of a block.

    Raises:
        ObjectMissing: the round has not been committed.
    """
    return _read(store, layout.round_manifest(block_idx, round_idx, num_rounds))


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


def _read(store: Store, key: str) -> StageManifest:
    manifest = read_manifest(store, key)
    if manifest is None:
        raise ObjectMissing(f"{key} is not there", store.uri, "resume the run: it makes what is missing")
    return manifest
