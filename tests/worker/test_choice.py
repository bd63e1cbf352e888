"""A choice is committed once for what it was made from, is counted, and alone opens the labels of the test split."""

import threading
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from nf_pipeline.core.calibration import Calibration
from nf_pipeline.core.early_exit_model import EarlyExitPlan
from nf_pipeline.core.early_exits import OperatingPoint
from nf_pipeline.data.held_out import HeldOutLabels
from nf_pipeline.errors import ObjectCorrupt, ObjectMissing, OtherVersion
from nf_pipeline.storage.layout import choice_key
from nf_pipeline.storage.manifest import StageManifest, store_object
from nf_pipeline.storage.sealed import seal
from nf_pipeline.storage.store import Store, open_store
from nf_pipeline.worker.choice import Choice, commit_choice, find_choice, read_test_labels

PREFIX = "run/model"
POINT = OperatingPoint(exits=(0,), threshold=0.5, val_accuracy=0.75, val_flops=12.5)
CHOICE = Choice(
    fingerprint="f",
    ingest_checksum="c",
    chosen_exit=1,
    reason="the best",
    calibration=Calibration(
        temperature=1.25,
        ece_before=0.1,
        ece_after=0.05,
        cross_entropy_before=0.5,
        cross_entropy_after=0.25,
        num_samples=8,
    ),
    early_exits=EarlyExitPlan(temperatures=(2.0, 1.25), points=(POINT,), val_accuracy=0.75),
)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path))


def test_committed_choice_is_found_as_it_was_made(store: Store) -> None:
    made = commit_choice(store, PREFIX, CHOICE)
    assert made.choice == CHOICE
    assert find_choice(store, PREFIX, "f") == made
    assert find_choice(store, PREFIX, "other") is None
    assert (made.key, made.num_test_reads) == (choice_key(PREFIX, 0), 1)


def test_choice_made_again_from_the_same_does_not_count_and_cannot_change(store: Store) -> None:
    commit_choice(store, PREFIX, CHOICE)
    again = commit_choice(store, PREFIX, replace(CHOICE, chosen_exit=5, reason="second thoughts"))
    assert (again.choice, again.num_test_reads) == (CHOICE, 1)
    assert len(store.list(PREFIX)) == 1


def test_choice_of_values_has_no_temperatures(store: Store) -> None:
    made = commit_choice(store, PREFIX, replace(CHOICE, calibration=None, early_exits=None))
    assert (made.choice.temperatures, find_choice(store, PREFIX, "f")) == (None, made)
    assert CHOICE.temperatures == (2.0, 1.25)
    assert replace(CHOICE, early_exits=None).temperatures == (1.25,)


def test_choices_made_from_something_else_are_counted(store: Store) -> None:
    for number, fingerprint in enumerate("abc"):
        assert commit_choice(store, PREFIX, replace(CHOICE, fingerprint=fingerprint)).num_test_reads == number + 1
    assert commit_choice(store, PREFIX, replace(CHOICE, fingerprint="b")).num_test_reads == 3


def test_of_choices_committed_at_once_one_counts(store: Store) -> None:
    made = []
    barrier = threading.Barrier(8)

    def commit(chosen: int) -> None:
        barrier.wait(30)
        made.append(commit_choice(store, PREFIX, replace(CHOICE, chosen_exit=chosen, early_exits=None)))

    threads = [threading.Thread(target=commit, args=(idx,)) for idx in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(made) == 8 and len({one.choice.chosen_exit for one in made}) == 1
    assert len(store.list(PREFIX)) == 1


@pytest.mark.parametrize(
    ("changes", "error", "what"),
    [
        ({"chosen_exit": -1}, ObjectCorrupt, "chosen_exit"),
        ({"chosen_exit": "1"}, ObjectCorrupt, "chosen_exit"),
        ({"surprise": 1}, ObjectCorrupt, "surprise"),
        ({"calibration": {**asdict(CHOICE.calibration), "temperature": 0.0}}, ObjectCorrupt, "temperature"),
        ({"early_exits": {**asdict(CHOICE.early_exits), "points": []}}, ObjectCorrupt, "points"),
        ({"chosen_exit": 0}, ObjectCorrupt, "got 2 temperatures, want those of exits 0 to 0"),
        ({"format_version": 1}, OtherVersion, "format_version"),
    ],
)
def test_choice_that_cannot_be_is_damage(store: Store, changes: dict, error: type[Exception], what: str) -> None:
    store.put(choice_key(PREFIX, 0), seal({**asdict(CHOICE), **changes}))
    with pytest.raises(error, match=what):
        find_choice(store, PREFIX, "f")


def images_of(store: Store, labels: HeldOutLabels) -> StageManifest:
    stored = store_object(store, "run/ingest/attempt-0/labels", labels.encode())
    return StageManifest(stage="ingest", fingerprint="f", attempt="0", objects=(stored,))


@pytest.fixture
def ingest(store: Store) -> StageManifest:
    labels = HeldOutLabels()
    labels.hold_back(np.array([2, 0]), np.array([10, 11]))
    return images_of(store, labels)


def test_test_labels_open_to_a_committed_choice_alone(store: Store, ingest: StageManifest) -> None:
    key = choice_key(PREFIX, 0)
    with pytest.raises(ObjectMissing, match=r"not read before an exit is chosen: run/model/choice-00000\.json"):
        read_test_labels(store, ingest, store, key)
    made = commit_choice(store, PREFIX, replace(CHOICE, ingest_checksum=ingest.content_checksum))
    assert read_test_labels(store, ingest, store, made.key).of(np.array([11, 10])).tolist() == [0, 2]


def test_choice_of_other_images_opens_nothing(store: Store, ingest: StageManifest) -> None:
    made = commit_choice(store, PREFIX, CHOICE)
    with pytest.raises(ObjectCorrupt, match="made for other images: ingest_checksum: got c"):
        read_test_labels(store, ingest, store, made.key)


def test_labels_that_are_damaged_or_gone_are_named(store: Store, ingest: StageManifest) -> None:
    made = commit_choice(store, PREFIX, replace(CHOICE, ingest_checksum=ingest.content_checksum))
    store.put(ingest.objects[0].key, b"other")
    with pytest.raises(ObjectCorrupt, match="attempt-0/labels is damaged"):
        read_test_labels(store, ingest, store, made.key)
    store.delete([ingest.objects[0].key])
    with pytest.raises(ObjectMissing, match="attempt-0/labels"):
        read_test_labels(store, ingest, store, made.key)


def test_nothing_but_its_writer_and_one_reader_names_the_labels() -> None:
    package = Path(__file__).parents[2] / "nf_pipeline"
    sources = {path.relative_to(package).as_posix(): path.read_text() for path in package.rglob("*.py")}
    assert {name for name, text in sources.items() if "decode_labels" in text} == {
        "data/held_out.py",
        "worker/choice.py",
    }
    assert {name for name, text in sources.items() if "ingest_labels(" in text or "held-out-labels" in text} == {
        "storage/layout.py",
        "data/ingest.py",
    }
