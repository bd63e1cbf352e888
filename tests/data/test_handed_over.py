import json
import subprocess
import sys
from importlib import resources

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from image_sets import encode, images, pixels_of, write_parquet
from local_ray import running_ray
from PIL import Image

from nf_pipeline import train
from nf_pipeline.config import resolve_config
from nf_pipeline.data import handed_over
from nf_pipeline.data.base import Unusable
from nf_pipeline.data.classes import read_labels
from nf_pipeline.data.decode import decode_image
from nf_pipeline.data.handed_over import drop_dataset, settle_dataset, with_dataset
from nf_pipeline.data.ingest import ingest
from nf_pipeline.data.sources import open_source
from nf_pipeline.errors import ConfigError, DataError, StorageError
from nf_pipeline.events import Note
from nf_pipeline.storage.layout import RunLayout
from nf_pipeline.storage.manifest import read_manifest
from nf_pipeline.storage.store import open_store

COLOURED = [np.random.default_rng(row).integers(0, 256, (5, 7, 3), np.uint8) for row in range(6)]


class Handing:
    """One run in one store, to which data sets are handed."""

    def __init__(self, uri, **flags):
        self.store, self.layout = open_store(str(uri)), RunLayout("run")
        flags = {"storage.uri": str(uri), "memory.budget_bytes": "4MiB", **flags}
        self.config = resolve_config(flags=flags)

    def hand(self, dataset):
        """Does what `train` does with its dataset."""
        self.config = with_dataset(self.config, dataset)
        return settle_dataset(self.store, self.layout, self.config, dataset)

    def source(self):
        return open_source(self.config.data)


@pytest.fixture
def handing(tmp_path):
    return Handing(tmp_path / "runs")


@pytest.fixture(scope="module")
def ray_data():
    with running_ray():
        import ray.data

        yield ray.data


def table_of(pixels, labels):
    return pa.table({"image": pa.array([encode(image) for image in pixels]), "label": pa.array(labels)})


def decoded(source, split="train"):
    """Returns a split's images as [H, W, C] and their labels, in stored order."""
    wanted = np.ones(source.num_rows(split), bool)
    pixels = [decode_image(cell).transpose(1, 2, 0) for _, cell in source.read(split, wanted, None)]
    return pixels, read_labels(source).by_split[split].tolist()


def assert_same_images(got, want):
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        np.testing.assert_array_equal(one, other if other.ndim == 3 else other[:, :, None])


def test_table_arrives_with_its_images_and_labels(handing):
    handing.hand(table_of(COLOURED, [0, 1, 2, 0, 1, 2]))

    pixels, labels = decoded(handing.source())

    assert_same_images(pixels, COLOURED)
    assert labels == [0, 1, 2, 0, 1, 2]


def samples_of(source):
    """Returns a source's tensors and labels, in stored order."""
    cells = [cell for _, cell in source.read("train", np.ones(source.num_rows("train"), bool), None)]
    return cells, source.labels("train").tolist()


def tensors_of(values, labels):
    return pa.table({"volume": pa.FixedShapeTensorArray.from_numpy_ndarray(values), "label": labels})


@pytest.mark.parametrize(
    ("labels", "want"),
    [
        (pa.array([0.5, 1.5, -2.0]), [[0.5], [1.5], [-2.0]]),
        (pa.array([[1, 2], [3, 4], [5, 6]]), [[1, 2], [3, 4], [5, 6]]),
        (pa.FixedShapeTensorArray.from_numpy_ndarray(np.eye(3, dtype=np.float32)), np.eye(3).tolist()),
        (pa.array(["b", "a", "b"]), [1, 0, 1]),
    ],
    ids=["floats", "lists", "tensors", "text"],
)
def test_tensors_arrive_with_their_numbers_and_values(handing, labels, want):
    values = np.random.default_rng(0).normal(size=(3, 2, 3, 4, 5)).astype(np.float32)

    handing.hand(tensors_of(values, labels))

    cells, got = samples_of(handing.source())
    np.testing.assert_array_equal(np.stack(cells), values)
    assert got == want


