"""Parquet files whose pages are large are not all open at the same time."""

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nf_pipeline.config import DataConfig
from nf_pipeline.data import parquet
from nf_pipeline.data.base import RawImage
from nf_pipeline.data.sources import open_source

NUM_FILES, ROWS_PER_FILE = 4, 200
IMAGE_BYTES = 64


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for file in range(NUM_FILES):
        images = [np.random.default_rng(row).bytes(IMAGE_BYTES) for row in range(ROWS_PER_FILE)]
        table = pa.table({"image": images, "label": [row % 2 for row in range(ROWS_PER_FILE)]})
        pq.write_table(table, tmp_path / f"part-{file}.parquet", row_group_size=ROWS_PER_FILE)
    return tmp_path


def keep_order(images: Iterable[RawImage], *_: Any) -> Iterator[RawImage]:
    yield from images


def count_changes_of_file(folder: Path) -> int:
    source = open_source(DataConfig(source=str(folder)))
    rows = [image.row for image in source.read("train", np.ones(NUM_FILES * ROWS_PER_FILE, bool), seed=0)]
    assert sorted(rows) == list(range(NUM_FILES * ROWS_PER_FILE))
    files = [row // ROWS_PER_FILE for row in rows]
    return sum(before != after for before, after in itertools.pairwise(files))


def test_row_groups_take_turns_only_as_long_as_their_pages_fit_memory(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "shuffle_window", keep_order)
    assert count_changes_of_file(folder) > NUM_FILES - 1
    monkeypatch.setattr(parquet, "_LOCAL_OPEN_BYTES", ROWS_PER_FILE * IMAGE_BYTES)
    assert count_changes_of_file(folder) == NUM_FILES - 1, "one after the other"
