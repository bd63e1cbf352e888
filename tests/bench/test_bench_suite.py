"""Runs the benchmark as a person would, on a few digits, on a machine without Ray and without S3."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nf_pipeline.bench.settings import BenchSettings
from nf_pipeline.bench.suite import run_suite
from nf_pipeline.cli import main
from nf_pipeline.errors import EXIT_CONFIG, ConfigError

ABSENT = "import pathlib\npathlib.Path({marker!r}).touch()\nraise ImportError('not installed here')\n"
COMMAND = (
    *("bench", "--data", "digits", "--methods", "nf,bp", "--budgets", "3MiB", "--max-train-images", "300"),
    *("--epochs", "1", "--search-seconds", "0", "--num-threads", "1", "--output", "results", "--work", "work"),
)
BACKPROP = ("--methods", "bp", "--budgets", "12MiB")


def run_bench(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    absent = folder / "absent"
    absent.mkdir(exist_ok=True)
    for name in ("ray", "s3fs"):
        (absent / f"{name}.py").write_text(ABSENT.format(marker=str(folder / "imported")))
    return subprocess.run(
        [sys.executable, "-m", "nf_pipeline", *COMMAND, *arguments],
        capture_output=True,
        text=True,
        timeout=540,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(absent), os.environ.get("PYTHONPATH", "")])},
    )


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    for arguments in ((), BACKPROP):  # one after the other: both end up in the same results
        done = run_bench(folder, *arguments)
        assert done.returncode == 0, done.stderr
    return folder, done


@pytest.fixture(scope="module")
def document(bench):
    return json.loads((bench[0] / "results" / "results.json").read_text(encoding="utf8"))


def test_bench_needs_neither_ray_nor_s3(bench):
    assert not (bench[0] / "imported").exists()


def test_bench_shows_all_that_was_measured_by_several_calls(bench, document):
    rows = document["models"][0]["rows"]
    assert [(row["method"], row["status"]) for row in rows] == [
        ("nf", "done"),
        ("bp", "does not fit"),
        ("bp", "done"),
    ]
    assert all(row["measured_peak_bytes"][0] <= row["budget_bytes"] for row in rows if row["status"] == "done")
    assert bench[1].stdout.strip() == (bench[0] / "results" / "results.md").read_text(encoding="utf8").strip()


def test_bench_accounts_for_every_second_of_the_pipeline(document):
    for cell in document["cells"]:
        if cell["cell"]["method"] == "nf":
            assert sum(cell["parts"].values()) == pytest.approx(cell["train_s"], rel=0.05)
            assert cell["curve"][-1][0] == pytest.approx(cell["train_s"])
            assert cell["inference"]["batch 1"]["final"] > 0


def test_bench_draws_or_says_how_to(bench):
    folder, done = bench
    assert (folder / "results" / "accuracy-convnet.svg").exists() or "nf_pipeline[bench]" in done.stderr


def test_bench_leaves_no_path_of_this_machine_in_the_results(bench):
    for path in (bench[0] / "results").rglob("*.*"):
        assert str(bench[0]) not in path.read_text(encoding="utf8"), path


def test_bench_run_again_measures_nothing_twice(bench):
    folder, _ = bench
    stamps = {path: path.stat().st_mtime_ns for path in (folder / "results" / "cells").iterdir()}
    again = run_bench(folder)
    assert again.returncode == 0, again.stderr
    assert {path: path.stat().st_mtime_ns for path in (folder / "results" / "cells").iterdir()} == stamps
    assert list((folder / "work").iterdir()) == [folder / "work" / "images-seed0"]


def test_bench_refuses_to_mix_results_of_other_settings(bench):
    again = run_bench(bench[0], "--epochs", "2")
    assert again.returncode == EXIT_CONFIG
    assert "epochs 1, not 2" in again.stderr


def test_bench_without_time_for_a_cell_ends_well_and_says_how_to_go_on(tmp_path, capsys):
    output = ["--output", str(tmp_path / "results"), "--time-limit", "1"]
    assert main(["bench", "--methods", "bp", *output]) == 0
    assert "run the same command again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"methods": ("bq",)}, "bq: unknown method"),
        ({"methods": ("nf+train.unit_layer=3",)}, "did you mean train.unit_layers"),
        ({"methods": ("bp+train.head=linear",)}, "--methods bp.train.head=linear: .* do not take train.head"),
        ({"methods": ("nf",), "assignments": ("train.loss=predsim",)}, "--set train.loss=predsim"),
        ({"methods": ("bp+train.label_smoothing=2",)}, "train.label_smoothing"),
        ({"methods": ()}, "--methods"),
        ({"methods": ("bp",), "models": ()}, "--models"),
        ({"methods": ("bp",), "val_fraction": 2.0}, "val_fraction"),
    ],
)
def test_bench_refuses_settings_before_it_measures_anything(settings, text, tmp_path):
    with pytest.raises(ConfigError, match=text):
        run_suite(BenchSettings(**settings), tmp_path / "results", tmp_path / "work")
    assert not (tmp_path / "results").exists()


def test_bench_command_takes_settings_for_all_methods(tmp_path, capsys):
    code = main(["bench", "--methods", "bp", "--set", "train.head=linear", "--output", str(tmp_path / "results")])
    assert code == EXIT_CONFIG
    assert "--set train.head=linear" in capsys.readouterr().err


def test_bench_ends_with_the_cells_own_error_about_the_data(tmp_path, capfd):
    missing = str(tmp_path / "nothing")
    code = main(["bench", "--data", missing, "--methods", "bp", "--output", str(tmp_path / "results")])
    assert code == EXIT_CONFIG
    assert missing in capfd.readouterr().err
