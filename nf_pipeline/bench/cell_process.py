"""What one process of a benchmark does: measure one cell and store its result.

Entry: `measure_cell`.
"""

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from nf_pipeline.bench.baseline_trainer import train_baseline
from nf_pipeline.bench.budgets import choose_budgets
from nf_pipeline.bench.cells import Cell, CellRequest
from nf_pipeline.bench.deadline import Deadline
from nf_pipeline.bench.fit import Fit, fit_method
from nf_pipeline.bench.images import images_folder, ingest_images, open_images, share_images
from nf_pipeline.bench.inference import compare_inference
from nf_pipeline.bench.lr_search import best_rate, next_rate
from nf_pipeline.bench.methods import Method, method_named
from nf_pipeline.bench.pipeline_runner import run_pipeline
from nf_pipeline.bench.result_files import ResultFiles
from nf_pipeline.bench.run_config import RUN, config_for
from nf_pipeline.bench.task import Task
from nf_pipeline.config import RunConfig, TrainConfig
from nf_pipeline.core.exit_model import Normalise
from nf_pipeline.core.models import build_model
from nf_pipeline.core.profiler import count_params
from nf_pipeline.documents import parse_json
from nf_pipeline.model_files import load_model
from nf_pipeline.worker.runtime import cap_device_memory, set_threads

Tell = Callable[[str], None]
Result = dict[str, Any]


def measure_cell(request: CellRequest, tell: Tell) -> bool:
    """Measures a cell, or goes on with it, and stores its result when it is finished.

    Args:
        tell: gets a line per epoch.

    Returns:
        Whether it is finished.
    """
    files = ResultFiles(Path(request.output))
    result = _Measurement(request, files, tell).run()
    if result is not None:
        files.finish(request.cell, result, Path(request.work))
    return result is not None


