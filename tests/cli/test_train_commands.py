"""The commands on real runs: digits, trained in this machine's processes, in a temporary folder."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nf_pipeline.cli.train_commands import _continuing
from nf_pipeline.storage.sealed import unseal

# Several blocks of the smallest model on few images: seconds on one core.
SMALL = (
    *("--memory-budget", "4MiB", "--executor", "inline", "--device", "cpu", "--max-train-images", "300"),
    *("--set", "train.unit_layers=2", "--set", "cluster.num_threads=1", "--stop", "never"),
)
EPOCH_LINE = re.compile(
    r"block 1/\d+ \| epoch \d+/\d+ \| loss \d+\.\d{3} \| val \d+\.\d % \| img/s [\d,]+ \| "
    r"peak \d+\.\d/4\.0 MiB \(\d+ %\) \| ETA \S+"
)


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nf_pipeline", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=500)


def run_ok(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    done = run(folder, *arguments)
    assert done.returncode == 0, done.stderr
    return done


def read_summary(folder: Path) -> dict[str, Any]:
    return unseal((folder / "nf-runs" / "run" / "summary.json").read_bytes())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A folder with a finished run in its ./nf-runs, and what the command said."""
    folder = tmp_path_factory.mktemp("trained")
    return folder, run_ok(folder, "train", *SMALL, "--epochs", "1")


def test_train_prints_progress_lines_on_stderr_and_tables_on_stdout(trained) -> None:
    folder, done = trained
    assert [line for line in done.stderr.splitlines() if EPOCH_LINE.fullmatch(line)]
    assert " | epoch " not in done.stdout
    summary = read_summary(folder)
    assert len(summary["blocks"]) > 1
    chosen = summary["exits"][summary["chosen_exit"]]
    marked = next(line for line in done.stdout.splitlines() if line.startswith("*"))
    assert chosen["layer"] in marked
    assert f"{100 * chosen['val_accuracy']:.1f} %" in marked
    assert summary["chosen_reason"] in done.stdout


def test_train_without_named_store_and_run_uses_the_defaults(trained) -> None:
    folder, _ = trained
    assert [path.name for path in folder.iterdir()] == ["nf-runs"]
    assert read_summary(folder)["run"] == "run"


def test_train_again_skips_everything_and_json_is_the_summary(trained) -> None:
    folder, _ = trained
    before = read_summary(folder)
    done = run_ok(folder, "train", *SMALL, "--epochs", "1", "--json")
    assert {**json.loads(done.stdout), "wall_s": 0} == {**before, "wall_s": 0}
    assert json.loads(done.stdout) == read_summary(folder)
    assert {line.split(" | ")[1].split(":")[0] for line in done.stderr.splitlines()} == {"skipped"}


def test_quiet_prints_the_result_only(trained) -> None:
    folder, _ = trained
    done = run_ok(folder, "resume", "nf-runs/run", "--executor", "inline", "--quiet")
    assert done.stderr == ""
    assert "chosen: exit" in done.stdout


def test_resume_takes_settings_of_the_cluster_only(trained) -> None:
    folder, _ = trained
    before = json.loads((folder / "nf-runs/run/run.json").read_text())
    where = ("--set", "cluster.executor=inline", "--set", "cluster.placement_timeout_s=5")
    done = run_ok(folder, "resume", "nf-runs/run", *where, "--quiet")
    assert "chosen: exit" in done.stdout
    assert json.loads((folder / "nf-runs/run/run.json").read_text())["fingerprint"] == before["fingerprint"]
    refused = run(folder, "resume", "nf-runs/run", "--set", "train.epochs=9")
    assert refused.returncode == 2
    assert "--set train.epochs=9" in refused.stderr


def test_train_with_other_settings_under_the_same_name_is_a_conflict(trained) -> None:
    folder, _ = trained
    done = run(folder, "train", *SMALL, "--epochs", "2")
    assert done.returncode == 2
    assert "train.epochs: there 1, here 2" in done.stderr


def test_status_of_a_finished_run_is_done_everywhere(trained) -> None:
    folder, _ = trained
    status = json.loads(run_ok(folder, "status", "nf-runs/run", "--json").stdout)
    assert {stage["state"] for stage in status["stages"]} == {status["state"]} == {"done"}
    assert status["fingerprint"] == json.loads((folder / "nf-runs/run/run.json").read_text())["fingerprint"]
    assert "block-000  done" in run_ok(folder, "status", "./nf-runs/run/").stdout


def test_gc_of_a_finished_run_leaves_it_whole(trained) -> None:
    folder, _ = trained
    listed = run_ok(folder, "gc", "nf-runs/run", "--dry-run").stdout
    assert "would delete" in listed
    deleted = run_ok(folder, "gc", "nf-runs/run").stdout
    assert deleted.replace("deleted", "would delete") == listed
    assert run_ok(folder, "gc", "nf-runs/run").stdout == "deleted 0 objects, 0 B\n"
    done = run_ok(folder, "resume", "nf-runs/run", "--executor", "inline")
    assert "started" not in done.stderr


def test_plan_predicts_the_peaks_of_the_run(trained) -> None:
    folder, _ = trained
    plan = json.loads(run_ok(folder, "plan", *SMALL, "--epochs", "1", "--json").stdout)
    planned = [(block["batch_size"], block["predicted_peak_bytes"]) for block in plan["blocks"]]
    blocks = read_summary(folder)["blocks"]
    assert planned == [(block["batch_size"], block["predicted_peak_bytes"]) for block in blocks]
    placement = plan["placement"]
    assert (placement["executor"], placement["address"], placement["device"]) == ("inline", None, "cpu")
    assert placement["workers_that_fit"] == [None] * len(plan["blocks"])
    assert all(needed <= plan["budget_bytes"] for needed in placement["block_memory_bytes"])
    assert [path.name for path in folder.iterdir()] == ["nf-runs"]


