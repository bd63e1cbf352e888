"""What the finished cells amount to, side by side, and how that reads."""

import dataclasses
import json

import pytest

from nf_pipeline.bench.cells import Cell, training_cells
from nf_pipeline.bench.result_files import ResultFiles
from nf_pipeline.bench.results import make_document
from nf_pipeline.bench.settings import BenchSettings
from nf_pipeline.bench.tables import render_results
from nf_pipeline.errors import ConfigError

MIB = 2**20
MACHINE = {"device": "D", "cpu": "D", "cores": 2, "python": "3", "torch": "2", "nf_pipeline": "0"}
SETTINGS = BenchSettings(data="/somewhere/private/cifar10", methods=("nf", "bp"), num_seeds=1)
FACTS = {
    "cell": {"kind": "facts", "model": "convnet", "method": "", "budget_bytes": 0, "seed": 0, "lr": None},
    "status": "done",
    "params": 1000,
    "split_rows": {"train": 80, "val": 20, "test": 10},
}
BUDGETS = {
    "cell": {**FACTS["cell"], "kind": "budgets"},
    "status": "done",
    "budgets": {"smallest": 2 * MIB, "backprop batch 2": 6 * MIB},
}
PLANNED = {
    "predicted_peak_bytes": 2 * MIB,
    "parts": {"profiling and planning": 1.0, "training": 2.0, "caching": 0.0, "loading": 0.0, "other": 0.0},
    "plan": {"layers": [[0, 2]], "units": [1], "predicted_s": 1.5, "measured_s": 2.0, "candidates": []},
    "exit_layer": "features.0",
    "stopped_early": False,
}


def trained(method, budget, curve, seed=0):
    cell = {"kind": "train", "model": "convnet", "method": method, "budget_bytes": budget, "seed": seed, "lr": 0.05}
    return {
        "cell": cell,
        "status": "done",
        "curve": curve,
        "train_s": curve[-1][0],
        "val_accuracy": curve[-1][1],
        "test_accuracy": curve[-1][1],
        "measured_peak_bytes": budget,
        "batch_sizes": [4],
        "micro_batch": 4,
        "lr": 0.05,
        "epoch_s": 1.0,
        "images_per_s": 100.0,
        "params": 1000,
        "epochs": len(curve),
        **(PLANNED if method == "nf" else {}),
    }


def no_fit(method, budget, needed):
    cell = {"kind": "train", "model": "convnet", "method": method, "budget_bytes": budget, "seed": 0, "lr": None}
    return {"cell": cell, "status": "does not fit", "needs": "batch 2", "needs_bytes": needed}


@pytest.fixture
def document():
    cells = [
        trained("bp", 6 * MIB, [(5.0, 0.3), (10.0, 0.5)]),
        trained("nf", 6 * MIB, [(2.0, 0.4), (4.0, 0.6)]),
        no_fit("bp", 2 * MIB, 5 * MIB),
        trained("nf", 2 * MIB, [(3.0, 0.4), (6.0, 0.45)]),
    ]
    return make_document(SETTINGS, MACHINE, [FACTS, BUDGETS, *cells])


def row(document, method, budget):
    rows = document["models"][0]["rows"]
    return next(row for row in rows if (row["method"], row["budget_bytes"]) == (method, budget))


def test_target_is_what_backpropagation_reaches_at_the_same_budget(document):
    assert row(document, "nf", 6 * MIB)["time_to_target_s"] == [4.0, 4.0, 4.0]
    assert row(document, "bp", 6 * MIB)["time_to_target_s"] == [10.0, 10.0, 10.0]


def test_target_where_backpropagation_does_not_fit_is_that_of_the_smallest_budget_where_it_does(document):
    tight = row(document, "nf", 2 * MIB)
    assert tight["targets"] == [0.5]
    assert tight["time_to_target_s"] is None
    assert tight["accuracy_after_equal_time"] == [0.45, 0.45, 0.45]


def test_repetitions_are_compared_seed_by_seed():
    cells = [
        trained("bp", MIB, [(10.0, 0.5)]),
        trained("bp", MIB, [(10.0, 0.7)], seed=1),
        trained("nf", MIB, [(2.0, 0.5), (4.0, 0.8)]),
        trained("nf", MIB, [(2.0, 0.5), (4.0, 0.8)], seed=1),
    ]
    found = row(make_document(SETTINGS, MACHINE, [FACTS, *cells]), "nf", MIB)
    assert found["time_to_target_s"] == [3.0, 2.0, 4.0]
    assert found["num_seeds"] == 2


def test_report_says_what_does_not_fit_and_what_was_not_reached(document):
    text = render_results(document)
    assert "does not fit: batch 2 needs 5.0 MiB" in text
    assert "| 2.0 MiB | 50.0 % | not in 6.0 s | needs 5.0 MiB | backprop cannot run | - |" in text
    assert "| 6.0 MiB | 50.0 % | 4.0 s | 10.0 s | 2.50x | 2.50x |" in text
    assert "### 2.0 MiB (smallest)" in text