class _Measurement:
    """One cell in this process."""

    def __init__(self, request: CellRequest, files: ResultFiles, tell: Tell) -> None:
        self._cell, self._settings = request.cell, request.settings
        self._files, self._deadline, self._tell = files, Deadline(request.seconds), tell
        self._work = Path(request.work)
        self._images = images_folder(self._work, request.cell.seed)

    def run(self) -> Result | None:
        """Does what the kind of the cell says; None if time ran out."""
        set_threads(self._settings.num_threads)
        self._ingest(self._cell.seed)
        if self._cell.kind == "facts":
            return self._facts()
        if self._cell.kind == "budgets":
            return {"status": "done", "budgets": choose_budgets(self._task(self._cell))}
        return self._search() if self._cell.kind == "search" else self._train()

    def _facts(self) -> Result:
        task = self._task(self._cell)
        facts = task.ingest.facts
        return {
            "status": "done",
            "params": sum(count_params(unit) for unit in task.units(method_named("bp"))),
            "image_shape": facts["image_shape"],
            "num_classes": facts["num_classes"],
            "split_rows": facts["split_rows"],
        }

    def _train(self) -> Result | None:
        method, folder = method_named(self._cell.method), self._work / self._cell.name
        if method.family == "pipeline":
            return self._pipeline(self._cell, folder, epochs=None)
        task = self._task(self._cell)
        began = time.monotonic()
        fit = self._fit(task, method)
        if not fit.micro_batch:
            return _no_fit(fit)
        choice_s = time.monotonic() - began
        result = train_baseline(task, method, fit, folder=folder, deadline=self._deadline, tell=self._tell)
        # Not part of its seconds: whoever trains by hand finds the batch by trial, at no known cost.
        return result and {**result, "choice_s": choice_s}

    def _pipeline(self, cell: Cell, folder: Path, epochs: int | None) -> Result | None:
        config = config_for(self._settings, cell, folder, epochs=epochs)
        share_images(self._images, folder)
        result = run_pipeline(config, deadline=self._deadline, tell=self._tell)
        if result is not None and result["status"] == "done" and cell.kind == "train":
            result["inference"] = _inference(config, self._task(cell))
        return result

    def _search(self) -> Result | None:
        """Tries learning rates, one trial after the other; every trial that is finished is kept."""
        method, folder = method_named(self._cell.method), self._work / self._cell.name
        fit, same = None, None
        if method.family != "pipeline":
            fit = self._fit(self._task(self._cell), method)
            if not fit.micro_batch:
                return _no_fit(fit)
            same = self._same_batch(fit)
        if same is not None:
            return same
        return self._trials(method, fit, folder)

    def _trials(self, method: Method, fit: Fit | None, folder: Path) -> Result | None:
        trials = _read_trials(folder)
        start, max_tries = TrainConfig().lr, self._settings.search_tries
        while True:
            scores = {trial["lr"]: trial["val_accuracy"] for trial in trials}
            rate = next_rate(scores, start, max_tries)
            if rate is None:
                break
            if trials and not self._deadline.leaves(trials[-1]["train_s"]):
                return None
            result = self._trial(replace(self._cell, lr=rate), method, fit, folder / f"lr-{rate:g}")
            if result is None or result["status"] == "does not fit":
                return result
            trials.append(_trial_of(rate, result))
            _write_trials(folder, trials)
            shutil.rmtree(folder / f"lr-{rate:g}", ignore_errors=True)
        return {
            "status": "done",
            "lr": best_rate(scores),
            "batch_size": fit.batch_size if fit else None,
            "epochs": self._settings.search_epochs,
            "trials": trials,
        }

    def _trial(self, cell: Cell, method: Method, fit: Fit | None, folder: Path) -> Result | None:
        self._tell(f"learning rate {cell.lr:g}")
        if fit is None:
            return self._pipeline(cell, folder, epochs=self._settings.search_epochs)
        task = self._task(cell, epochs=self._settings.search_epochs)
        return train_baseline(task, method, fit, folder=folder, deadline=self._deadline, tell=self._tell)

    def _same_batch(self, fit: Fit) -> Result | None:
        """Returns what was found for the same method with the same batch at another budget."""
        for document in self._files.all_finished():
            other = Cell(**document["cell"])
            if (other.kind, other.model, other.method) != ("search", self._cell.model, self._cell.method):
                continue
            if document["status"] == "done" and document["batch_size"] == fit.batch_size:
                found = {name: value for name, value in document.items() if name != "cell"}
                return {"same_as": other.name, **found}
        return None

    def _fit(self, task: Task, method: Method) -> Fit:
        fit = fit_method(task, method)
        if fit.micro_batch:
            self._tell(
                f"batch {fit.batch_size}"
                + (f" in parts of {fit.micro_batch}" if method.micro_batch else "")
                + (f", segments of {fit.segment_layers} layers" if fit.segment_layers else "")
            )
        return fit

    def _task(self, cell: Cell, *, epochs: int | None = None) -> Task:
        store, ingest = open_images(self._images)
        return Task(config=config_for(self._settings, cell, self._images, epochs=epochs), store=store, ingest=ingest)

    def _ingest(self, seed: int) -> None:
        folder = images_folder(self._work, seed)
        ingest_images(config_for(self._settings, replace(self._cell, seed=seed, method=""), folder))


def _inference(config: RunConfig, task: Task) -> dict[str, Any]:
    final = load_model(f"{config.storage.uri}/{RUN}", model=config.model.name)
    facts = task.ingest.facts
    full = build_model(str(config.model.name), image_shape=task.image_shape, num_classes=facts["num_classes"], seed=0)
    cap_device_memory(task.device, None)
    models = {"final": final, "full": nn.Sequential(Normalise(facts["mean"], facts["std"]), full)}
    return compare_inference(models, task.image_shape, task.device)


def _no_fit(fit: Fit) -> Result:
    return {"status": "does not fit", "needs": "batch 2", "needs_bytes": fit.predicted_peak_bytes}


def _trial_of(rate: float, result: Result) -> Result:
    accuracy = result.get("best_val_accuracy", result.get("val_accuracy", 0.0))
    score = accuracy if result["status"] == "done" else 0.0
    return {"lr": rate, "val_accuracy": score, "train_s": result.get("train_s", 0.0)}


def _read_trials(folder: Path) -> list[Result]:
    path = folder / "trials.json"
    return list(parse_json(path.read_bytes())) if path.exists() else []


def _write_trials(folder: Path, trials: Sequence[Result]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "trials.json.part"
    partial.write_text(json.dumps(trials), encoding="utf8")
    partial.replace(folder / "trials.json")
