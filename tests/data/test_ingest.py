import subprocess
import sys

import numpy as np
import pytest
from cifar10 import require_cifar10
from image_sets import encode, images, make_config, pixels_of, write_parquet

from nf_pipeline.data.held_out import UNKNOWN, decode_labels
from nf_pipeline.data.ingest import ingest, ingest_fingerprint
from nf_pipeline.data.sources import open_source
from nf_pipeline.errors import AlreadyExists, DataError
from nf_pipeline.events import Note, Progress, StageDone, StageStarted
from nf_pipeline.storage.layout import RunLayout
from nf_pipeline.storage.manifest import read_manifest, read_object, verify_manifest
from nf_pipeline.storage.shards import read_shard
from nf_pipeline.storage.store import open_store

LAYOUT = RunLayout("run")


def run_ingest(tmp_path, cfg, name="store", attempt="00000001"):
    store = open_store(str(tmp_path / name))
    events = list(ingest(store, LAYOUT, cfg, attempt))
    return store, events, read_manifest(store, LAYOUT.ingest_manifest)


def rows_of(store, manifest, split):
    shards = [read_shard(store, info, manifest.spec) for info in manifest.shards[split]]
    fields = ("tensors", "labels", "sample_ids")
    return tuple(np.concatenate([getattr(shard, field) for shard in shards]) for field in fields)


def held_out_labels_of(store, manifest, ids):
    return decode_labels(read_object(store, manifest.objects[0])).of(ids)


def write_labelled(folder, num=100, num_classes=5, **options):
    """Row i holds an image filled with i and the label i % num_classes."""
    write_parquet(folder / "set.parquet", images(num), [row % num_classes for row in range(num)], **options)


def test_digits_become_three_splits_with_all_images_and_labels(tmp_path):
    store, events, manifest = run_ingest(tmp_path, make_config("digits"))

    assert manifest.facts["split_rows"] == {"train": 1455, "val": 162, "test": 180}
    assert manifest.spec.shape == (1, 8, 8)
    assert verify_manifest(store, manifest) == []
    ids = np.concatenate([rows_of(store, manifest, split)[2] for split in ("train", "val", "test")])
    assert sorted(ids) == list(range(1797))
    assert isinstance(events[0], StageStarted)
    assert isinstance(events[-1], StageDone) and events[-1].result == manifest.facts


def test_every_row_keeps_its_own_label_and_pixels(tmp_path):
    write_labelled(tmp_path / "in")

    store, _, manifest = run_ingest(tmp_path, make_config(tmp_path / "in"))

    for split in ("train", "val", "test"):
        tensors, labels, ids = rows_of(store, manifest, split)
        if split == "test":
            labels = held_out_labels_of(store, manifest, ids)
        np.testing.assert_array_equal(labels, ids % 5)
        np.testing.assert_array_equal(tensors, np.repeat(ids.astype(np.uint8)[:, None], 36, axis=1))


def test_shards_of_the_test_split_hold_no_label_and_those_of_others_hold_theirs(tmp_path):
    store, _, manifest = run_ingest(tmp_path, make_config("digits"))

    assert set(rows_of(store, manifest, "test")[1]) == {UNKNOWN}
    for split in ("train", "val"):
        assert set(rows_of(store, manifest, split)[1]) == set(range(10))


def test_mean_and_std_are_those_of_the_stored_train_split(tmp_path):
    store, _, manifest = run_ingest(tmp_path, make_config("digits"))
    stored = rows_of(store, manifest, "train")[0]

    np.testing.assert_allclose(manifest.facts["inputs"]["mean"], [stored.mean()])
    np.testing.assert_allclose(manifest.facts["inputs"]["std"], [stored.std()])


def test_same_seed_stores_the_same_bytes_whatever_the_threads(tmp_path):
    cfg = make_config("digits", decode_threads=1)
    threaded = make_config("digits", decode_threads=7)

    first, again = (run_ingest(tmp_path, one, name)[2] for one, name in ((cfg, "a"), (threaded, "b")))

    assert first.content_checksum == again.content_checksum
    assert first.fingerprint == again.fingerprint


