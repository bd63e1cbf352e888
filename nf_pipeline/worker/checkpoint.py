"""A block's epoch checkpoint: weights and momentum as safetensors, named by a small JSON record.

The record is written after the tensors and carries their checksum; it is deleted before them, so that it never
names what is gone. One that is damaged is an error: trained epochs are not given up in silence. A later attempt at
the same block adopts the newest one of any attempt. No random state is stored: every epoch seeds its own generators
from (seed, block, epoch).
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict, replace

import safetensors.torch
import torch
from torch import nn

from nf_pipeline.core.tensor_file import read_tensors
from nf_pipeline.errors import ConfigError, ObjectCorrupt, ObjectMissing, StorageError
from nf_pipeline.storage.layout import RunLayout
from nf_pipeline.storage.manifest import ObjectInfo, checksum_of
from nf_pipeline.storage.sealed import repair_command, seal
from nf_pipeline.storage.store import Store
from nf_pipeline.worker.checkpoint_record import CheckpointRecord, read_record
from nf_pipeline.worker.stage_input import read_round
from nf_pipeline.worker.tasks import BlockTask, num_rounds

logger = logging.getLogger(__name__)

RESTORE_TRIES = 3


def pack_units(units: Sequence[nn.Module], first_unit: int) -> dict[str, torch.Tensor]:
    """Names every weight and buffer "<unit_idx>.<name in the unit>"."""
    return {
        f"{first_unit + offset}.{name}": tensor
        for offset, unit in enumerate(units)
        for name, tensor in unit.state_dict().items()
    }


def unpack_units(units: Sequence[nn.Module], first_unit: int, tensors: dict[str, torch.Tensor]) -> None:
    """Loads what `pack_units` named; every weight must be there and none besides.

    Raises:
        ConfigError: the units are not those whose weights were stored: a user's factory has changed.
    """
    for offset, unit in enumerate(units):
        prefix = f"{first_unit + offset}."
        state = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        try:
            unit.load_state_dict(state, strict=True)
        except RuntimeError as error:
            raise ConfigError(
                f"unit {first_unit + offset} no longer has the weights that were trained: {error}",
                "use the model factory as it was when the run began",
            ) from None


def save_tensors(
    store: Store, key: str, units: Sequence[nn.Module], optimizers: Sequence[torch.optim.Optimizer]
) -> ObjectInfo:
    """Writes weights, buffers and momentum; they are no checkpoint before `save_record` has named them."""
    data = safetensors.torch.save(pack_units(units, 0) | _pack_momentum(optimizers))
    store.put(key, data)
    return ObjectInfo(key=key, num_bytes=len(data), checksum=checksum_of(data))


def save_record(
    store: Store, layout: RunLayout, prefix: str, record: CheckpointRecord, tensors: ObjectInfo
) -> CheckpointRecord:
    """Makes stored tensors the attempt's checkpoint, then removes those of the epoch before.

    Args:
        prefix: the attempt's folder.
        record: of the epoch, with `key` and `checksum` still those of the one before.
        tensors: as `save_tensors` returned.

    Returns:
        The record as stored.
    """
    stored = replace(record, key=tensors.key, checksum=tensors.checksum)
    store.put(layout.checkpoint_record(prefix), seal({"record": asdict(stored)}))
    if record.key.startswith(f"{prefix}/"):
        delete_quietly(store, [record.key])
    return stored


def delete_quietly(store: Store, keys: list[str]) -> None:
    """Removes what is no longer needed; what cannot be removed is left to `gc`, not an error of the training."""
    try:
        store.delete(keys)
    except StorageError as error:
        logger.warning("could not delete %s: %s", ", ".join(keys), error)


def find_checkpoint(
    store: Store, layout: RunLayout, block_idx: int, fingerprint: str, batch_size: int
) -> CheckpointRecord | None:
    """Returns the record with the most epochs among all attempts at a block, None if there is none.

    Momentum and schedule belong to a batch size: records of another one do not count.

    Raises:
        ObjectCorrupt: a record is damaged.
    """
    newest = None
    for key, _ in store.list(layout.block(block_idx)):
        if key != layout.checkpoint_record(key.rpartition("/")[0]):
            continue
        record = read_record(store, key)
        if record is None:  # its attempt has committed since the listing
            continue
        newer = newest is None or record.epoch > newest.epoch
        same_work = (record.fingerprint, record.batch_size) == (fingerprint, batch_size)
        if newer and same_work and _has_tensors(store, record):
            newest = record
    return newest


def _has_tensors(store: Store, record: CheckpointRecord) -> bool:
    if store.size(record.key) is not None:
        return True
    logger.warning("checkpoint %s is missing: its epochs are trained again", record.key)
    return False


def restore(
    store: Store,
    layout: RunLayout,
    task: BlockTask,
    fingerprint: str | None,
    units: Sequence[nn.Module],
    optimizers: Sequence[torch.optim.Optimizer],
) -> CheckpointRecord:
    """Fills in the newest state: of this round, else of the end of the round before, else none.

    Args:
        fingerprint: of the round; None while its input is not complete, when it can have no checkpoint.

    Returns:
        The record of the state; the next epoch to train is its `epoch`.

    Raises:
        ObjectCorrupt: the tensors are not those that the record names.
        ObjectMissing: the state of the round before is gone.
    """
    for tries_left in reversed(range(RESTORE_TRIES)):
        record = None
        if fingerprint is not None:
            record = find_checkpoint(store, layout, task.block_idx, fingerprint, task.batch_size)
        if record is None and task.round_idx > 0:
            before = read_round(store, layout, task.block_idx, task.round_idx - 1, num_rounds(task.config))
            state = before.weights
            record = CheckpointRecord(**{**before.facts["checkpoint"], "key": state.key, "checksum": state.checksum})
        if record is None:
            break
        try:
            load_checkpoint(store, record, units, optimizers)
        except ObjectMissing:
            if task.round_idx > 0 and not tries_left:
                raise  # what the rounds before have learned must not be lost in silence
            continue  # an attempt that was given up for lost goes on and has moved to its next epoch
        return record
    return CheckpointRecord(fingerprint=fingerprint or "", batch_size=task.batch_size)


def load_checkpoint(
    store: Store,
    record: CheckpointRecord,
    units: Sequence[nn.Module],
    optimizers: Sequence[torch.optim.Optimizer],
) -> None:
    """Restores weights, buffers and momentum.

    Raises:
        ObjectCorrupt: the tensors are not those that the record names.
    """
    data = bytes(store.get(record.key))
    if checksum_of(data) != record.checksum:
        raise ObjectCorrupt(
            f"checkpoint {record.key} has checksum {checksum_of(data)}, its record says {record.checksum}",
            store.uri,
            f"{repair_command(store, record.key)}, which goes on from an older checkpoint or from the start",
        )
    tensors = read_tensors(data, f"{store.uri}/{record.key}", repair_command(store, record.key))
    unpack_units(units, 0, {k: t for k, t in tensors.items() if not k.startswith("momentum.")})
    _unpack_momentum(optimizers, tensors)


def _pack_momentum(optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, torch.Tensor]:
    return {
        f"momentum.{unit}.{position}": buffer
        for unit, optimizer in enumerate(optimizers)
        for position, parameter in enumerate(optimizer.param_groups[0]["params"])
        if (buffer := optimizer.state[parameter].get("momentum_buffer")) is not None
    }


def _unpack_momentum(optimizers: Sequence[torch.optim.Optimizer], tensors: dict[str, torch.Tensor]) -> None:
    for unit, optimizer in enumerate(optimizers):
        for position, parameter in enumerate(optimizer.param_groups[0]["params"]):
            buffer = tensors.get(f"momentum.{unit}.{position}")
            if buffer is not None:
                # Laid out like its parameter, so that a fused step computes in the same order as before.
                optimizer.state[parameter]["momentum_buffer"] = torch.empty_like(parameter).copy_(buffer)