def test_bytes_of_many_channels_arrive_as_tensors(handing):
    values = np.random.default_rng(0).integers(0, 256, (3, 5, 8, 6), np.uint8)

    handing.hand(tensors_of(values, pa.array([0, 1, 0])))

    np.testing.assert_array_equal(np.stack(samples_of(handing.source())[0]), values)


def test_tokens_arrive_as_tokens(handing):
    handing.hand(
        pa.table({"tokens": pa.array([[1, 2], [3, 4], [5, 2**31 - 2]], pa.list_(pa.int64())), "label": [0, 1, 0]})
    )

    cells, _ = samples_of(handing.source())
    assert [cell.tolist() for cell in cells] == [[1, 2], [3, 4], [5, 2**31 - 2]]
    assert cells[0].dtype == np.int32


@pytest.mark.parametrize(
    ("column", "text"),
    [
        (pa.array([[1.0, 2.0], [np.nan, 0.0]]), "row 1, column 'input': the sample cannot be read: it holds NaN"),
        (pa.array([[1.0, 2.0], [0.0]]), r"row 1, column 'input': its shape is \(1,\), the first one's \(2,\)"),
        (pa.array([[1, 2], [-1, 0]]), "row 1, column 'input': token -1, want 0 to"),
        (pa.array([[[1, 2]], [[3, 4]]]), r"row 0, column 'input': int64 of shape \(1, 2\) would be tokens"),
    ],
    ids=["nan", "ragged", "negative", "rank"],
)
def test_tensor_that_cannot_be_handed_over_is_named(handing, column, text):
    with pytest.raises(DataError, match=f"dataset given as train, {text}"):
        handing.hand(pa.table({"input": column, "label": [0.5, 1.5]}))


@pytest.mark.parametrize("order", [["i", "t"], ["t", "i"]])
def test_images_and_tensors_are_not_mixed(handing, order):
    kinds = {"i": pa.array([encode(COLOURED[0])]), "t": pa.array([[1.0, 2.0]])}
    batches = iter([pa.record_batch({"input": kinds[kind], "label": pa.array([0.5])}) for kind in order])

    with pytest.raises(DataError, match=r"row 1, column 'input': it is one of the (images|tensors), and the first"):
        list(handed_over._tables(batches, handing.config.data, "x"))


def test_skipped_tensor_stays_a_row_that_ingest_counts_with_its_reason(tmp_path):
    handing = Handing(tmp_path / "runs", **{"data.on_bad_image": "skip"})
    rows = [[float(row), 0.5] for row in range(20)]
    rows[3], rows[5], rows[7] = [np.nan, 0.5], None, [1e300, 0.5]
    handing.hand(pa.table({"input": pa.array(rows, pa.list_(pa.float64())), "label": np.arange(20.0)}))

    cells, labels = samples_of(handing.source())
    assert [row for row, cell in enumerate(cells) if isinstance(cell, Unusable)] == [5]
    assert labels == [[float(row)] for row in range(20)]
    list(ingest(handing.store, handing.layout, handing.config, "00000001"))
    skipped = read_manifest(handing.store, handing.layout.ingest_manifest).facts["skipped"]
    reasons = {line.partition("row ")[2].partition(",")[0]: line for line in skipped}
    assert sorted(reasons) == ["3", "5", "7"]
    assert reasons["5"].endswith("it is null")
    assert all("it holds NaN, or numbers that are infinite" in reasons[row] for row in ("3", "7"))


def test_pyarrow_dataset_of_several_files_arrives_whole_and_keeps_no_other_column(handing, tmp_path):
    for part in range(3):
        write_parquet(tmp_path / f"{part}.parquet", images(4), ["b", "a", "b", "a"])
    named = [tmp_path / f"{part}.parquet" for part in range(3)]

    handing.hand(ds.dataset(named))

    source = handing.source()
    assert source.class_names == ("a", "b")
    assert source.labels("train").tolist() == [1, 0, 1, 0] * 3
    assert_same_images(decoded(source)[0], [pixels_of(value) for value in range(4)] * 3)


