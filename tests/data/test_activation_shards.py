import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from local_ray import running_ray

from nf_pipeline import train
from nf_pipeline.config import resolve_config
from nf_pipeline.core.dtypes import TORCH_DTYPES
from nf_pipeline.data import ActivationShards
from nf_pipeline.driver.run_record import load_plan
from nf_pipeline.errors import ConfigError, DataError, ObjectCorrupt, ObjectMissing
from nf_pipeline.storage.layout import RunLayout
from nf_pipeline.storage.manifest import read_manifest
from nf_pipeline.storage.reader import ShardReader
from nf_pipeline.storage.store import open_store


def trained(store_uri, dtype, **data):
    flags = {
        "run": dtype,
        "storage.uri": store_uri,
        "storage.dtype": dtype,
        "storage.shard_bytes": "64KiB",
        "memory.budget_bytes": "4MiB",
        "data.max_train_images": 300,
        "train.epochs": 1,
        "train.unit_layers": 2,
        "storage.cache": "shards",
        "cluster.executor": "inline",
        "cluster.num_threads": 1,
        "train.device": "cpu",
        **data,
    }
    train(resolve_config(flags=flags))
    return f"{store_uri}/{dtype}"


@pytest.fixture(scope="module", params=["float16", "bfloat16", "uint8"])
def run(request, tmp_path_factory):
    """A run whose activations are stored in either type."""
    return trained(str(tmp_path_factory.mktemp("runs")), request.param)


def read_back(uri, split):
    """Returns the first block's activations by sample id, as training reads them."""
    store_uri, _, run = uri.rpartition("/")
    store = open_store(store_uri)
    manifest = read_manifest(store, RunLayout(run).block_manifest(0))
    reader = ShardReader(store, manifest.shards[split], manifest.spec, batch_size=64)
    rows = {}
    for batch in reader.batches(seed=0, epoch=0, shuffle=False):
        numbers = torch.from_numpy(batch.tensors).view(TORCH_DTYPES[manifest.spec.dtype]).float().numpy()
        if manifest.spec.dtype == "uint8":
            numbers = manifest.spec.affine.decode(batch.tensors.reshape(-1, *manifest.spec.shape))
        for sample_id, label, row in zip(batch.sample_ids, batch.labels, numbers, strict=True):
            rows[int(sample_id)] = (label.tolist(), row.reshape(manifest.spec.shape))
    return rows


def assert_same_rows(batch, want):
    assert len(batch["sample_id"]) == len(want)
    for sample_id, label, tensor in zip(batch["sample_id"], batch["label"], batch["tensor"], strict=True):
        assert label.tolist() == want[sample_id][0]
        np.testing.assert_array_equal(tensor.astype(np.float32), want[sample_id][1])


def numpy_batch(paths):
    table = pq.read_table(paths)
    return {name: table[name].to_numpy() for name in table.column_names}


def test_decoded_shards_equal_what_training_reads(run):
    for split in ("train", "val"):
        shards = ActivationShards(run, 0, split)
        batch = shards.decode(numpy_batch(shards.paths))
        assert batch["tensor"].shape == (shards.num_rows, *shards.spec.shape)
        assert batch["tensor"].dtype == (np.float16 if shards.spec.dtype == "float16" else np.float32)
        assert_same_rows(batch, read_back(run, split))


def test_values_to_predict_are_decoded_beside_the_activations(tmp_path):
    run = trained(str(tmp_path), "float16", **{"data.target": "values"})
    shards = ActivationShards(run, 0)

    batch = shards.decode(numpy_batch(shards.paths))

    assert (batch["label"].dtype, batch["label"].shape) == (np.float32, (shards.num_rows, 1))
    assert_same_rows(batch, read_back(run, "train"))
    assert np.array_equal(np.unique(batch["label"]), np.arange(10))


def test_paths_are_the_manifests_shards_in_order(run):
    shards = ActivationShards(run, 0, "train")

    assert len(shards.paths) > 1
    assert shards.paths == sorted(shards.paths)
    assert all(os.path.isabs(path) and os.path.isfile(path) for path in shards.paths)


def test_batch_of_other_bytes_is_refused(run):
    shards = ActivationShards(run, 0)
    with pytest.raises(DataError, match=rf"2 rows have 6 bytes, want {shards.spec.nbytes} each"):
        shards.decode({"tensor": np.array([b"abc", b"def"], object)})
    with pytest.raises(DataError, match=r"missing column 'tensor'; it has \['label'\]"):
        shards.decode({"label": np.arange(2)})


def test_shards_that_are_not_there_are_an_error(run):
    store_uri, _, name = run.rpartition("/")
    last = len(load_plan(open_store(store_uri), RunLayout(name)).blocks) - 1
    with pytest.raises(
        ConfigError, match=f"block {last} of run '{name}' stores no activations of split train, it has: none"
    ):
        ActivationShards(run, last)
    with pytest.raises(ConfigError, match="stores no activations of split test, it has: train, val"):
        ActivationShards(run, 0, "test")
    with pytest.raises(ConfigError, match="split: got 'training', want one of train, val, test"):
        ActivationShards(run, 0, "training")
    with pytest.raises(ObjectMissing, match=r"blocks/007/manifest\.json"):
        ActivationShards(run, 7)


def test_damaged_shards_are_named_and_the_error_offers_a_repair(run, tmp_path):
    store_uri, _, name = run.rpartition("/")
    copy = f"{shutil.copytree(store_uri, tmp_path / 'copy')}/{name}"
    shards = ActivationShards(copy, 0)
    shards.verify()
    path = Path(shards.paths[-1])
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ObjectCorrupt, match=path.name) as caught:
        ActivationShards(copy, 0).verify()
    assert "--repair" in caught.value.fix
    path.write_bytes(data[:-1])
    with pytest.raises(ObjectCorrupt, match=rf"{path.name}: got {len(data) - 1} bytes"):
        ActivationShards(copy, 0)


def test_pickled_shards_decode_where_the_store_is_not(run, tmp_path):
    shards = ActivationShards(run, 0)
    batch = {"tensor": pa.array([bytes(shards.spec.nbytes)] * 2).to_numpy(zero_copy_only=False)}

    there = pickle.loads(pickle.dumps(shards))

    assert not there.decode(batch)["tensor"].any()
    assert str(there.num_rows) in repr(there)


@pytest.mark.ray
@pytest.mark.s3
def test_ray_reads_the_same_numbers_from_folders_and_object_storage(moto_uri, tmp_path):
    uris = [trained(str(tmp_path), "float16"), trained(moto_uri, "bfloat16")]
    with running_ray():
        for uri in uris:
            batches = list(ActivationShards(uri, 0, "val").to_ray().iter_batches(batch_format="numpy"))
            merged = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
            assert_same_rows(merged, read_back(uri, "val"))
