"""A small finished run, copies of it, and ways to damage them. Keys are relative to the run's folder."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from driver_config import DIGITS

from nf_pipeline.config import RunConfig, resolve_config
from nf_pipeline.driver.run import train
from nf_pipeline.storage.sealed import seal, unseal

SMALL = {**DIGITS, "data.max_train_images": 150, "storage.shard_bytes": "64KiB"}


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run in a folder of its own.

    Attributes:
        store: folder of the store.
        summary: as `train` returned it; empty if the run was stopped.
    """

    store: Path
    summary: dict[str, Any]

    @property
    def uri(self) -> str:
        """STORE/NAME."""
        return f"{self.store}/run"

    @property
    def folder(self) -> Path:
        """Where its objects are."""
        return self.store / "run"

    def copy(self, store: Path) -> "Run":
        """Returns the same run somewhere else."""
        shutil.copytree(self.store, store)
        return Run(store=store, summary=self.summary)

    def path(self, pattern: str) -> Path:
        """Returns the first file that a pattern names."""
        return sorted(self.folder.glob(pattern))[0]

    def key(self, pattern: str) -> str:
        """Returns that file's key in the store."""
        return self.path(pattern).relative_to(self.store).as_posix()

    def files(self) -> dict[str, bytes]:
        """Reads every object."""
        paths = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return {path.relative_to(self.store).as_posix(): path.read_bytes() for path in paths}


def config_of(store: Path, **changes: Any) -> RunConfig:
    """Returns the small configuration with changes such as `train__seed=1`."""
    changed = {key.replace("__", "."): value for key, value in changes.items()}
    return resolve_config(flags={**SMALL, "storage.uri": str(store), **changed})


def finish(store: Path, **changes: Any) -> Run:
    """Trains a run to its end."""
    return Run(store=store, summary=train(config_of(store, **changes)))


def flip_bit(path: Path, bit: int = -1) -> None:
    """Flips one bit, counted from the file's first; by default the last one of the middle byte."""
    data = bytearray(path.read_bytes())
    position = 8 * (len(data) // 2) if bit < 0 else bit
    data[position // 8] ^= 1 << position % 8
    path.write_bytes(data)


def truncate(path: Path) -> None:
    """Cuts the last byte off."""
    path.write_bytes(path.read_bytes()[:-1])


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes a sealed document as its writer would have: its checksum fits."""
    document = unseal(path.read_bytes())
    change(document)
    path.write_bytes(seal(document))
