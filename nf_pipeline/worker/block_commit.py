"""What a trained round leaves behind: one manifest, written last, by the worker that speaks for its gang."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import safetensors.torch

from nf_pipeline.core.local_unit import LocalUnit
from nf_pipeline.core.metrics import results_kind
from nf_pipeline.documents import parse_json
from nf_pipeline.errors import ObjectCorrupt
from nf_pipeline.host import worker_name
from nf_pipeline.storage.layout import RunLayout
from nf_pipeline.storage.manifest import ObjectInfo, StageManifest, check_stored, checksum_of, commit_manifest
from nf_pipeline.storage.sealed import repair_fix
from nf_pipeline.storage.shards import ShardInfo, TensorSpec, read_shard_info
from nf_pipeline.storage.store import Store
from nf_pipeline.worker.checkpoint import CheckpointRecord, delete_quietly, pack_units
from nf_pipeline.worker.data_parallel import Replicas
from nf_pipeline.worker.tasks import BlockTask, block_fingerprint, num_rounds

Shards = dict[str, list[ShardInfo]]


@dataclass(frozen=True, kw_only=True)
class Made:
    """What a round stored for the blocks that read it.

    Attributes:
        spec: of the tensors; None where nothing is stored.
        shards: split -> shards of all members, in stored order.
    """

    spec: TensorSpec | None
    shards: Shards


def merge_parts(store: Store, layout: RunLayout, task: BlockTask, shards: Shards, replicas: Replicas) -> Shards:
    """Collects what all members of the gang wrote; rank 0 returns everything, the others what is theirs."""
    prefix = layout.block_attempt(task.block_idx, task.attempt)
    if task.gang.rank > 0:
        own = {split: [asdict(shard) for shard in infos] for split, infos in shards.items()}
        store.put(layout.part_record(prefix, task.gang.rank), json.dumps(own).encode())
    replicas.barrier()
    if task.gang.rank > 0:
        return shards
    records = [layout.part_record(prefix, rank) for rank in range(1, task.gang.size)]
    for record in records:
        for split, infos in _read_part(store, record).items():
            shards[split] += infos
    delete_quietly(store, records)
    return shards


def _read_part(store: Store, record: str) -> Shards:
    try:
        document = parse_json(store.get(record))
        return {split: [read_shard_info(info) for info in infos] for split, infos in document.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ObjectCorrupt(f"{record} is no record of shards: {error}", store.uri, "resume the run") from None


def commit_block(
    store: Store,
    layout: RunLayout,
    task: BlockTask,
    units: Sequence[LocalUnit],
    record: CheckpointRecord,
    input_checksum: str,
    made: Made,
) -> dict[str, Any]:
    """Stores the manifest of a round, and the block's weights with that of the last one.

    Before the last round the state after its last epoch takes the place of the weights: the next round goes on
    from it.

    Returns:
        The block's entry of summary.json, and `num_val` and what its exits found on so many samples, see
        `Results.total_fact`. The manifest alone has what they found on each one.

    Raises:
        AlreadyExists: another attempt committed first.
        WorkerLost: this attempt's objects are no longer there.
    """
    result = {**_result(task, record, made.shards), **_validated(store, task, record)}
    facts = {**result, results_kind(task.plan.target).sample_fact: record.val_results}
    manifest = StageManifest(
        stage=task.stage,
        fingerprint=block_fingerprint(task.config, task.plan, task.block_idx, task.round_idx, input_checksum),
        input_checksum=input_checksum,
        attempt=task.attempt,
        spec=made.spec,
        shards={split: tuple(infos) for split, infos in made.shards.items()},
        weights=_store_weights(store, layout, task, units) if task.is_last_round else _state(store, record),
        facts=facts if task.is_last_round else {**facts, "checkpoint": asdict(replace(record, val_results=[]))},
    )
    rounds = num_rounds(task.config)
    check_stored(store, manifest)
    commit_manifest(store, layout.round_manifest(task.block_idx, task.round_idx, rounds), manifest)
    publications = [layout.publication(task.block_idx, task.round_idx, part) for part in range(task.gang.size)]
    checkpoint = [layout.checkpoint_record(record.key.rpartition("/")[0]), record.key]
    delete_quietly(store, [*publications, *(checkpoint if task.is_last_round else [])])
    return result


def _store_weights(store: Store, layout: RunLayout, task: BlockTask, units: Sequence[LocalUnit]) -> ObjectInfo:
    weights = safetensors.torch.save(pack_units(units, task.block.units[0]))
    key = layout.weights(task.block_idx, task.attempt)
    store.put(key, weights)
    return ObjectInfo(key=key, num_bytes=len(weights), checksum=checksum_of(weights))


def _state(store: Store, record: CheckpointRecord) -> ObjectInfo:
    return ObjectInfo(key=record.key, num_bytes=store.size(record.key) or 0, checksum=record.checksum)


def _validated(store: Store, task: BlockTask, record: CheckpointRecord) -> dict[str, Any]:
    kind = results_kind(task.plan.target)
    try:
        results = [kind.from_text(text, record.num_val) for text in record.val_results]
    except ValueError as error:
        what = f"checkpoint {record.key} is damaged: val_results: {error}"
        raise ObjectCorrupt(what, store.uri, repair_fix(store, record.key)) from None
    return {kind.total_fact: [one.total for one in results], "num_val": record.num_val}


def _result(task: BlockTask, record: CheckpointRecord, shards: Shards) -> dict[str, Any]:
    block = task.block
    return {
        "block_idx": block.block_idx,
        "layers": list(block.layers),
        "source_block": block.source_block,
        "batch_size": task.batch_size,
        "budget_bytes": block.budget_bytes,
        "predicted_peak_bytes": block.predicted_peak_bytes,
        "measured_peak_bytes": record.peak_bytes,
        "train_s": round(record.train_s, 3),
        "loader_wait_s": round(record.loader_wait_s, 3),
        "write_s": round(record.write_s, 3),
        "shard_bytes": sum(shard.num_bytes for infos in shards.values() for shard in infos),
        "num_shards": sum(len(infos) for infos in shards.values()),
        "attempts": task.num_attempts,
        "worker": worker_name(),
    }
