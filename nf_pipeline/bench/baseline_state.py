"""The state of an unfinished baseline after an epoch: tensors and numbers in one folder, so that another process goes
on. Entry class: `BaselineState`.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from nf_pipeline.bench.stopwatch import Spent
from nf_pipeline.core.local_unit import LocalUnit
from nf_pipeline.core.tensor_file import read_tensors
from nf_pipeline.data.held_out import HeldOutLabels
from nf_pipeline.documents import parse_json, read_fields
from nf_pipeline.errors import StorageError
from nf_pipeline.storage.manifest import StageManifest
from nf_pipeline.storage.store import Store, open_store
from nf_pipeline.worker.checkpoint import pack_units, unpack_units
from nf_pipeline.worker.choice import Choice, commit_choice, read_test_labels


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What an unfinished baseline has done.

    Attributes:
        micro_batch: with which it began; 0 if it has not.
        epoch: finished ones.
        loss: mean of the last epoch.
        peak_bytes: largest measured.
        spent: in finished epochs.
        curve: (seconds, validation accuracy) after every epoch.
        epoch_s: seconds of every epoch, validation included.
        images_per_s: of every epoch, validation not included.
        val_correct: of the last epoch, per exit.
        sessions: processes that worked on it.
    """

    micro_batch: int = 0
    epoch: int = 0
    loss: float = 0.0
    peak_bytes: int = 0
    spent: Spent = field(default_factory=Spent)
    curve: tuple[tuple[float, float], ...] = ()
    epoch_s: tuple[float, ...] = ()
    images_per_s: tuple[float, ...] = ()
    val_correct: tuple[int, ...] = ()
    sessions: int = 0


@dataclass(frozen=True)
class BaselineState:
    """Files of one unfinished baseline.

    Attributes:
        folder: of its own.
    """

    folder: Path
    _store: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Opens the folder, which need not exist."""
        object.__setattr__(self, "_store", open_store(str(self.folder)))

    def save(
        self, progress: Progress, units: Sequence[LocalUnit], optimizers: Sequence[torch.optim.Optimizer]
    ) -> None:
        """Writes the tensors of an epoch, then the record that names them, then removes those before."""
        tensors = {**pack_units(units, 0), **_momentum(optimizers)}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        self._store.put(_tensors_key(progress.epoch), safetensors.torch.save(tensors))
        self._store.put("progress.json", json.dumps(asdict(progress)).encode())
        self._store.delete([_tensors_key(progress.epoch - 1)])

    def load(self) -> Progress:
        """Returns what is finished; the defaults if nothing is.

        Raises:
            StorageError: the record cannot be read.
        """
        if self._store.size("progress.json") is None:
            return Progress()
        try:
            return read_fields(Progress, parse_json(self._store.get("progress.json")))
        except ValueError as error:
            raise StorageError(f"progress.json: {error}", str(self.folder), "remove that folder") from None

    def restore(self, epoch: int, units: Sequence[LocalUnit], optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Fills in weights and momentum as they were after an epoch."""
        tensors = read_tensors(bytes(self._store.get(_tensors_key(epoch))), str(self.folder), "remove that folder")
        unpack_units(units, 0, tensors)
        for position, optimizer in enumerate(optimizers):
            for index, parameter in enumerate(optimizer.param_groups[0]["params"]):
                buffer = tensors.get(f"momentum.{position}.{index}")
                if buffer is not None:
                    optimizer.state[parameter]["momentum_buffer"] = buffer.to(parameter.device)

    def choose(self, images: Store, ingest: StageManifest, choice: Choice) -> HeldOutLabels:
        """Commits a choice here, which opens the labels of the test split.

        Args:
            images, ingest: where the images are, and their manifest.
        """
        made = commit_choice(self._store, "model", choice)
        return read_test_labels(images, ingest, self._store, made.key)

    def clear(self) -> None:
        """Begins anew."""
        self._store.delete([key for key, _ in self._store.list("")])


def _tensors_key(epoch: int) -> str:
    return f"epoch-{epoch:05d}.safetensors"


def _momentum(optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, torch.Tensor]:
    return {
        f"momentum.{position}.{index}": optimizer.state[parameter]["momentum_buffer"]
        for position, optimizer in enumerate(optimizers)
        for index, parameter in enumerate(optimizer.param_groups[0]["params"])
        if optimizer.state.get(parameter, {}).get("momentum_buffer") is not None
    }
