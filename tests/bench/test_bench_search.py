"""Learning rates are searched once per group of methods, resumed where they ended, and never on the test split."""

import dataclasses
import json

import pytest

from nf_pipeline.bench import cell_process
from nf_pipeline.bench.cells import Cell, CellRequest
from nf_pipeline.bench.deadline import Deadline
from nf_pipeline.bench.result_files import ResultFiles
from nf_pipeline.bench.settings import BenchSettings
from nf_pipeline.bench.trials import Trials

MIB = 2**20
SETTINGS = BenchSettings(
    methods=("bp", "bp-ckpt"), budgets=(2 * MIB, 5 * MIB), max_train_images=200, epochs=2, search_seconds=0.01
)
CELL = Cell(kind="search", model="convnet", method="bp", budget_bytes=5 * MIB)


def scored(rate, epochs, folder):
    folder.mkdir(parents=True, exist_ok=True)
    return {"status": "done", "val_accuracy": rate if rate < 0.1 else 0.0, "train_s": 1.0, "epochs": epochs}


def search(folder, attempt, seconds=None):
    trials = Trials(dataclasses.replace(SETTINGS, search_tries=3), folder, Deadline(seconds), lambda text: None)
    return trials.run(lambda: 0.004, attempt)


def test_search_takes_the_best_rate_and_leaves_no_folder_of_a_try(tmp_path):
    found = search(tmp_path, scored)
    assert (found["lr"], found["epochs"]) == (0.05, 2)
    assert [trial["lr"] for trial in found["trials"]] == [0.05, 0.017, 0.15]
    assert [path.name for path in tmp_path.iterdir()] == ["trials.json"]


def test_search_without_time_goes_on_after_its_last_try(tmp_path):
    assert search(tmp_path, scored, seconds=0.5) is None
    assert len(json.loads((tmp_path / "trials.json").read_text())["trials"]) == 1
    tried = []
    found = search(tmp_path, lambda rate, *rest: tried.append(rate) or scored(rate, *rest))
    assert tried == [0.017, 0.15]
    assert found == search(tmp_path, scored)


def test_try_that_diverges_counts_as_no_accuracy(tmp_path):
    found = search(tmp_path, lambda rate, *rest: {**scored(rate, *rest), "status": "diverged"})
    assert {trial["val_accuracy"] for trial in found["trials"]} == {0.0}


@pytest.fixture
def measure(tmp_path):
    def run(cell):
        request = CellRequest(
            settings=SETTINGS, cell=cell, output=str(tmp_path / "results"), work=str(tmp_path / "work")
        )
        assert cell_process.measure_cell(request, lambda text: None)
        return ResultFiles(tmp_path / "results").finished(cell)

    return run


def test_one_process_finds_the_batches_of_all_baselines_and_budgets(measure, tmp_path):
    found = measure(dataclasses.replace(CELL, kind="fit"))
    assert found["fit"]["micro_batch"] > 2
    assert {path.name for path in (tmp_path / "results" / "cells").iterdir()} == {
        f"fit-convnet-{size * MIB}-{name}.json" for size in (2, 5) for name in ("bp", "bp-ckpt")
    }
    tight = ResultFiles(tmp_path / "results").finished(dataclasses.replace(CELL, kind="fit", budget_bytes=2 * MIB))
    assert tight["status"] == "does not fit" and tight["needs_bytes"] > 2 * MIB
    searched = measure(CELL)
    assert searched["epochs"] == 1 and len(searched["trials"]) == 5
    assert searched["group"].startswith("backprop, batch ")