def test_mapping_of_splits_becomes_splits(handing):
    parts = {
        split: table_of(COLOURED[:size], [0, 1, 0, 1][:size])
        for split, size in [("test", 2), ("train", 4), ("val", 3)]
    }

    handing.hand(parts)

    source = handing.source()
    assert source.splits == ("train", "val", "test")
    assert [source.num_rows(split) for split in source.splits] == [4, 3, 2]


def test_large_dataset_is_cut_into_files_that_stay_small(handing, monkeypatch):
    monkeypatch.setattr(handed_over, "FILE_BYTES", 20_000)
    pixels = [np.random.default_rng(row).integers(0, 256, (30, 30), np.uint8) for row in range(100)]
    table = pa.table({"image": [b"P5 30 30 255\n" + image.tobytes() for image in pixels], "label": [0, 1] * 50})

    files = handing.hand(table)

    assert [file.key for file in files][:2] == ["run/dataset/train-00000.parquet", "run/dataset/train-00001.parquet"]
    assert sum(file.num_rows for file in files) == 100
    assert len(files) == 5
    assert max(file.num_bytes for file in files) < 22_000
    assert_same_images(decoded(handing.source())[0], pixels)


def test_image_larger_than_a_file_gets_one_of_its_own(handing, monkeypatch):
    monkeypatch.setattr(handed_over, "FILE_BYTES", 10)

    assert [file.num_rows for file in handing.hand(table_of(COLOURED[:3], [0, 1, 0]))] == [1, 1, 1]


@pytest.mark.parametrize(
    "labels",
    [
        pa.array([2, 0, 1], pa.int8()),
        pa.array([2, 0, 1], pa.uint64()),
        pa.array(["c", "a", "b"], pa.large_string()),
        pa.array(["c", "a", "b"]).dictionary_encode(),
    ],
    ids=lambda labels: str(labels.type),
)
def test_labels_of_every_type_keep_their_meaning(handing, labels):
    table = table_of(COLOURED[:3], [0, 0, 0]).set_column(1, "label", labels)

    handing.hand(table)

    assert decoded(handing.source())[1] == [2, 0, 1]


def test_class_names_of_hugging_face_survive(handing):
    features = {"label": {"names": ["ant", "bee"], "_type": "ClassLabel"}}
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode(), b"pandas": b"{}"}

    handing.hand(table_of(COLOURED[:2], [0, 1]).replace_schema_metadata(metadata))

    assert handing.source().class_names == ("ant", "bee")


def test_tensors_of_arrow_become_images(handing):
    flat = pa.array(np.concatenate([image.ravel() for image in COLOURED]))
    storage = pa.FixedSizeListArray.from_arrays(flat, COLOURED[0].size)
    tensors = pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(pa.uint8(), (5, 7, 3)), storage)

    handing.hand(pa.table({"pixels": tensors, "label": [0, 1] * 3}))

    assert_same_images(decoded(handing.source())[0], COLOURED)


def test_complete_copy_is_a_snapshot(handing):
    handing.hand(table_of(COLOURED[:2], [0, 1]))

    assert handing.hand(table_of(COLOURED, [0, 1] * 3)) == []
    assert handing.source().num_rows("train") == 2


def test_interrupted_copy_does_not_count_and_leaves_nothing_behind(handing, monkeypatch):
    monkeypatch.setattr(handed_over, "FILE_BYTES", 10)
    broken = table_of(COLOURED, [0, 1] * 3).set_column(0, "image", pa.array([encode(COLOURED[0])] * 5 + [b""]))
    with pytest.raises(DataError, match=r"row 5, column 'image': .* it has no bytes"):
        handing.hand(broken)
    assert len(handing.store.list("run/dataset")) == 4, "files that were finished before"

    with pytest.raises(DataError, match=r"its copy is not complete\nFix: call train\(config, dataset"):
        settle_dataset(handing.store, handing.layout, handing.config, None)
    handing.hand(table_of(COLOURED[:2], [0, 1]))

    assert handing.source().num_rows("train") == 2


