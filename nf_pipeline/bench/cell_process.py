"""What one process of a benchmark does: measure one cell and store its result.

Entry: `measure_cell`.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from nf_pipeline.bench.baseline_trainer import Limit, measure_epoch, train_baseline
from nf_pipeline.bench.budgets import backprop_peaks, choose_budgets
from nf_pipeline.bench.cells import Cell, CellRequest
from nf_pipeline.bench.deadline import Deadline
from nf_pipeline.bench.fit import Fit, fit_budgets
from nf_pipeline.bench.images import images_folder, ingest_images, open_images, share_images
from nf_pipeline.bench.inference import compare_inference
from nf_pipeline.bench.lr_search import search_group
from nf_pipeline.bench.methods import Method, method_named
from nf_pipeline.bench.pipeline_runner import (
    hand_plan,
    plan_ahead,
    plan_refused,
    planned_epoch_s,
    run_pipeline,
)
from nf_pipeline.bench.result_files import ResultFiles
from nf_pipeline.bench.run_config import RUN, config_for
from nf_pipeline.bench.task import Task
from nf_pipeline.bench.trials import Trials
from nf_pipeline.config import RunConfig
from nf_pipeline.core.exit_model import ExitModel
from nf_pipeline.core.layers import cut
from nf_pipeline.core.local_unit import LocalUnit
from nf_pipeline.core.models import build_model
from nf_pipeline.core.profiler import count_params
from nf_pipeline.documents import read_fields
from nf_pipeline.errors import ConfigError, PlanError
from nf_pipeline.model_files import load_model
from nf_pipeline.units import format_bytes
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
    if result is not None and files.finished(request.cell) is None:
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
            facts = self._files.finished(Cell(kind="facts", model=self._cell.model)) or {}
            peaks = {int(size): peak for size, peak in facts["backprop_peaks"].items()}
            return {"status": "done", "budgets": choose_budgets(self._task(self._cell), peaks)}
        if self._cell.kind == "fit":
            return self._fits()
        return self._search() if self._cell.kind == "search" else self._train()

    def _facts(self) -> Result:
        task = self._task(self._cell)
        facts = task.ingest.facts
        if task.target.kind != "class":
            what = f"bench compares accuracies, {facts['dataset']} has {task.target.size} values to predict"
            raise ConfigError(what, "--data with classes")
        return {
            "status": "done",
            "params": sum(count_params(unit) for unit in task.units(method_named("bp"))),
            "image_shape": list(task.inputs.shape),
            "num_classes": task.target.num_classes,
            "split_rows": facts["split_rows"],
            "backprop_peaks": backprop_peaks(task),
        }

    def _train(self) -> Result | None:
        cell, method, folder = self._cell, method_named(self._cell.method), self._work / self._cell.name
        if method.family == "pipeline":
            config = config_for(self._settings, cell, folder)
            share_images(self._images, folder)
            result = run_pipeline(config, deadline=self._deadline, tell=self._tell)
            if result is not None and result["status"] == "done":
                result["inference"] = _inference(config, self._task(cell))
            return result
        fit = self._stored_fit()
        self._tell(_batch_text(method, fit))
        return train_baseline(
            self._task(cell),
            method,
            fit,
            folder=folder,
            deadline=self._deadline,
            tell=self._tell,
            limit=None
            if cell.limit_s is None
            else Limit(seconds=cell.limit_s, target=1.0 if cell.target is None else cell.target),
        )

    def _fits(self) -> Result:
        """Finds the batches of all baselines at all budgets while it is at it; returns that of this cell."""
        methods = dict.fromkeys((self._cell.method, *self._settings.methods))
        budgets = dict.fromkeys((self._cell.budget_bytes, *self._settings.budgets))
        for name in methods:
            cells = [replace(self._cell, method=name, budget_bytes=budget) for budget in budgets]
            missing = [cell for cell in cells if self._files.finished(cell) is None]
            if missing and method_named(name).family != "pipeline":
                self._fit_cells(method_named(name), missing)
        return self._files.finished(self._cell) or {}

    def _fit_cells(self, method: Method, cells: Sequence[Cell]) -> None:
        for cell, fit in zip(cells, fit_budgets([self._task(cell) for cell in cells], method), strict=True):
            self._tell(f"{method.title}, {format_bytes(cell.budget_bytes)}: {_batch_text(method, fit)}")
            self._files.finish(cell, _fit_result(fit), self._work)

    def _stored_fit(self) -> Fit:
        found = self._files.finished(Cell(kind="fit", **_place(self._cell))) or {}
        return read_fields(Fit, found.get("fit"))

    def _search(self) -> Result | None:
        method, folder = method_named(self._cell.method), self._work / self._cell.name
        trials = Trials(self._settings, folder, self._deadline, self._tell)
        if method.family == "pipeline":
            return self._search_pipeline(trials, folder)
        fit = self._stored_fit()
        self._tell(_batch_text(method, fit))

        def attempt(rate: float, epochs: int, own: Path) -> Result | None:
            task = self._task(replace(self._cell, lr=rate), epochs=epochs)
            options = {"folder": own, "deadline": self._deadline, "tell": self._tell}
            return train_baseline(task, method, fit, with_test=False, **options)

        found = trials.run(lambda: measure_epoch(self._task(self._cell), method, fit, folder / "speed"), attempt)
        group = search_group(method, fit.batch_size)
        return found and {**found, "batch_size": fit.batch_size, "group": group}

    def _search_pipeline(self, trials: Trials, folder: Path) -> Result | None:
        """Plans once, as the training will, and tries all rates with that plan."""
        config = config_for(self._settings, self._cell, folder / "plan")
        share_images(self._images, folder / "plan")
        try:
            planned = plan_ahead(config)
        except PlanError as error:
            return plan_refused(error)

        def attempt(rate: float, epochs: int, own: Path) -> Result | None:
            changed = config_for(self._settings, replace(self._cell, lr=rate), own, epochs=epochs)
            share_images(self._images, own)
            hand_plan(planned, changed)
            return run_pipeline(changed, deadline=self._deadline, tell=self._tell, with_model=False)

        found = trials.run(lambda: planned_epoch_s(planned, self._settings.epochs), attempt)
        return found and {**found, "batch_size": None, "group": ""}

    def _task(self, cell: Cell, *, epochs: int | None = None) -> Task:
        store, ingest = open_images(self._images)
        return Task(config=config_for(self._settings, cell, self._images, epochs=epochs), store=store, ingest=ingest)

    def _ingest(self, seed: int) -> None:
        folder = images_folder(self._work, seed)
        ingest_images(config_for(self._settings, replace(self._cell, seed=seed, method=""), folder))


def _inference(config: RunConfig, task: Task) -> dict[str, Any]:
    final = load_model(f"{config.storage.uri}/{RUN}", model=config.model.name)
    model = build_model(str(config.model.name), inputs=task.inputs, num_outputs=task.target.size, seed=0)
    whole = cut(model, task.inputs)
    # Laid out in memory like the final one, layer by layer: only what is left out makes a difference.
    full = ExitModel([LocalUnit(whole.layers, whole.tail, is_last=True)], task.inputs, task.target)
    cap_device_memory(task.device, None)
    return compare_inference({"final": final, "full": full}, task.inputs.shape, task.device)


def _fit_result(fit: Fit) -> Result:
    if fit.micro_batch:
        return {"status": "done", "fit": asdict(fit)}
    return {"status": "does not fit", "needs": "batch 2", "needs_bytes": fit.predicted_peak_bytes}


def _batch_text(method: Method, fit: Fit) -> str:
    if not fit.micro_batch:
        return f"batch 2 needs {format_bytes(fit.predicted_peak_bytes)}"
    parts = f" in parts of {fit.micro_batch}" if method.micro_batch else ""
    return f"batch {fit.batch_size}{parts}" + (
        f", segments of {fit.segment_layers} layers" if method.checkpointing else ""
    )


def _place(cell: Cell) -> dict[str, Any]:
    return {"model": cell.model, "method": cell.method, "budget_bytes": cell.budget_bytes}
