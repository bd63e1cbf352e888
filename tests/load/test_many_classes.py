"""Data sets of thousands of classes: heads as wide as there are classes, tables as long."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from load_config import make_config

from nf_pipeline import plan, train
from nf_pipeline.config import RunConfig
from nf_pipeline.driver.use import predict
from nf_pipeline.errors import PlanError

SIDE = 8
ROWS_PER_CLASS = 3
MODEL = "deep_networks:shallow"


def write_classes(folder: Path, num_classes: int) -> Path:
    """Writes tiny grey images of noise with the names of their classes."""
    num_rows = ROWS_PER_CLASS * num_classes
    pixels = np.random.default_rng(0).integers(0, 255, (num_rows, SIDE, SIDE), np.uint8)
    images = pa.FixedShapeTensorArray.from_numpy_ndarray(pixels)
    names = [f"class {row % num_classes:06d}" for row in range(num_rows)]
    folder.mkdir()
    pq.write_table(pa.table({"image": images, "label": names}), folder / "data.parquet")
    return folder


def classes_config(tmp_path: Path, num_classes: int, budget: int | str) -> RunConfig:
    return make_config(
        tmp_path / "runs",
        data__source=str(write_classes(tmp_path / "data", num_classes)),
        model__name=MODEL,
        memory__budget_bytes=budget,
        train__unit_layers=1,
    )


@pytest.mark.parametrize("num_classes", [2000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_run_of_thousands_of_classes_trains_and_predicts_their_names(tmp_path: Path, num_classes: int) -> None:
    config = classes_config(tmp_path, num_classes, num_classes * 8192)
    summary = train(config)
    assert summary["num_classes"] == num_classes
    output = tmp_path / "predictions.parquet"
    predict(f"{tmp_path}/runs/run", str(tmp_path / "data"), str(output), model=MODEL)
    predictions = pq.read_table(output)
    assert predictions.num_rows == ROWS_PER_CLASS * num_classes
    labels = predictions.column("label").to_numpy()
    assert predictions.column("class_name").to_pylist() == [f"class {label:06d}" for label in labels]


def test_budget_too_small_for_thousands_of_classes_names_one_that_suffices(tmp_path: Path) -> None:
    config = classes_config(tmp_path, 2000, "64KiB")
    with pytest.raises(PlanError) as caught:
        plan(config)
    smallest = caught.value.smallest_budget_bytes
    assert smallest > 2000 * 8 * 4 * 3, "weights, gradients and momentum of the widest head"
    enough = config.model_copy(update={"memory": config.memory.model_copy(update={"budget_bytes": smallest})})
    assert all(block.predicted_peak_bytes <= smallest for block in plan(enough).blocks)