def test_copy_that_lost_a_file_is_made_again(handing):
    (file,) = handing.hand(table_of(COLOURED, [0, 1] * 3))
    handing.store.delete([file.key])

    assert handing.hand(table_of(COLOURED, [0, 1] * 3)) == [file]


def test_dropped_copy_is_gone_and_ingested_data_is_not_copied_again(handing):
    handing.hand(table_of(COLOURED, [0, 1] * 3))
    handing.store.create(handing.layout.ingest_manifest, b"{}")

    drop_dataset(handing.store, handing.layout)

    assert [key for key, _ in handing.store.list("run")] == ["run/ingest/manifest.json"]
    assert handing.hand(table_of(COLOURED, [0, 1] * 3)) == []
    drop_dataset(handing.store, handing.layout)


class InterruptedTable(ds.InMemoryDataset):
    """A data set during whose reading something happens."""

    def to_batches(self, **_):
        self.happens()
        yield from super().to_batches()


def test_two_programs_that_write_the_same_copy_do_not_mix_it(handing):
    table = table_of(COLOURED, [0, 1] * 3)
    ours = InterruptedTable(table)
    ours.happens = lambda: Handing(handing.store.uri).hand({"train": table, "test": table})

    with pytest.raises(StorageError, match="is being written by another program"):
        handing.hand(ours)


def test_nothing_is_done_for_data_that_has_a_name(handing):
    assert with_dataset(handing.config, None) is handing.config
    assert settle_dataset(handing.store, handing.layout, handing.config, None) == []


def test_skipped_images_are_left_to_ingest_to_count(tmp_path):
    handing = Handing(tmp_path, **{"data.on_bad_image": "skip"})
    table = table_of(COLOURED[:3], [0, 1, 0]).set_column(0, "image", pa.array([None, encode(COLOURED[1]), b""]))

    handing.hand(table)

    assert pq.read_table(tmp_path / "run/dataset/train-00000.parquet")["image"].null_count == 2


@pytest.mark.parametrize(
    ("dataset", "error", "text"),
    [
        ([1, 2], ConfigError, "got builtins.list for train, want a ray.data.Dataset, a pyarrow.dataset.Dataset"),
        ({"training": None}, ConfigError, r"got the splits \['training'\], want train"),
        ({"test": table_of(COLOURED[:2], [0, 1])}, ConfigError, "want train and, if there are, val and test"),
        (table_of([], pa.array([], pa.int64())), DataError, "dataset given as train: it has no rows"),
        (table_of(COLOURED[:1], [0]).drop(["label"]), DataError, "dataset given as train: no label column"),
        (table_of(COLOURED[:1], [0]).drop(["image"]), DataError, "dataset given as train: no column holds images"),
        (table_of(COLOURED[:1], [True]), DataError, "column 'label': type bool, want whole numbers, text, or"),
        (table_of(COLOURED[:1], pa.array([2**63], pa.uint64())), DataError, "column 'label': .*not in range"),
    ],
    ids=["list", "unknown-split", "no-train", "no-rows", "no-label", "no-image", "bool-label", "huge-label"],
)
def test_unusable_dataset_is_an_error_that_says_so(handing, dataset, error, text):
    with pytest.raises(error, match=text) as caught:
        handing.hand(dataset)
    assert "\nFix: " in str(caught.value)


def test_dataset_beside_another_source_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.source: got './images', and a dataset object as well"):
        Handing(tmp_path, **{"data.source": "./images"}).hand(table_of(COLOURED[:2], [0, 1]))


