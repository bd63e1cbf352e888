"""Runs the benchmarks of steps, of stopping early and of overheads as a person would, as small as they go."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent.parent.parent / "workflows" / "benchmarks"


def run_script(name: str, folder: Path, *arguments: str) -> tuple[str, dict[str, Any]]:
    output = folder / "result.json"
    command = [sys.executable, str(FOLDER / name), "--num-threads", "1", "--output", str(output), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=folder)
    assert done.returncode == 0, done.stderr
    table = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    return done.stdout, json.loads(output.read_text(encoding="utf8"))


def test_inner_step_compares_every_variant_with_its_baseline(tmp_path: Path) -> None:
    small = ("--models", "convnet", "--batches", "4", "--unit-layers", "3", "--turns", "1")
    variants = ("contiguous", "bf16", "loop optimiser", "flush denormals", "forward, contiguous")
    _, document = run_script("inner_step.py", tmp_path, *small, "--variants", *variants)
    timings = document["timings"]
    assert {timing["variant"] for timing in timings} == {"train", "forward", *variants}
    assert all(timing["ratio"] == 1.0 for timing in timings if timing["variant"] in ("train", "forward"))
    assert {tuple(timing["layers"]) for timing in timings} == {(0, 3), (3, 6)}


def test_early_stop_trains_both_runs_of_a_seed_and_says_where_others_would_stop(tmp_path: Path) -> None:
    small = ("--max-train-images", "120", "--epochs", "1", "--memory-budget", "6MiB", "--unit-layers", "4")
    _, document = run_script("early_stop.py", tmp_path, *small, "--seeds", "0", "--patience", "1")
    whole, stopped = document["runs"]
    assert (whole["patience"], stopped["patience"]) == (None, 1)
    assert whole["num_blocks"] == whole["num_planned"] > 2
    assert stopped["num_blocks"] == whole["would_stop_after"]["1"]
    assert stopped["val_accuracies"] == whole["val_accuracies"][: len(stopped["val_accuracies"])]


@pytest.mark.ray
def test_overheads_are_measured_inline_and_on_ray(tmp_path: Path) -> None:
    small = ("--model", "convnet", "--max-train-images", "120", "--epochs", "1", "--memory-budget", "4MiB")
    printed, document = run_script("overheads.py", tmp_path, *small, "--unit-layers", "3", "--repetitions", "1")
    overheads = document["overheads"]
    assert all(f"| {name} |" in printed for name in overheads)
    assert overheads["start-up, inline"]["seconds"] > 0
    assert overheads["profiling and planning"]["part"] == overheads["profiling and planning"]["seconds"] / 600
    inline = document["repetitions"][0]["inline"]
    assert inline["memory_s"] > 0
    assert inline["loader_wait_s"] + inline["write_s"] < inline["blocks_s"]
