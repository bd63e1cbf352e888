"""The benchmarks of steps, stopping early and overheads run as small as they go; tables say what numbers say."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
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


def test_early_stop_continues_the_run_that_it_ended_and_compares_what_both_chose(tmp_path: Path) -> None:
    small = ("--max-train-images", "120", "--epochs", "1", "--memory-budget", "3MiB", "--unit-layers", "4")
    data = str(FOLDER.parent.parent / "nf_pipeline" / "data" / "digits.parquet")
    printed, document = run_script(
        "early_stop.py", tmp_path, *small, "--seeds", "1", "--patience", "1", "--data", data
    )
    (seed,) = document["seeds"]
    stopped, whole = seed["stopped"], seed["whole"]
    assert whole["num_blocks"] == seed["num_planned"] > 2
    assert document["settings"]["data"] == "digits.parquet"
    assert stopped["num_blocks"] == seed["would_stop_after"]["1"]
    assert (stopped["num_blocks"] < whole["num_blocks"]) == (seed["left_out_s"] > 0)
    same = stopped["exit_layer"] == whole["exit_layer"]
    assert f"the same exit in {int(same)} of 1 seeds ({seed['num_val']} validation images)" in printed
    assert (tmp_path / "result.md").read_text(encoding="utf8").endswith(f"\n\n{printed}")


@pytest.fixture
def cache_policy(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark of caching, as a module."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import cache_policy

    return cache_policy


def test_table_of_caching_says_which_forced_policy_won_and_what_auto_took_of_it(cache_policy: ModuleType) -> None:
    same = {"stored_bytes": 10**6, "predicted_s": 1.0, "waited_s": 0.0, "last_exit": 0.5}
    runs = {"shards": ([-1, 0, 1], 4.0), "recompute": ([-1, -1, -1], 6.0), "auto": ([-1, 0, 0], 4.4)}
    results = [
        cache_policy.Result(case="local folder", policy=policy, sources=sources, seconds=seconds, **same)
        for policy, (sources, seconds) in runs.items()
    ]
    *table, _, sentence = cache_policy.table(results).splitlines()
    assert "| local folder | auto | images 1 1 | 1 | 1.0 | 4.4 |" in table[-1]
    assert "shards is 1.5 times as fast as recompute" in sentence
    assert "the input of shards for 2 of 3 blocks and 1.10 of its time" in sentence


@pytest.mark.ray
def test_overheads_are_measured_inline_and_on_ray(tmp_path: Path) -> None:
    small = ("--model", "convnet", "--max-train-images", "120", "--epochs", "1", "--memory-budget", "4MiB")
    printed, document = run_script("overheads.py", tmp_path, *small, "--unit-layers", "3", "--repetitions", "1")
    overheads = document["overheads"]
    assert all(f"| {name} |" in printed for name in overheads)
    assert overheads["start-up, inline"]["seconds"] > 0
    assert overheads["profiling and planning"]["part"] == overheads["profiling and planning"]["seconds"] / 600
    (beside,) = document["measured"]["beside"]
    assert beside["epochs_s"] > 0 < beside["memory_epochs_s"]
    assert overheads["epochs"]["seconds"] == beside["epochs_s"] - beside["memory_epochs_s"]