def test_damaged_file_of_a_dataset_is_named(handing, tmp_path):
    write_parquet(tmp_path / "a.parquet", images(4), [0, 1, 0, 1])
    dataset = ds.dataset(tmp_path / "a.parquet")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 is no more")

    with pytest.raises(DataError, match=r"dataset given as train: cannot be read: .*a\.parquet"):
        handing.hand(dataset)


@pytest.fixture
def arrow_memory():
    """A memory pool of this test's own, which knows its peak."""
    before = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(before)
    pa.set_memory_pool(pool)
    yield pool
    pa.set_memory_pool(before)


def test_memory_does_not_grow_with_the_dataset(handing, tmp_path, monkeypatch, arrow_memory):
    monkeypatch.setattr(handed_over, "FILE_BYTES", 2**22)
    header, random = b"P5 512 512 255\n", np.random.default_rng(0)
    for number in range(6):
        encoded = [header + random.bytes(2**18) for _ in range(100)]
        table = pa.table({"image": encoded, "label": [0, 1] * 50})
        pq.write_table(table, tmp_path / f"{number}.parquet", row_group_size=20, compression="none")
    del encoded, table

    files = handing.hand(ds.dataset([tmp_path / f"{number}.parquet" for number in range(6)]))

    assert sum(file.num_bytes for file in files) > 150 * 2**20
    assert arrow_memory.max_memory() < 100 * 2**20


@pytest.mark.s3
@pytest.mark.parametrize("server", ["moto_uri", "minio_uri"])
def test_copy_in_object_storage_is_read_from_there(server, request):
    handing = Handing(request.getfixturevalue(server))

    handing.hand({"train": table_of(COLOURED, [0, 1] * 3), "test": table_of(COLOURED[:2], [0, 1])})

    source = handing.source()
    assert handing.config.data.source == f"{handing.store.uri}/run/dataset"
    assert source.splits == ("train", "test")
    assert_same_images(decoded(source)[0], COLOURED)
    drop_dataset(handing.store, handing.layout)
    assert handing.store.list("run") == []


def test_run_on_a_dataset_ends_without_its_copy_and_is_not_trained_again(tmp_path):
    digits = ds.dataset(str(resources.files("nf_pipeline.data") / "digits.parquet"))
    notes = []
    flags = {
        "storage.uri": str(tmp_path),
        "memory.budget_bytes": "4MiB",
        "data.max_train_images": 300,
        "train.epochs": 1,
        "cluster.executor": "inline",
        "cluster.num_threads": 1,
        "train.device": "cpu",
    }

    summary = train(resolve_config(flags=flags), dataset=digits)
    again = train(
        resolve_config(flags=flags),
        dataset=digits,
        on_event=lambda event: notes.append(event.text) if isinstance(event, Note) else None,
    )

    assert any("the dataset was not read" in note for note in notes)
    assert summary["num_classes"] == 10
    assert not (tmp_path / "run/dataset").exists()
    assert again["weights_checksum"] == summary["weights_checksum"]
    assert json.loads((tmp_path / "run/ingest/manifest.json").read_text())["facts"]["split_rows"]["train"] == 270


VARIED = [np.full((4 + row % 2, 7, 3), row, np.uint8) for row in range(6)]
GREY = [pixels_of(row) for row in range(6)]


def cells_of(ray_data, pixels):
    column = np.empty(len(pixels), object)
    column[:] = pixels

    def look_up(batch):
        return {"picture": column[batch["id"]], "label": batch["id"] % 2}

    return ray_data.range(len(pixels), override_num_blocks=2).map_batches(look_up)


RAY_DATASETS = {
    "numpy": (
        COLOURED,
        lambda ray_data: ray_data.from_numpy(np.stack(COLOURED)).add_column("label", lambda b: np.arange(len(b)) % 2),
    ),
    "items": (
        COLOURED,
        lambda ray_data: ray_data.from_items([{"x": i, "label": row % 2} for row, i in enumerate(COLOURED)]),
    ),
    "grey": (GREY, lambda ray_data: ray_data.from_items([{"x": i, "label": row % 2} for row, i in enumerate(GREY)])),
    "encoded": (
        COLOURED,
        lambda ray_data: ray_data.from_items([{"x": encode(i), "label": row % 2} for row, i in enumerate(COLOURED)]),
    ),
    "sizes-differ": (VARIED, lambda ray_data: cells_of(ray_data, VARIED)),
    "sizes-differ-between-blocks": (
        VARIED,
        lambda ray_data: ray_data.from_items([{"x": i, "label": row % 2} for row, i in enumerate(VARIED)]),
    ),
}


