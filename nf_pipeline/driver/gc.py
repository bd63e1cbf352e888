"""Deletes what finished stages no longer need: lost attempts, and checkpoints of blocks that are done.

Only objects of attempts are ever deleted, only of stages that are committed, and only those that no manifest
of the run names: whatever can still be resumed stays. Entry: `collect_garbage`.
"""

from collections.abc import Iterator
from typing import Any

from nf_pipeline.driver.stages import block_stage, commit_key
from nf_pipeline.errors import ObjectMissing
from nf_pipeline.run_uri import split_run_uri
from nf_pipeline.storage.layout import RunLayout
from nf_pipeline.storage.manifest import StageManifest, read_manifest
from nf_pipeline.storage.store import Store, open_store


def collect_garbage(uri: str, *, dry_run: bool) -> list[tuple[str, int]]:
    """Deletes the objects of attempts that no manifest names.

    Safe beside a running driver: a stage without a manifest is left alone, and an attempt at a committed
    stage has lost already.

    Args:
        uri: STORE/NAME.
        dry_run: only list them.

    Returns:
        Key and bytes of every object that was, or would be, deleted, sorted by key.

    Raises:
        ObjectMissing: there is no such run.
        ObjectCorrupt: a manifest cannot be read; nothing is deleted then.
    """
    store_uri, run = split_run_uri(uri)
    store, layout = open_store(store_uri), RunLayout(run)
    objects = store.list(run)
    if not objects:
        raise ObjectMissing(f"there is no run {run!r}", store.uri, "check STORE/NAME")
    garbage = _find_garbage(store, layout, objects)
    if not dry_run:
        store.delete([key for key, _ in garbage])
    return garbage


def _find_garbage(store: Store, layout: RunLayout, objects: list[tuple[str, int]]) -> list[tuple[str, int]]:
    committed: list[str] = []
    named: set[str] = set()
    for stage in _stages_with_objects(layout, objects):
        manifest = read_manifest(store, commit_key(layout, stage))
        if manifest is not None:
            committed.append(layout.attempt_prefix(stage, ""))
            named |= _named_keys(manifest)
    return [(key, size) for key, size in objects if key.startswith(tuple(committed)) and key not in named]


def _stages_with_objects(layout: RunLayout, objects: list[tuple[str, int]]) -> Iterator[str]:
    yield "ingest"
    yield "model"
    block_idx = 0
    while any(key.startswith(f"{layout.block(block_idx)}/") for key, _ in objects):
        yield block_stage(block_idx)
        block_idx += 1


def _named_keys(manifest: StageManifest) -> set[str]:
    """Collects every text in a manifest: a key counts as named wherever it stands, its facts included."""
    return set(_texts(manifest.to_json()))


def _texts(document: Any) -> Iterator[str]:
    if isinstance(document, str):
        yield document
    elif isinstance(document, dict):
        for value in document.values():
            yield from _texts(value)
    elif isinstance(document, list):
        for value in document:
            yield from _texts(value)
