"""Deletes what a run needs no longer: lost attempts, old checkpoints, what killed writers left, released activations.

While it deletes it holds the run like a driver does, so that nobody begins in between; beside a running driver it
deletes only what is provably dead. What is garbage `driver.garbage` decides. Of other runs nothing is looked at, of
the store itself only what a writer left at its root that was killed hours ago. Entry: `collect_garbage`.
"""

import contextlib
from collections.abc import Callable
from dataclasses import replace

from nf_pipeline.driver.garbage import Garbage, Inventory, find_garbage
from nf_pipeline.driver.retention import Retention
from nf_pipeline.driver.run_lock import RunLock, await_free, hold_run
from nf_pipeline.driver.run_record import load_plan
from nf_pipeline.errors import ObjectCorrupt, ObjectMissing, RunLocked
from nf_pipeline.run_uri import split_run_uri
from nf_pipeline.storage.layout import RunLayout
from nf_pipeline.storage.leftovers import Leftover
from nf_pipeline.storage.manifest import StageManifest, read_manifest, replace_manifest
from nf_pipeline.storage.store import Store, open_store
from nf_pipeline.worker.checkpoint_record import CheckpointRecord, read_record

OLD_S = 3600.0
"""A single write that began so long ago is dead, whoever works on the run: none may take longer than minutes."""


def collect_garbage(uri: str, *, dry_run: bool, keep: str | None = None) -> list[Garbage]:
    """Deletes what nobody needs any more.

    Args:
        uri: STORE/NAME.
        dry_run: only list it.
        keep: policy to apply to the activations of finished blocks first, "all", "last" or "none"; None leaves them.

    Returns:
        What was, or would be, deleted.

    Raises:
        ObjectMissing: there is no such run.
        ObjectCorrupt: a manifest or the plan cannot be read; nothing is deleted then.
        RunLocked: `keep` was given, and a driver works on the run.
    """
    store_uri, run = split_run_uri(uri)
    store, layout = open_store(store_uri), RunLayout(run)
    if not store.list(run):
        raise ObjectMissing(f"there is no run {run!r}", store.uri, "check STORE/NAME")
    with contextlib.ExitStack() as stack:
        lock = None if dry_run else _hold(stack, store, layout, may_fail=keep is None)
        is_idle = _is_idle(store, layout) if dry_run else lock is not None
        if keep is not None and not is_idle:
            raise RunLocked(f"a driver works on run {run!r}", "wait for it, or stop it")
        confirm = lock.check if lock is not None else _nothing
        return clear_run(store, layout, is_idle=is_idle, dry_run=dry_run, keep=keep, confirm=confirm)


def _nothing() -> None:
    pass


def clear_run(
    store: Store,
    layout: RunLayout,
    *,
    is_idle: bool,
    dry_run: bool,
    keep: str | None = None,
    confirm: Callable[[], None] = _nothing,
) -> list[Garbage]:
    """Deletes what nobody needs any more, for whoever holds the run.

    Args:
        store, layout: of the run.
        is_idle: whether the caller holds the run, so that nobody else works on it.
        dry_run, keep: see `collect_garbage`; a policy is applied by the holder only.
        confirm: called before anything is deleted; raises if the caller does not hold the run any more.
    """
    stored = _take_inventory(store, layout)
    released = _find_released(store, stored, keep) if keep is not None else {}
    garbage = find_garbage(replace(stored, manifests={**stored.manifests, **released}), is_idle=is_idle)
    leftovers = store.leftovers(layout.run, min_age_s=0.0 if is_idle else OLD_S)
    if not dry_run:
        confirm()
        if not _commits(store, layout) <= stored.manifests.keys():
            # A worker that its driver had given up for lost, or that outlived it, has committed in between.
            return clear_run(store, layout, is_idle=is_idle, dry_run=False, keep=keep, confirm=confirm)
        for key, manifest in released.items():
            replace_manifest(store, key, manifest)
        _delete(store, garbage)
        store.discard(leftovers)
    return garbage + [_described(leftover) for leftover in leftovers]


def _hold(stack: contextlib.ExitStack, store: Store, layout: RunLayout, *, may_fail: bool) -> RunLock | None:
    try:
        return stack.enter_context(hold_run(store, layout))
    except RunLocked:
        if not may_fail:
            raise
        return None


def _commits(store: Store, layout: RunLayout) -> set[str]:
    prefixes = (f"{layout.blocks}/", layout.ingest_manifest, layout.model_manifest)
    listed = (key for key, _ in store.list(layout.run) if key.endswith("/manifest.json"))
    return {key for key in listed if key.startswith(prefixes)}


def _is_idle(store: Store, layout: RunLayout) -> bool:
    """Watches whether a driver lives, as whoever wants the run would, but takes nothing."""
    try:
        await_free(store, layout)
    except RunLocked:
        return False
    return True


def _take_inventory(store: Store, layout: RunLayout) -> Inventory:
    objects = dict(store.list(layout.run))
    stored = Inventory(layout=layout, sizes=objects, manifests={})
    keys = [layout.ingest_manifest, layout.model_manifest, *map(layout.block_manifest, range(stored.num_blocks))]
    keys += [key for key in objects if layout.round_of(key) is not None]
    manifests = {key: read_manifest(store, key) for key in keys if key in objects}
    records = [key for key in objects if key == layout.checkpoint_record(key.rpartition("/")[0])]
    return Inventory(
        layout=layout,
        sizes=objects,
        manifests={key: manifest for key, manifest in manifests.items() if manifest is not None},
        checkpoints={key: _read_record(store, key) for key in records},
    )


def _read_record(store: Store, key: str) -> CheckpointRecord | None:
    try:
        return read_record(store, key)
    except ObjectCorrupt:
        return None


def _find_released(store: Store, stored: Inventory, keep: str) -> dict[str, StageManifest]:
    layout = stored.layout
    if not stored.num_blocks:
        return {}
    plan, is_done = load_plan(store, layout), stored.is_committed("model")
    # A run that ended early has fewer than planned: the others need nothing any more.
    num_blocks = stored.num_trained if is_done else len(plan.blocks)
    found = Retention(store, layout, keep, plan).find(num_blocks, is_model_done=is_done)
    return {layout.block_manifest(block_idx): manifest.without_shards() for block_idx, manifest in found}


def _delete(store: Store, garbage: list[Garbage]) -> None:
    is_document = {item.key: item.key.endswith(".json") for item in garbage}
    store.delete([key for key in is_document if is_document[key]])  # first: none may name what is gone
    store.delete([key for key in is_document if not is_document[key]])


def _described(leftover: Leftover) -> Garbage:
    return Garbage(key=leftover.key, num_bytes=leftover.num_bytes, kind=leftover.kind)
