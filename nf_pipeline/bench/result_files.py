"""The files of a benchmark: settings, one document per finished cell, and the states of unfinished ones.

    OUTPUT/settings.json  cells/NAME.json  results.json  results.md  *.svg      of no machine's paths
    WORK/NAME/...                     what an unfinished cell has so far
    WORK/images-seed0-.../bench/...   the ingested images that all cells of a seed read

Whole documents, replaced atomically. Entry class: `ResultFiles`.
"""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nf_pipeline.bench.cells import Cell
from nf_pipeline.bench.settings import BenchSettings
from nf_pipeline.documents import parse_json
from nf_pipeline.errors import ConfigError, StorageError
from nf_pipeline.storage.store import open_store


class ResultFiles:
    """Where a benchmark keeps what.

    Args:
        output: folder of the results.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self._store = open_store(str(output))

    def open(self, settings: BenchSettings, device: str) -> None:
        """Stores the settings, or checks that the results that are there were made with the same.

        Raises:
            ConfigError: they were not.
        """
        wanted = json.loads(json.dumps({"device_name": device, **settings.fixed()}))
        before = json.loads(json.dumps(BenchSettings().fixed()))  # of results that are older than some settings
        found = {**before, **(self._read("settings.json") or wanted)}
        differing = [name for name, value in wanted.items() if found.get(name) != value]
        if differing and self.has_cells():
            name = differing[0]
            raise ConfigError(
                f"{self.output} holds results with {name} {found.get(name)!r}, not {wanted[name]!r}",
                "another --output, or remove that folder",
            )
        self.write_text("settings.json", _json(wanted))

    def has_cells(self) -> bool:
        """Whether any cell is finished."""
        return bool(self._store.list("cells"))

    def finished(self, cell: Cell) -> dict[str, Any] | None:
        """Returns a cell's document; None while it is unfinished."""
        return self._read(f"cells/{cell.name}.json")

    def all_finished(self) -> list[dict[str, Any]]:
        """Returns the documents of all finished cells, by name."""
        documents = [self._read(key) for key, _ in self._store.list("cells") if key.endswith(".json")]
        return [document for document in documents if document is not None]

    def finish(self, cell: Cell, result: dict[str, Any], work: Path) -> None:
        """Stores a cell's result and removes what it needed while unfinished."""
        self.write_text(f"cells/{cell.name}.json", _json({"cell": asdict(cell), **result}))
        shutil.rmtree(work / cell.name, ignore_errors=True)

    def write_text(self, name: str, text: str) -> None:
        """Writes one file of the results."""
        self._store.put(name, text.encode())

    def _read(self, key: str) -> dict[str, Any] | None:
        if self._store.size(key) is None:
            return None
        try:
            document = parse_json(self._store.get(key))
        except ValueError as error:
            raise StorageError(f"{key} is no JSON: {error}", str(self.output), "remove it") from None
        return document if isinstance(document, dict) else None


def _json(document: dict[str, Any]) -> str:
    return json.dumps(document, indent=1) + "\n"