def test_budget_that_fits_nothing_ends_with_3_and_the_smallest_that_works(tmp_path: Path) -> None:
    done = run(tmp_path, "plan", *SMALL, "--memory-budget", "64KiB")
    assert done.returncode == 3
    smallest = re.search(r"Fix: --memory-budget (\d+)", done.stderr)
    assert smallest, done.stderr
    text = run_ok(tmp_path, "plan", *SMALL, "--memory-budget", smallest.group(1)).stdout
    assert "1/" in text and "in this process, device cpu" in text
    assert list(tmp_path.iterdir()) == []


def test_evaluate_lists_every_exit_and_marks_the_chosen_one(trained) -> None:
    folder, _ = trained
    rows = json.loads(run_ok(folder, "evaluate", "nf-runs/run", "--data", "digits", "--json").stdout)
    summary = read_summary(folder)
    assert [row["layer"] for row in rows] == [row["layer"] for row in summary["exits"]]
    assert [row["exit"] for row in rows if row["chosen"]] == [summary["chosen_exit"]]


def test_predict_writes_one_row_per_image(trained, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    import nf_pipeline

    folder, _ = trained
    images = Path(nf_pipeline.__file__).parent / "data" / "digits.parquet"
    output = tmp_path / "out.parquet"
    done = run_ok(folder, "predict", "nf-runs/run", str(images), "--output", str(output), "--json")
    assert json.loads(done.stdout)["rows"] == pq.read_table(output).num_rows == 1797


def test_predict_takes_a_column_and_skips_what_cannot_be_decoded(trained, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    import nf_pipeline

    folder, _ = trained
    digits = pq.read_table(Path(nf_pipeline.__file__).parent / "data" / "digits.parquet").slice(0, 4)
    cells = digits["image"].combine_chunks()
    broken = pa.array([{"bytes": b"junk", "path": None}] * 4, cells.type)
    pq.write_table(pa.table({"a": cells, "b": broken}), tmp_path / "in.parquet")
    common = ("predict", "nf-runs/run", str(tmp_path / "in.parquet"), "--output", str(tmp_path / "out.parquet"))
    unnamed = run(folder, *common)
    assert unnamed.returncode == 2
    assert "--image-column NAME" in unnamed.stderr
    assert run_ok(folder, *common, "--image-column", "a").stdout.startswith("4 predictions in ")
    assert run(folder, *common, "--image-column", "b").returncode == 2
    done = run_ok(folder, *common, "--image-column", "b", "--on-bad-image", "skip")
    assert done.stdout.startswith("0 predictions in ")
    assert "4 samples skipped" in done.stdout


def test_evaluate_takes_the_columns(trained, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    import nf_pipeline

    folder, _ = trained
    digits = pq.read_table(Path(nf_pipeline.__file__).parent / "data" / "digits.parquet")
    pq.write_table(digits.rename_columns(["picture", "digit"]), tmp_path / "in.parquet")
    common = ("evaluate", "nf-runs/run", "--data", str(tmp_path / "in.parquet"), "--json")
    assert "--label-column NAME" in run(folder, *common).stderr
    rows = json.loads(run_ok(folder, *common, "--image-column", "picture", "--label-column", "digit").stdout)
    assert rows == json.loads(run_ok(folder, "evaluate", "nf-runs/run", "--data", "digits", "--json").stdout)


def test_command_that_continues_a_run_can_be_pasted_into_a_shell() -> None:
    assert _continuing("./my runs/a", "vgg11_bn", False) == "nf-pipeline resume './my runs/a'"
    assert (
        _continuing("s3://b/a", "my.nets:make", True) == "nf-pipeline resume s3://b/a --model my.nets:make --repair"
    )
    assert _continuing("a", None, False, 3) == "nf-pipeline resume a --stop patience=3"
    assert _continuing("a", None, False, "never") == "nf-pipeline resume a --stop never"


def test_export_prints_where_it_wrote(trained, tmp_path: Path) -> None:
    folder, _ = trained
    target = tmp_path / "model.safetensors"
    done = run_ok(folder, "export", "nf-runs/run", "--format", "safetensors", "--output", str(target))
    assert Path(done.stdout.strip()).exists()


@pytest.mark.parametrize("executor", ["inline", pytest.param("ray", marks=pytest.mark.ray)])
def test_interrupted_train_finishes_its_epoch_and_ends_with_130_and_a_command_that_continues_it(
    tmp_path: Path, executor: str
) -> None:
    command = [sys.executable, "-m", "nf_pipeline", "train", *SMALL, "--epochs", "8", "--executor", executor]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tmp_path, start_new_session=True
    )
    seen = []
    for line in process.stderr:
        seen.append(line)
        if " | epoch " in line:
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does: everybody in the foreground gets it
            break
    rest = process.communicate(timeout=300)[1]
    assert process.returncode == 130, "".join(seen) + rest
    assert "Ctrl-C again stops at once" in rest
    assert " failed" not in rest
    lock = json.loads(next(tmp_path.glob("nf-runs/run/lock/*.json")).read_text())
    assert lock["is_released"]
    hint = re.search(r"continue with: nf-pipeline (resume \S+)", rest)
    assert hint, rest
    status = json.loads(run_ok(tmp_path, "status", "nf-runs/run", "--json").stdout)
    assert status["stages"][-1]["state"] == "waiting"
    done = run_ok(tmp_path, *hint.group(1).split(), "--executor", "inline")
    # The signal may arrive while a later block trains, or between two.
    assert "taken over from a checkpoint" in done.stderr or "block 1/3 | skipped" in done.stderr
    assert read_summary(tmp_path)["blocks"]
