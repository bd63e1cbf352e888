"""Runs the comparison with backpropagation as a person would, on a few digits."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parent.parent / "workflows" / "benchmarks" / "compare.py"


def run_compare(folder: Path, *arguments: str) -> tuple[str, dict[str, Any]]:
    output = folder / "result.json"
    command = [
        sys.executable,
        str(SCRIPT),
        "--epochs",
        "1",
        "--max-train-images",
        "400",
        "--num-threads",
        "1",
    ]
    done = subprocess.run(
        [*command, "--output", str(output), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(output.read_text(encoding="utf8"))


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    return run_compare(tmp_path_factory.mktemp("compare"), "--memory-budget", "6MiB")


def test_compare_prints_a_row_for_the_pipeline_and_for_every_baseline(comparison):
    printed, document = comparison
    table = [line for line in printed.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(document["rows"])
    assert len({line.count("|") for line in table}) == 1
    assert [row["method"] for row in document["rows"]] == [
        "nf-pipeline",
        "backprop",
        "backprop + checkpointing",
        "backprop + micro-batches",
        "backprop + both",
        "backprop, no budget",
    ]


def test_backprop_stays_within_the_budget_it_was_given(comparison):
    _, document = comparison
    results = {result["method"]: result for result in document["backprop"]}
    limited = [result for result in results.values() if result["budget_bytes"] is not None]
    assert all(result["measured_peak_bytes"] <= result["budget_bytes"] for result in limited)
    assert results["backprop"]["batch_size"] < 128
    assert results["backprop, no budget"]["batch_size"] == 128
    assert results["backprop, no budget"]["measured_peak_bytes"] > 6 * 2**20


def test_backprop_peak_is_predicted_within_ten_percent(comparison):
    _, document = comparison
    for result in document["backprop"]:
        assert result["measured_peak_bytes"] == pytest.approx(result["predicted_peak_bytes"], rel=0.1)


def test_savings_allow_larger_batches(comparison):
    _, document = comparison
    results = {result["method"]: result for result in document["backprop"]}
    assert results["backprop + checkpointing"]["batch_size"] > results["backprop"]["batch_size"]
    assert results["backprop + micro-batches"]["batch_size"] == 128
    assert results["backprop + micro-batches"]["micro_batch_size"] <= results["backprop"]["batch_size"]


def test_backprop_that_cannot_fit_is_said_not_to_fit(tmp_path):
    printed, document = run_compare(tmp_path, "--memory-budget", "3.2MiB", "--methods", "budget")
    result = document["backprop"][0]
    assert result["fits"] is False
    assert result["predicted_peak_bytes"] > document["summary"]["memory_budget_bytes"]
    assert result["val_accuracy"] is None
    assert "does not fit" in printed
