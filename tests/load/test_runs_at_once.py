"""Ten runs on one store at the same time: none sees the others, all end with the same weights."""

from pathlib import Path

import pytest
from run_processes import train_at_once

from nf_pipeline.driver.status import read_status
from nf_pipeline.storage.store import open_store

NAMES = [f"run-{idx}" for idx in range(10)]
SMALL = {
    "model__name": "deep_networks:shallow",
    "data__max_train_images": 60,
    "train__unit_layers": 1,
    "memory__budget_bytes": "200KiB",
    "memory__join_threshold": 0.0,  # layers that take different batches: two blocks
}


@pytest.fixture
def local_uri(tmp_path: Path) -> str:
    return str(tmp_path)


@pytest.mark.parametrize(
    "place",
    [
        "local_uri",
        pytest.param("minio_uri", marks=pytest.mark.s3),
        pytest.param("moto_uri", marks=[pytest.mark.s3, pytest.mark.slow]),
    ],
)
def test_ten_runs_at_once_on_one_store_all_end_right(place: str, request: pytest.FixtureRequest) -> None:
    store = request.getfixturevalue(place)
    summaries = train_at_once(NAMES, store, **SMALL)
    assert [summary["run"] for summary in summaries] == NAMES
    assert len({summary["weights_checksum"] for summary in summaries}) == 1
    assert all(len(summary["blocks"]) == 2 for summary in summaries)
    assert {read_status(f"{store}/{name}")["state"] for name in NAMES} == {"done"}
    sizes = [{key.partition("/")[2].split("/")[0] for key, _ in open_store(store).list(name)} for name in NAMES]
    assert all(names == sizes[0] for names in sizes)
