"""Ray Data -> training -> batch inference on one local Ray, run as a person would."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from nf_pipeline.driver.status import read_status

pytestmark = pytest.mark.ray

SCRIPT = Path(__file__).parent.parent.parent / "workflows" / "ray_data_chain.py"


def run_chain(folder, *arguments):
    command = [sys.executable, str(SCRIPT), "--store", str(folder / "runs"), "--output", str(folder / "predictions")]
    return subprocess.run(
        [*command, "--epochs", "2", *arguments], capture_output=True, text=True, timeout=400, cwd=folder
    )


def test_chain_ends_with_predictions_of_every_usable_image(tmp_path):
    random = np.random.default_rng(0)
    for label, channel in ((" Red", 0), ("blue", 2)):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for number in range(40):
            pixels = random.integers(0, 60, (12, 10 + number % 3, 3), np.uint8)
            pixels[:, :, channel] += 150
            Image.fromarray(pixels).save(tmp_path / "photos" / label / f"{number}.png")
    Image.new("RGB", (12, 12)).save(tmp_path / "photos" / "blue" / "empty.png")

    done = run_chain(tmp_path, "--data", str(tmp_path / "photos"), "--images")

    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["run"] == "ray-data-chain"
    table = pq.read_table(tmp_path / "predictions")
    assert set(table.column_names) == {"id", "label", "prediction", "label_idx", "probability"}
    rows = table.to_pylist()
    assert len({row["id"] for row in rows}) == len(rows) == 80, "the empty image was left out"
    assert {row["label"] for row in rows} == {row["prediction"] for row in rows} == {"red", "blue"}
    assert sum(row["label"] == row["prediction"] for row in rows) > 70
    assert all(0.5 <= row["probability"] <= 1.0 for row in rows)
    assert read_status(f"{tmp_path}/runs/ray-data-chain")["state"] == "done"
    assert not (tmp_path / "runs/ray-data-chain/dataset").exists()


def test_chain_that_cannot_run_says_what_to_change(tmp_path):
    done = run_chain(tmp_path, "--memory-budget", "plenty")

    assert done.returncode == 2
    assert done.stderr.startswith("Error: configuration: memory.budget_bytes: got 'plenty'")
    assert "Fix: " in done.stderr