@pytest.mark.ray
@pytest.mark.parametrize("kind", RAY_DATASETS)
def test_ray_dataset_arrives_with_its_images(handing, ray_data, kind):
    want, make = RAY_DATASETS[kind]

    handing.hand(make(ray_data))

    pixels, labels = decoded(handing.source())
    order = sorted(range(len(pixels)), key=lambda row: pixels[row].tobytes())
    want_order = sorted(range(len(want)), key=lambda row: want[row].tobytes())
    assert_same_images([pixels[row] for row in order], [want[row] for row in want_order])
    assert [labels[row] for row in order] == [row % 2 for row in want_order]


@pytest.mark.ray
def test_images_read_and_changed_by_ray_arrive(handing, ray_data, tmp_path):
    for row, pixels in enumerate(COLOURED):
        folder = tmp_path / "ab"[row % 2]
        folder.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{row}.png")

    def label(row):
        return {"image": 255 - row["image"], "label": row["path"].split("/")[-2]}

    handing.hand({"train": ray_data.read_images(str(tmp_path), include_paths=True).map(label)})

    source = handing.source()
    assert source.class_names == ("a", "b")
    pixels, labels = decoded(source)
    assert {image.tobytes() for image in pixels} == {(255 - image).tobytes() for image in COLOURED}
    assert sorted(labels) == [0, 0, 0, 1, 1, 1]


@pytest.mark.ray
@pytest.mark.parametrize(
    ("row", "text"),
    [
        (None, "dataset given as train: it has no rows"),
        ({"image": np.zeros((4, 4), bool), "label": 0}, "no column holds images; it has 'image' .*dtype=bool"),
        ({"image": np.zeros((4, 4), np.uint8), "kind": 0}, "no label column"),
        ({"image": np.zeros((7, 4, 2), np.uint8), "label": 0}, r"uint8 of shape \(7, 4, 2\): .* could be last"),
        ({"image": Image.fromarray(GREY[0]), "label": 0}, "no column holds images; it has .*pickled"),
    ],
    ids=["no-rows", "bool-images", "no-label", "shape", "objects"],
)
def test_unusable_ray_dataset_is_an_error_that_says_so(handing, ray_data, row, text):
    rows = ray_data.range(3).filter(lambda _: False) if row is None else ray_data.from_items([row])

    with pytest.raises(DataError, match=text):
        handing.hand(rows)


@pytest.mark.ray
@pytest.mark.parametrize("pixels", [COLOURED, VARIED], ids=["one-shape", "shapes-differ"])
def test_tensors_that_ray_wrote_to_parquet_are_read_without_ray(ray_data, tmp_path, pixels):
    cells_of(ray_data, pixels).write_parquet(str(tmp_path / "written"))
    program = """if True:
        import sys
        import numpy as np
        from nf_pipeline.config import DataConfig
        from nf_pipeline.data.decode import decode_image
        from nf_pipeline.data.sources import open_source
        source = open_source(DataConfig(source=sys.argv[1]))
        images = [decode_image(cell) for _, cell in source.read("train", np.ones(6, bool), None)]
        assert "ray" not in sys.modules
        print(*sorted(f"{image.shape}{image.sum()}" for image in images), sep=";")
    """

    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "written")], capture_output=True, text=True, timeout=120
    )

    want = sorted(f"{image.transpose(2, 0, 1).shape}{image.sum()}" for image in pixels)
    assert done.stdout.strip() == ";".join(want), done.stderr