def test_choice_is_compared_with_the_shortest_whole_schedule_of_the_same_precision():
    cells = [
        trained("bp", MIB, [(10.0, 0.5)]),
        trained("bp-micro", MIB, [(8.0, 0.5)]),
        trained("bp-bf16", MIB, [(4.0, 0.5)]),
        trained("bp+train.mixup=0.2", MIB, [(3.0, 0.5)]),
        {**trained("bp-ckpt", MIB, [(1.0, 0.1)]), "status": "given up"},
        trained("nf", MIB, [(10.0, 0.5)]),
    ]
    (choice,) = make_document(SETTINGS, MACHINE, [FACTS, *cells])["models"][0]["choices"]
    assert (choice["baseline"], choice["baseline_s"][0]) == ("bp-micro", 8.0)
    assert choice["ratio"][0] == 10.0 / 8.0
    assert choice["ratio_without_planning"][0] == 9.0 / 8.0
    assert choice["predicted_over_measured_s"][0] == 0.75
    assert choice["predicted_over_measured_peak"][0] == 2.0


def test_choice_where_no_baseline_runs_is_there_without_a_ratio(document):
    tight = document["models"][0]["choices"][0]
    assert (tight["budget_bytes"], tight["baseline"], tight["ratio"]) == (2 * MIB, None, None)
    assert "| none runs | - | - | - |" in render_results(document)


def test_baseline_that_was_given_up_is_shown_with_its_seconds_and_epochs():
    given_up = {**trained("dgl", MIB, [(16.0, 0.2)]), "status": "given up", "test_accuracy": None}
    document = make_document(SETTINGS, MACHINE, [FACTS, trained("bp", MIB, [(8.0, 0.5)]), given_up])
    text = render_results(document)
    assert "| 8.0 s | not in 16.0 s |" in text
    assert "20.0 %, given up after 1 epochs" in text


def test_without_backpropagation_there_is_no_target_to_miss():
    text = render_results(make_document(SETTINGS, MACHINE, [FACTS, trained("nf", MIB, [(8.0, 0.5)])]))
    assert "| 1.0 MiB | - | - | - | - |" in text
    assert "not in" not in text and "not reached" not in text


def test_bytes_that_nobody_measured_are_a_dash_and_not_nothing(document):
    rows = document["models"][0]["rows"]
    for row in rows:
        row["read_bytes"] = row["written_bytes"] = None
        row["stored_bytes"] = [0, 0, 0]
    assert "| 0 B | - | - | 1,000 |" in render_results(document)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"give_up": 2.0}, "2 times"),
        ({"search_seconds": 0.0}, "at the default"),
        ({"assignments": ("train.mixup=0.2",)}, "All methods train with train.mixup=0.2."),
    ],
)
def test_report_says_how_methods_were_tuned_and_limited(changes, text):
    settings = dataclasses.replace(SETTINGS, **changes)
    assert text in render_results(make_document(settings, MACHINE, [FACTS]))


def test_every_table_of_the_report_is_rectangular(document):
    tables = [part.splitlines() for part in render_results(document).split("\n\n") if part.startswith("|")]
    assert len(tables) >= 3
    assert all(len({line.count("|") for line in table}) == 1 for table in tables)


def test_results_of_before_there_was_a_setting_go_on_with_its_default_alone(tmp_path):
    files = ResultFiles(tmp_path)
    files.open(SETTINGS, "D")
    stored = json.loads((tmp_path / "settings.json").read_text())
    del stored["assignments"]
    files.write_text("settings.json", json.dumps(stored))
    files.finish(Cell(kind="facts", model="convnet"), {"status": "done"}, tmp_path / "work")
    files.open(SETTINGS, "D")
    with pytest.raises(ConfigError, match=r"assignments \[\], not \['train.mixup=0.2'\]"):
        files.open(dataclasses.replace(SETTINGS, assignments=("train.mixup=0.2",)), "D")


def test_results_name_the_data_and_not_where_it_lies(document):
    assert document["settings"]["data"] == "cifar10"
    assert "private" not in str(document) + render_results(document)


def test_cells_come_seed_by_seed_loose_budgets_first_and_backpropagation_before_the_others():
    settings = BenchSettings(models=("a", "b"), methods=("nf", "bp"), num_seeds=2)
    cells = list(training_cells(settings, {"a": (1, 9), "b": (5,)}))
    assert [(cell.seed, cell.model, cell.budget_bytes, cell.method) for cell in cells[:5]] == [
        (0, "a", 9, "bp"),
        (0, "a", 9, "nf"),
        (0, "a", 1, "bp"),
        (0, "a", 1, "nf"),
        (0, "b", 5, "bp"),
    ]
    assert [cell.seed for cell in cells] == [0] * 6 + [1] * 6
    assert len({cell.name for cell in cells}) == 12


def test_cell_of_a_factory_has_the_name_of_a_file():
    assert (
        Cell(kind="train", model="my.module:Net", method="bp", budget_bytes=7).name
        == "train-my-module-Net-7-bp-seed0"
    )
