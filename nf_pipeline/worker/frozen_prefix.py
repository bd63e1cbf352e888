"""Loads the trained blocks that stand between a block and the stored activations it starts from.

Only their layers go to the device. Entry: `load_prefix`.
"""

from collections.abc import Sequence

import torch

from nf_pipeline.core.frozen import FrozenUnits
from nf_pipeline.core.local_unit import LocalUnit
from nf_pipeline.core.tensor_file import read_tensors
from nf_pipeline.errors import ObjectCorrupt
from nf_pipeline.storage.manifest import StageManifest, read_object
from nf_pipeline.storage.sealed import repair_command
from nf_pipeline.storage.store import Store
from nf_pipeline.worker.checkpoint import unpack_units
from nf_pipeline.worker.tasks import BlockTask


def load_prefix(
    store: Store,
    task: BlockTask,
    manifests: Sequence[StageManifest],
    units: Sequence[LocalUnit],
    device: torch.device,
) -> FrozenUnits | None:
    """Fills in the weights of the blocks that a block runs again, as their commits name them.

    Args:
        store: of the run.
        task: of the block that is trained.
        manifests: commits of the blocks `task.block.recomputed`, in order.
        units: all units of these blocks, on the CPU; their layers are taken over.
        device: on which the block trains.

    Returns:
        The layers on the device; None if nothing is computed again.

    Raises:
        ObjectMissing, ObjectCorrupt: a block's weights are not those that its commit names.
        ConfigError: the units are not those whose weights were stored: a user's factory has changed.
    """
    if not manifests:
        return None
    blocks = [task.plan.blocks[block_idx] for block_idx in task.block.recomputed]
    first_unit = blocks[0].units[0]
    for block, manifest in zip(blocks, manifests, strict=True):
        first, stop = block.units
        tensors = _read_weights(store, manifest)
        unpack_units(units[first - first_unit : stop - first_unit], first, tensors)
    return FrozenUnits(units, task.config.train.precision).to(device)


def _read_weights(store: Store, manifest: StageManifest) -> dict[str, torch.Tensor]:
    if manifest.weights is None:
        raise ObjectCorrupt(f"{manifest.stage}: its manifest names no weights", store.uri)
    key = manifest.weights.key
    return read_tensors(read_object(store, manifest.weights), f"{store.uri}/{key}", repair_command(store, key))