def test_another_seed_stores_another_order_and_cut(tmp_path):
    cfg = make_config("digits")
    other = cfg.model_copy(update={"train": cfg.train.model_copy(update={"seed": 1})})

    first, second = (run_ingest(tmp_path, one, name)[2] for one, name in ((cfg, "a"), (other, "b")))

    assert first.content_checksum != second.content_checksum
    assert first.fingerprint != second.fingerprint


def test_small_shards_hold_the_same_rows(tmp_path):
    cfg = make_config("digits")
    small = cfg.model_copy(update={"storage": cfg.storage.model_copy(update={"shard_bytes": 4096})})

    store, _, manifest = run_ingest(tmp_path, small)

    assert len(manifest.shards["train"]) == -(-1455 // 64)
    assert len(rows_of(store, manifest, "train")[2]) == 1455


def test_given_splits_are_kept(tmp_path):
    for name, num in (("train", 40), ("validation", 12), ("test", 8)):
        write_parquet(tmp_path / f"in/{name}.parquet", images(num), [row % 4 for row in range(num)])

    store, _, manifest = run_ingest(tmp_path, make_config(tmp_path / "in"))

    assert manifest.facts["split_rows"] == {"train": 40, "val": 12, "test": 8}
    assert sorted(rows_of(store, manifest, "val")[2]) == list(range(40, 52))
    assert sorted(rows_of(store, manifest, "test")[2]) == list(range(52, 60))


def test_images_outside_the_subset_are_never_decoded(tmp_path):
    labels = [row % 2 for row in range(100)]
    write_parquet(tmp_path / "in/test.parquet", images(10), labels[:10])
    write_parquet(tmp_path / "in/train.parquet", images(100), labels)
    cfg = make_config(tmp_path / "in", max_train_images=20)
    store, _, manifest = run_ingest(tmp_path, cfg)
    used = {int(row) for split in ("train", "val") for row in rows_of(store, manifest, split)[2]}
    junk = [image if row in used else b"junk" for row, image in enumerate(images(100))]
    write_parquet(tmp_path / "in/train.parquet", junk, labels)

    _, _, again = run_ingest(tmp_path, cfg, "again")

    assert len(used) == 20
    assert again.facts["split_rows"] == {"train": 18, "val": 2, "test": 10}
    assert again.shards["train"][0].checksum == manifest.shards["train"][0].checksum


def test_an_undecodable_image_is_refused_with_file_row_and_column(tmp_path):
    cells = images(30)
    cells[17] = b"no image"
    write_parquet(tmp_path / "in/train-00001.parquet", cells, [row % 3 for row in range(30)])

    with pytest.raises(DataError, match=r"train-00001.parquet, row 17, column 'image': .*cannot be read") as caught:
        run_ingest(tmp_path, make_config(tmp_path / "in"))
    assert "--on-bad-image skip" in str(caught.value)
    assert read_manifest(open_store(str(tmp_path / "store")), LAYOUT.ingest_manifest) is None


def test_a_null_image_is_refused_with_file_row_and_column(tmp_path):
    cells = [None if row == 5 else image for row, image in enumerate(images(30))]
    write_parquet(tmp_path / "in/a.parquet", cells, [row % 3 for row in range(30)])

    with pytest.raises(DataError, match=r"a.parquet, row 5, column 'image': .*it is null"):
        run_ingest(tmp_path, make_config(tmp_path / "in"))


def test_skipping_counts_and_lists_what_it_left_out(tmp_path):
    cells = [b"junk" if row in (0, 17) else image for row, image in enumerate(images(60))]
    write_parquet(tmp_path / "in/a.parquet", cells, [row % 3 for row in range(60)])

    store, events, manifest = run_ingest(tmp_path, make_config(tmp_path / "in", on_bad_image="skip"))

    assert manifest.facts["num_skipped"] == 2
    assert sum(manifest.facts["split_rows"].values()) == 58
    assert sorted(line.split(":")[0] for line in manifest.facts["skipped"]) == [
        "a.parquet, row 0, column 'image'",
        "a.parquet, row 17, column 'image'",
    ]
    (note,) = [event for event in events if isinstance(event, Note)]
    assert note.level == "warning" and note.text.startswith("2 samples skipped")
    assert {0, 17}.isdisjoint(rows_of(store, manifest, "train")[2].tolist())


def test_skipping_all_images_of_a_class_is_an_error(tmp_path):
    cells = [b"junk" if row % 3 == 2 else image for row, image in enumerate(images(60))]
    write_parquet(tmp_path / "in/a.parquet", cells, [row % 3 for row in range(60)])

    with pytest.raises(DataError, match=r"class 2 \('2'\) has no image left in split train: 20 samples skipped"):
        run_ingest(tmp_path, make_config(tmp_path / "in", on_bad_image="skip"))


def test_skipping_every_image_is_an_empty_split(tmp_path):
    write_parquet(tmp_path / "in/a.parquet", [b"junk"] * 20, [0, 1] * 10)

    with pytest.raises(DataError, match="split train is empty: none of its 16 samples can be read"):
        run_ingest(tmp_path, make_config(tmp_path / "in", on_bad_image="skip"))


def test_skipping_all_of_a_test_split_is_an_empty_split(tmp_path):
    write_parquet(tmp_path / "in/train.parquet", images(20), [0, 1] * 10)
    write_parquet(tmp_path / "in/test.parquet", [b"junk"] * 4, [0, 1] * 2)

    with pytest.raises(DataError, match="split test is empty: 4 samples skipped"):
        run_ingest(tmp_path, make_config(tmp_path / "in", on_bad_image="skip"))


def test_sizes_that_differ_are_an_error_until_image_size_is_given(tmp_path):
    cells = [encode(pixels_of(row, size=8 if row == 11 else 6)) for row in range(40)]
    write_parquet(tmp_path / "in/a.parquet", cells, [row % 2 for row in range(40)])

    with pytest.raises(DataError, match=r"a.parquet, row 11, column 'image': the image has 8 rows of 8") as caught:
        run_ingest(tmp_path, make_config(tmp_path / "in", on_bad_image="skip"))
    assert "--image-size 6" in str(caught.value)
    _, _, manifest = run_ingest(tmp_path, make_config(tmp_path / "in", image_size=7), "resized")
    assert manifest.facts["inputs"]["shape"] == [1, 7, 7]


def test_grey_images_in_a_colour_data_set_become_colour(tmp_path):
    cells = [encode(pixels_of(row, channels=1 if row % 7 == 1 else 3)) for row in range(40)]
    write_parquet(tmp_path / "in/a.parquet", cells, [row % 2 for row in range(40)])

    store, _, manifest = run_ingest(tmp_path, make_config(tmp_path / "in"))

    tensors, _, ids = rows_of(store, manifest, "train")
    assert manifest.facts["inputs"]["shape"] == [3, 6, 6]
    np.testing.assert_array_equal(tensors, np.repeat(ids.astype(np.uint8)[:, None], 108, axis=1))


def test_image_folders_are_ingested_with_skipped_files_named(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "in" / name).mkdir(parents=True)
        for number in range(20):
            (tmp_path / f"in/{name}/{number}.png").write_bytes(encode(pixels_of(number)))
    (tmp_path / "in/dog/readme.txt").write_text("hello")

    with pytest.raises(DataError, match=r"dog/readme.txt: the sample cannot be read"):
        run_ingest(tmp_path, make_config(tmp_path / "in"))
    _, _, manifest = run_ingest(tmp_path, make_config(tmp_path / "in", on_bad_image="skip"), "skipping")

    assert manifest.facts["class_names"] == ["cat", "dog"]
    assert manifest.facts["num_skipped"] == 1
    assert manifest.facts["skipped"][0].startswith("dog/readme.txt: no image")


def test_a_second_attempt_cannot_commit_over_the_first(tmp_path):
    store, _, first = run_ingest(tmp_path, make_config("digits"))

    with pytest.raises(AlreadyExists):
        list(ingest(store, LAYOUT, make_config("digits"), "00000002"))
    assert read_manifest(store, LAYOUT.ingest_manifest) == first


def test_an_abandoned_attempt_commits_nothing(tmp_path):
    store = open_store(str(tmp_path / "store"))
    cfg = make_config("digits")
    events = ingest(store, LAYOUT, cfg, "00000001")
    for event in events:
        if isinstance(event, Progress):
            break
    events.close()

    assert read_manifest(store, LAYOUT.ingest_manifest) is None


def test_fingerprint_ignores_the_path_and_the_threads_and_sees_all_else(tmp_path):
    for folder in ("a", "b"):
        write_labelled(tmp_path / folder)
    write_labelled(tmp_path / "c", num=101)

    def fingerprint(folder, **settings):
        cfg = make_config(tmp_path / folder, **settings)
        return ingest_fingerprint(cfg, open_source(cfg.data))

    same = {fingerprint("a"), fingerprint("b"), fingerprint("a", decode_threads=9)}
    others = {fingerprint("c"), fingerprint("a", image_size=9), fingerprint("a", max_train_images=50)}
    assert len(same) == 1
    assert len(same | others) == 4


def test_cifar10_subset_is_balanced_and_looks_like_cifar10(tmp_path):
    cfg = make_config(require_cifar10(), max_train_images=2000)

    store, _, manifest = run_ingest(tmp_path, cfg)

    assert manifest.facts["split_rows"] == {"train": 1800, "val": 200, "test": 10_000}
    assert np.bincount(rows_of(store, manifest, "train")[1]).tolist() == [180] * 10
    # Known mean of CIFAR-10's train images: 0.491, 0.482, 0.447.
    np.testing.assert_allclose(np.divide(manifest.facts["inputs"]["mean"], 255), [0.491, 0.482, 0.447], atol=0.01)


_MEASURE = """
import resource, sys, tempfile
from nf_pipeline.config import validate_config
from nf_pipeline.data.ingest import ingest
from nf_pipeline.storage.layout import RunLayout
from nf_pipeline.storage.store import open_store

data = {"source": sys.argv[1], "decode_threads": 2}
cfg = validate_config({"memory": {"budget_bytes": 10**8}, "data": data, "storage": {"shard_bytes": 2**20}})
with tempfile.TemporaryDirectory() as folder:
    for _ in ingest(open_store(folder), RunLayout("run"), cfg, "00000001"):
        pass
# ru_maxrss counts what the parent held at the moment of the fork.
with open("/proc/self/status") as status:
    print(next(line.split()[1] for line in status if line.startswith("VmHWM")))
"""


def _peak_kib(folder):
    done = subprocess.run([sys.executable, "-c", _MEASURE, str(folder)], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.parametrize("row_group_size", [500, 100_000])
def test_memory_does_not_grow_with_the_data_set(tmp_path, row_group_size):
    # 64x64 noise is 12 KiB as PNG: the smaller set fills the shuffle window of 64 MiB almost twice, so that
    # the peak of the steady state is in both figures. A set held in memory would add 350 MiB, allocators
    # differ by up to 50 from run to run.
    rng = np.random.default_rng(0)
    noise = [encode(rng.integers(0, 256, (64, 64, 3), np.uint8)) for _ in range(16)]
    peaks_kib = []
    for num in (10_000, 40_000):
        cells = [noise[row % 16] for row in range(num)]
        labels = [row % 4 for row in range(num)]
        write_parquet(tmp_path / f"{num}/a.parquet", cells, labels, row_group_size=row_group_size)
        peaks_kib.append(_peak_kib(tmp_path / str(num)))

    extra_kib = 30_000 * len(noise[0]) / 1024
    assert peaks_kib[1] - peaks_kib[0] < extra_kib / 4
