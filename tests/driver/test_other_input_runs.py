"""Whole runs on what is no picture: tokens and volumes, by the networks that `sample_kinds` has for them."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from driver_config import DIGITS

from nf_pipeline.config import resolve_config
from nf_pipeline.driver.run import train
from nf_pipeline.storage.layout import RunLayout
from nf_pipeline.storage.manifest import read_manifest
from nf_pipeline.storage.shards import read_shard
from nf_pipeline.storage.store import open_store

NUM_SAMPLES = 300
CLASSES_N = np.random.default_rng(0).integers(0, 3, NUM_SAMPLES)


@pytest.fixture(autouse=True)
def _networks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "core"))
    monkeypatch.delitem(sys.modules, "sample_kinds", raising=False)


def tokens() -> pa.Array:
    """Texts of 20 tokens; the first ones tell the class."""
    random = np.random.default_rng(1)
    tokens_NL = random.integers(0, 50, (NUM_SAMPLES, 20))
    tokens_NL[:, :8] = CLASSES_N[:, None] * 10 + random.integers(0, 10, (NUM_SAMPLES, 8))
    return pa.array(tokens_NL.tolist(), pa.list_(pa.int32()))


def volumes() -> pa.Array:
    """Noise around a grey value that tells the class."""
    noise = np.random.default_rng(1).normal(size=(NUM_SAMPLES, 1, 4, 6, 4)) * 100
    return pa.FixedShapeTensorArray.from_numpy_ndarray(
        (noise + 300 * CLASSES_N[:, None, None, None, None]).astype(np.int16)
    )


def run_on(folder: Path, column: pa.Array, labels: pa.Array, **settings: Any) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table({"sample": column, "label": labels}), folder / "train.parquet")
    flags = {
        **DIGITS,
        "data.source": str(folder),
        "data.image_column": "sample",
        "data.max_train_images": None,
        "storage.uri": str(folder / "runs"),
        "storage.cache": "shards",
        "memory.max_batch_size": 16,
        "train.lr": 0.2,
        **{name.replace("__", "."): value for name, value in settings.items()},
    }
    return train(resolve_config(flags=flags))


@pytest.mark.parametrize(
    ("name", "column", "model", "context"),
    [
        ("words", tokens, "sample_kinds:words", "none"),
        ("words", tokens, "sample_kinds:words", "sample"),
        ("encoder", tokens, "sample_kinds:encoder", "none"),
        ("volumes", volumes, None, "none"),
        ("volumes", volumes, None, "sample"),
    ],
)
def test_run_learns_within_the_predicted_bytes(
    tmp_path: Path, name: str, column: Any, model: str | None, context: str
) -> None:
    settings = {"model__name": model, "memory__budget_bytes": "4MiB", "train__unit_layers": 2}
    settings |= {"train__context": context}
    if name == "volumes":
        settings |= {"memory__budget_bytes": "12MiB", "train__unit_layers": 3}
    summary = run_on(tmp_path / name, column(), pa.array(CLASSES_N), **settings, train__epochs=4)
    assert summary["val_accuracy"] > 0.6
    for block in summary["blocks"]:
        # Steps are of even sizes, which may all be a little below the batch that was planned.
        assert 0.998 <= block["predicted_peak_bytes"] / block["measured_peak_bytes"] < 1.1


def test_stored_activations_keep_values_as_they_were_given(tmp_path: Path) -> None:
    values_NK = np.random.default_rng(2).normal(100.0, 7.0, (NUM_SAMPLES, 2)).astype(np.float32)
    labels = pa.FixedSizeListArray.from_arrays(pa.array(values_NK.ravel()), 2)
    settings = {"model__name": "sample_kinds:words", "memory__budget_bytes": "90KiB", "train__unit_layers": 1}
    run_on(tmp_path / "values", tokens(), labels, **settings, train__epochs=1)
    store, layout = open_store(str(tmp_path / "values" / "runs")), RunLayout("run")
    stored = {}
    for key in (layout.ingest_manifest, layout.block_manifest(0)):
        manifest = read_manifest(store, key)
        shards = [read_shard(store, shard, manifest.spec) for shard in manifest.shards["train"]]
        ids_N = np.concatenate([shard.sample_ids for shard in shards])
        stored[manifest.stage] = np.concatenate([shard.labels for shard in shards])[ids_N.argsort()]
    ingested, cached = stored.values()
    np.testing.assert_array_equal(cached, ingested)
    assert 80 < cached.mean() < 120
