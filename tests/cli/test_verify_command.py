"""`verify` and `resume --repair` as a person runs them, in this process."""

import json
from pathlib import Path

import pytest

from nf_pipeline.cli import main

TRAIN = (
    "train --executor inline --device cpu --memory-budget 4MiB --max-train-images 150 --epochs 1 "
    "--set cluster.num_threads=1 --quiet --store"
)


def test_damaged_run_is_verified_repaired_and_whole_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uri = f"{tmp_path}/run"
    assert main([*TRAIN.split(), str(tmp_path)]) == 0
    capsys.readouterr()
    assert main(["verify", uri]) == 0
    assert "whole: every byte is as it was written" in capsys.readouterr().out
    plan = tmp_path / "run" / "plan.json"
    plan.write_bytes(plan.read_bytes().replace(b'"batch_size": ', b'"batch_size": 1', 1))
    weights = next((tmp_path / "run" / "blocks" / "000").rglob("weights.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    assert main(["verify", uri]) == 4
    out = capsys.readouterr().out
    assert f"2 damaged; to repair: nf-pipeline resume {uri} --repair" in out
    assert "plan: run/plan.json is damaged: checksum: got" in out
    assert main(["verify", uri, "--json"]) == 4
    report = json.loads(capsys.readouterr().out)
    assert not report["is_whole"]
    assert [problem["stage"] for problem in report["problems"]] == ["plan", "block-000"]
    assert main(["resume", uri]) == 4
    assert f"Fix: nf-pipeline resume {uri} --repair" in capsys.readouterr().err
    assert main(["resume", uri, "--repair"]) == 0
    assert "repair: " in capsys.readouterr().err
    assert main(["verify", uri]) == 0


def test_run_that_is_not_there_ends_with_the_exit_code_of_storage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", f"{tmp_path}/absent"]) == 4
    assert "there is no run 'absent'" in capsys.readouterr().err
