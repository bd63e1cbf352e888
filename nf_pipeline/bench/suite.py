"""Runs the cells of a benchmark, each in a process of its own, skips those that are finished, and writes the results.

Entry: `run_suite`.
"""

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nf_pipeline.bench.cells import Cell, CellRequest, training_cells
from nf_pipeline.bench.deadline import Deadline
from nf_pipeline.bench.lr_search import search_group
from nf_pipeline.bench.machine import describe_machine
from nf_pipeline.bench.methods import DEFAULT_METHODS, REFERENCE, method_named
from nf_pipeline.bench.result_files import ResultFiles
from nf_pipeline.bench.results import make_document, reference_for
from nf_pipeline.bench.run_config import config_for
from nf_pipeline.bench.settings import BenchSettings
from nf_pipeline.bench.tables import render_results
from nf_pipeline.errors import EXIT_CONFIG, EXIT_INTERRUPTED, BlockError, ConfigError

logger = logging.getLogger(__name__)

LONGEST_CELL_S = 24 * 3600.0
_SHORTEST_S = 20.0  # starting a process, loading torch and reading a plan takes as long on a busy machine
_CLOSING_S = 5.0

Tell = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a call did.

    Attributes:
        document: all results so far.
        table: the same as Markdown.
        num_missing: cells that are still to be measured.
    """

    document: dict[str, Any]
    table: str
    num_missing: int


def run_suite(
    settings: BenchSettings, output: Path, work: Path, *, time_limit_s: float | None = None, tell: Tell | None = None
) -> Outcome:
    """Measures what is not measured yet, as far as the time allows, and writes results.json and results.md.

    Args:
        settings: methods are known ones.
        output: absolute path of the folder of the results; the same one goes on.
        work: of the folder of runs and unfinished states.
        time_limit_s: ends before starting what would not fit; None measures everything.
        tell: gets a line per cell, and lets the cells' processes write theirs to stderr; None for silence.

    Raises:
        ConfigError: a setting cannot be used, or the folder holds results of other settings.
        BlockError: cells failed; what is finished is written.
    """
    check_settings(settings)
    machine = describe_machine(settings.device)
    files = ResultFiles(output)
    files.open(settings, machine["device"])
    suite = _Suite(settings, files, work, Deadline(time_limit_s), tell)
    suite.measure()
    document = make_document(settings, machine, files.all_finished())
    table = render_results(document)
    files.write_text("results.json", json.dumps(document, indent=1) + "\n")
    files.write_text("results.md", table)
    if suite.failed:
        raise BlockError(
            "bench",
            f"{len(suite.failed)} cells failed: {', '.join(suite.failed)}",
            "see above; run it again to retry",
        )
    return Outcome(document=document, table=table, num_missing=suite.num_missing)


class _Suite:
    """One call's pass over all cells."""

    def __init__(
        self, settings: BenchSettings, files: ResultFiles, work: Path, deadline: Deadline, tell: Tell | None
    ) -> None:
        self._settings, self._files, self._work, self._deadline = settings, files, work, deadline
        self._is_quiet, self._tell = tell is None, tell or _ignore
        self._sizes: dict[str, tuple[int, ...]] = {}
        self.failed: list[str] = []
        self.num_missing = 0

    def measure(self) -> None:
        """Measures every cell that is not finished."""
        self._sizes = {model: self._budgets(model) for model in self._settings.models}
        cells = list(training_cells(self._settings, self._sizes))
        for position, cell in enumerate(cells):
            self._tell(f"[{position + 1}/{len(cells)}] {cell.name}")
            self._train(cell)

    def _budgets(self, model: str) -> tuple[int, ...]:
        """Returns the budgets of a model; none as long as nothing is known of it."""
        facts = self._finish(Cell(kind="facts", model=model))
        if facts is None or self._settings.budgets:
            return self._settings.budgets if facts else ()
        found = self._finish(Cell(kind="budgets", model=model))
        return tuple(found["budgets"].values()) if found else ()

    def _train(self, cell: Cell) -> None:
        """Measures a training after what it needs: the batch that fits, a learning rate, and a limit."""
        if self._files.finished(cell) is not None:
            return
        found: dict[str, Any] | None = {}
        if method_named(cell.method).family != "pipeline":
            found = self._finish(replace(cell, kind="fit", seed=0))
        if found is not None and found.get("status") != "does not fit" and self._settings.search_seconds:
            found = self._search(cell, found)
        if found is None:
            self.num_missing += 1
        elif found.get("status") == "does not fit":
            refused = {name: found[name] for name in ("status", "needs", "needs_bytes")}
            self._files.finish(cell, refused, self._work)
        else:
            self._finish(replace(cell, lr=found.get("lr"), **self._limit(cell)))

    def _search(self, cell: Cell, fit: dict[str, Any]) -> dict[str, Any] | None:
        """Returns the search that a cell goes by: one of its group, whichever method or budget that was made for."""
        group = search_group(method_named(cell.method), fit["fit"]["batch_size"] if fit else None)
        for found in self._files.all_finished() if group else ():
            other = found["cell"]
            if (other["kind"], other["model"], found.get("group")) == ("search", cell.model, group):
                return found
        return self._finish(replace(cell, kind="search", seed=0))

    def _limit(self, cell: Cell) -> dict[str, float]:
        """Returns how long a baseline may go on without backpropagation's accuracy; nothing where it may for ever."""
        factor = self._settings.give_up
        if factor is None or cell.method == REFERENCE or method_named(cell.method).family == "pipeline":
            return {}
        trained = [found for found in self._files.all_finished() if found["cell"]["model"] == cell.model]
        reference = reference_for(asdict(cell), trained)
        return {"limit_s": factor * reference["train_s"], "target": reference["val_accuracy"]} if reference else {}

    def _finish(self, cell: Cell) -> dict[str, Any] | None:
        """Returns a cell's document, measured now if it is not there; None if there is no time or it failed."""
        found = self._files.finished(cell)
        if found is None and self._deadline.left_s > _SHORTEST_S:
            self._run(cell)
            found = self._files.finished(cell)
        if found is None and cell.kind not in ("fit", "search"):
            self.num_missing += 1
        return found

    def _run(self, cell: Cell) -> None:
        left = min(LONGEST_CELL_S, self._deadline.left_s - _CLOSING_S)
        settings = replace(self._settings, budgets=self._sizes.get(cell.model, self._settings.budgets))
        request = CellRequest(
            settings=settings, cell=cell, output=str(self._files.output), work=str(self._work), seconds=left
        )
        command = [sys.executable, "-m", "nf_pipeline", "bench-cell", *(["--quiet"] if self._is_quiet else [])]
        try:
            done = subprocess.run(
                [*command, json.dumps(asdict(request))],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                timeout=left + _CLOSING_S,
                check=False,
            )
        except subprocess.TimeoutExpired:  # its last finished epoch is stored
            logger.info("%s: ended after %.0f s", cell.name, left)
            return
        if done.returncode == EXIT_INTERRUPTED:
            raise KeyboardInterrupt
        if done.returncode == EXIT_CONFIG:
            raise ConfigError(
                f"bench: {cell.name} cannot be measured, the reason stands above", "correct that setting"
            )
        if done.returncode:
            self._tell(f"{cell.name} failed (exit code {done.returncode})")
            self.failed.append(cell.name)


def check_settings(settings: BenchSettings) -> None:
    """Finds out before anything is read what no cell could be measured with.

    Raises:
        ConfigError: names the setting.
    """
    if not settings.models:
        raise ConfigError("--models: got none, want one or more", "--models convnet")
    if not settings.methods:
        raise ConfigError("--methods: got none, want one or more", f"--methods {','.join(DEFAULT_METHODS)}")
    for name in settings.methods:
        method_named(name)
        for model in settings.models:
            config_for(settings, Cell(kind="train", model=model, method=name), Path("bench"))


def _ignore(_text: str) -> None:
    pass
