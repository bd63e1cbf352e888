"""Rates of stores: measured on real ones, and nothing is left behind."""

import time
from pathlib import Path

import pytest

from nf_pipeline.config import RunConfig
from nf_pipeline.errors import StorageError
from nf_pipeline.storage.bandwidth import NUM_SHARDS, SMALL_BYTES, measure_for, measure_rates
from nf_pipeline.storage.local import LocalStore
from nf_pipeline.storage.store import Data, Store, open_store

PREFIX = "run/plan/attempt-x"


class SlowStore(LocalStore):
    """A folder that takes a fixed time for every object."""

    def get(self, key: str) -> Data:
        time.sleep(0.2)
        return super().get(key)

    def put(self, key: str, data: Data) -> None:
        time.sleep(0.3)
        super().put(key, data)


class FailingStore(LocalStore):
    """A folder that takes two objects and no more."""

    def put(self, key: str, data: Data) -> None:
        if len(self.list("run")) >= 2:
            raise StorageError("the disk is full")
        super().put(key, data)


def test_folder_is_measured_and_left_as_it_was(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    rates = measure_rates(store, PREFIX)
    assert min(rates.read_bytes_per_s, rates.write_bytes_per_s) > 2**20
    assert 0 < rates.read_cpu_s_per_byte < 1e-6
    assert store.list("") == []


def test_rates_are_those_of_a_slow_store(tmp_path: Path) -> None:
    rates = measure_rates(SlowStore(str(tmp_path)), PREFIX)
    # Two threads write four objects in 0.6 s at least, and read them in 0.4 s.
    assert rates.write_bytes_per_s < NUM_SHARDS * SMALL_BYTES / 0.6
    assert rates.read_bytes_per_s < NUM_SHARDS * SMALL_BYTES / 0.4


def test_failed_measuring_leaves_nothing(tmp_path: Path) -> None:
    store = FailingStore(str(tmp_path))
    with pytest.raises(StorageError, match="the disk is full"):
        measure_rates(store, PREFIX)
    assert store.list("") == []


@pytest.mark.s3
def test_s3_is_measured_and_left_as_it_was(minio_uri: str) -> None:
    store: Store = open_store(minio_uri)
    assert measure_rates(store, PREFIX).read_bytes_per_s > 2**16
    assert store.list("run") == []


def test_store_is_not_measured_for_a_plan_without_timings(tmp_path: Path) -> None:
    config = RunConfig.model_validate({"memory": {"budget_bytes": 1}, "train": {"unit_layers": 2}})
    assert measure_for(config, FailingStore(str(tmp_path)), PREFIX) is None
