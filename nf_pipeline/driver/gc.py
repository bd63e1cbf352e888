"""Deletes what finished stages no longer need: lost attempts, and checkpoints of blocks that are done.

Only objects of attempts are deleted, only of stages that are committed, and only those that no manifest of the
run names: whatever can still be resumed stays. Once every stage is committed, files that a killed writer left
half-written (see `storage.local`) go as well. Nothing outside the run's own prefix is looked at.
Entry: `collect_garbage`.
"""

import re
from collections.abc import Iterator
from typing import Any

from nf_pipeline.driver.run_record import load_plan
from nf_pipeline.driver.stages import block_stage, commit_key, stage_names
from nf_pipeline.errors import ObjectMissing
from nf_pipeline.run_uri import split_run_uri
from nf_pipeline.storage.layout import RunLayout
from nf_pipeline.storage.manifest import StageManifest, read_manifest
from nf_pipeline.storage.store import Store, open_store

# As storage.local names what it writes beside the target.
_HALF_WRITTEN = re.compile(r"(?:.*/)?\.[^/]+\.[0-9a-f]{8}\.part")


def collect_garbage(uri: str, *, dry_run: bool) -> list[tuple[str, int]]:
    """Deletes the objects of attempts that no manifest names, and half-written files of a run that is done.

    Safe beside a running driver: a stage without a manifest is left alone, an attempt at a committed stage has
    lost already, and half-written files are looked at only when the last stage is committed.

    Args:
        uri: STORE/NAME.
        dry_run: only list them.

    Returns:
        Key and bytes of every object that was, or would be, deleted, sorted by key.

    Raises:
        ObjectMissing: there is no such run.
        ObjectCorrupt: a manifest or the plan cannot be read; nothing is deleted then.
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
    for key, _ in objects:  # rounds of a finished block that the next block has yet to read
        manifest = read_manifest(store, key) if layout.round_of(key) is not None else None
        named |= _named_keys(manifest) if manifest is not None else set()
    found = {key for key, _ in objects if key.startswith(tuple(committed)) and key not in named}
    found |= _half_written(store, layout, {key for key, _ in objects})
    return [(key, size) for key, size in objects if key in found]


def _half_written(store: Store, layout: RunLayout, keys: set[str]) -> set[str]:
    # Their age cannot be told from a listing, so they stay as long as the run may still have writers.
    found = {key for key in keys if _HALF_WRITTEN.fullmatch(key)}
    if not found or layout.plan_json not in keys:
        return set()
    stages = stage_names(load_plan(store, layout))
    return found if all(commit_key(layout, stage) in keys for stage in stages) else set()


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
