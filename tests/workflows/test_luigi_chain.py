"""The chain prepare -> train -> predict as tasks of Luigi, run as a person would."""

import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

WORKFLOWS = Path(__file__).parent.parent.parent / "workflows"
QUICK = ["--max-train-images", "300", "--epochs", "1", "--num-threads", "1"]


def run_chain(work, *arguments):
    command = [sys.executable, str(WORKFLOWS / "luigi_chain.py"), "--folder", str(work), *QUICK, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def stamps(work):
    """Returns when each file was last written."""
    return {path: path.stat().st_mtime_ns for path in work.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    work = tmp_path_factory.mktemp("chain")
    done = run_chain(work)
    assert done.returncode == 0, done.stderr
    assert "3 ran successfully" in done.stdout
    return work


def test_chain_ends_with_a_prediction_of_every_prepared_image(finished):
    prepared = pq.read_table(finished / "prepared.parquet")
    predicted = pq.read_table(finished / "predictions.parquet")

    assert prepared["label"].type == pa.string()
    assert predicted.num_rows == prepared.num_rows == 1797
    assert set(predicted["class_name"].to_pylist()) <= set("0123456789")
    right = [one == other for one, other in zip(predicted["class_name"], prepared["label"], strict=True)]
    assert sum(right) > 0.2 * 1797


def test_chain_that_is_done_runs_nothing(finished):
    before = stamps(finished)

    done = run_chain(finished)

    assert done.returncode == 0, done.stderr
    assert "Did not run any tasks" in done.stdout
    assert stamps(finished) == before


def test_chain_makes_only_what_is_missing(finished):
    before = stamps(finished)
    (finished / "predictions.parquet").unlink()

    arguments = ["--module", "luigi_chain", "Predict", "--folder", str(finished), "--local-scheduler", *QUICK]
    environment = {**os.environ, "PYTHONPATH": str(WORKFLOWS)}
    done = subprocess.run(
        [sys.executable, "-m", "luigi", *arguments], capture_output=True, text=True, timeout=300, env=environment
    )

    assert done.returncode == 0, done.stderr
    after = stamps(finished)
    assert after.keys() == before.keys()
    assert [path.name for path in after if after[path] != before[path]] == ["predictions.parquet"]


def test_failed_task_shows_the_error_and_its_fix_and_ends_with_an_exit_code(tmp_path):
    done = run_chain(tmp_path, "--memory-budget", "plenty")

    assert done.returncode == 1
    assert "Error: configuration: memory.budget_bytes: got 'plenty'" in done.stderr
    assert "Fix: " in done.stderr
    assert not (tmp_path / "predictions.parquet").exists()
