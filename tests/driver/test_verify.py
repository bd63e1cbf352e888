"""A run is verified byte by byte: whatever is changed is named, and what is not damaged is not."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from damaged_runs import Run, config_of, edit, flip_bit, truncate

from nf_pipeline.driver.run import resume, train
from nf_pipeline.driver.verify import VerifyReport, verify_run
from nf_pipeline.errors import ObjectMissing
from nf_pipeline.events import EpochDone, Event
from nf_pipeline.storage.store import open_store

# The log and the lock decide nothing: whoever reads a damaged log says so, a damaged lock is taken over.
NOT_COVERED = ("run/events.jsonl", "run/lock/")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that was stopped when the second block had trained one epoch."""
    store = tmp_path_factory.mktemp("stopped")

    def stop(event: Event) -> None:
        if isinstance(event, EpochDone) and event.stage == "block-001":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config_of(store), on_event=stop)
    return Run(store=store, summary={})


@pytest.fixture
def run(finished_run: Run, tmp_path: Path) -> Run:
    """A copy of a finished run, to be damaged."""
    return finished_run.copy(tmp_path / "copy")


def states(report: VerifyReport) -> dict[str, str]:
    return {stage.stage: stage.state for stage in report.stages}


def covered(run: Run) -> list[str]:
    return [key for key in run.files() if not key.startswith(NOT_COVERED)]


def test_finished_run_is_whole(finished_run: Run) -> None:
    report = verify_run(finished_run.uri)
    assert report.is_whole
    assert set(states(report).values()) == {"ok"}
    assert sum(stage.num_objects for stage in report.stages) == len(covered(finished_run))
    sizes = sum(len(data) for key, data in finished_run.files().items() if not key.startswith(NOT_COVERED))
    assert sum(stage.num_bytes for stage in report.stages) == sizes
    assert report.num_leftovers == 0


def test_every_flipped_bit_of_every_object_is_found_and_named(run: Run) -> None:
    seeded = random.Random(7)
    for key in covered(run):
        path = run.store / key
        data = path.read_bytes()
        for _ in range(3):
            flip_bit(path, seeded.randrange(8 * len(data)))
            report = verify_run(run.uri)
            assert [problem.key for problem in report.problems] == [key]
            assert key in report.problems[0].what
            path.write_bytes(data)
    assert verify_run(run.uri).is_whole


def test_every_truncation_of_every_object_is_found_and_named(run: Run) -> None:
    seeded = random.Random(8)
    for key in covered(run):
        path = run.store / key
        data = path.read_bytes()
        for length in (0, len(data) - 1, seeded.randrange(len(data))):
            path.write_bytes(data[:length])
            assert [problem.key for problem in verify_run(run.uri).problems] == [key]
        path.write_bytes(data)


def test_every_missing_object_is_named_and_a_missing_commit_is_an_unfinished_stage(run: Run) -> None:
    for key in covered(run):
        path = run.store / key
        data = path.read_bytes()
        path.unlink()
        report = verify_run(run.uri)
        if key.endswith(("/manifest.json", "/plan.json", "/summary.json")):
            assert report.is_whole
            assert list(states(report).values()).count("not finished") == 1
        else:
            assert [problem.key for problem in report.problems] == [key]
            assert "missing" in report.problems[0].what or "does not exist" in report.problems[0].what
        path.write_bytes(data)


def test_all_damage_is_reported_with_what_was_found_and_expected(run: Run) -> None:
    truncate(run.path("blocks/000/*/activations/train-00000.parquet"))
    flip_bit(run.path("blocks/001/*/weights.safetensors"))
    run.path("ingest/*/val-00000.parquet").unlink()
    flip_bit(run.path("model/model.json"))
    report = verify_run(run.uri)
    assert [problem.stage for problem in report.problems] == ["ingest", "block-000", "block-001", "model"]
    assert [stage for stage, state in states(report).items() if state == "damaged"] == [
        "ingest",
        "block-000",
        "block-001",
        "model",
    ]
    for problem in report.problems[1:]:
        assert problem.key in problem.what
        assert "got" in problem.what
        assert "want" in problem.what


def test_shards_of_two_stages_that_changed_places_are_both_named(run: Run) -> None:
    ours, theirs = run.path("ingest/*/train-00000.parquet"), run.path("blocks/000/*/activations/train-00000.parquet")
    mine = ours.read_bytes()
    ours.write_bytes(theirs.read_bytes())
    theirs.write_bytes(mine)
    assert {problem.stage for problem in verify_run(run.uri).problems} == {"ingest", "block-000"}


@pytest.mark.parametrize("name", ["ingest", "plan", "block-000", "model", "summary", "run"])
def test_document_of_another_run_is_named(run: Run, other_run: Run, name: str) -> None:
    key = {"block-000": "blocks/000/manifest.json", "ingest": "ingest/manifest.json", "model": "model/manifest.json"}
    shutil.copy(other_run.folder / key.get(name, f"{name}.json"), run.folder / key.get(name, f"{name}.json"))
    report = verify_run(run.uri)
    assert name in {problem.stage for problem in report.problems}
    assert {problem.stage for problem in report.problems} <= {name, "summary"}, "the others are still whole"


def set_field(field: str, value: object) -> Callable[[dict], None]:
    return lambda document: document.update({field: value})


@pytest.mark.parametrize(
    ("pattern", "stage", "field", "value"),
    [
        ("run.json", "run", "fingerprint", "0" * 16),
        ("plan.json", "plan", "format_version", 1),
        ("plan.json", "plan", "fingerprint", "0" * 16),
        ("ingest/manifest.json", "ingest", "format_version", 1),
        ("ingest/manifest.json", "ingest", "fingerprint", "0" * 16),
        ("blocks/001/manifest.json", "block-001", "format_version", 1),
        ("blocks/001/manifest.json", "block-001", "fingerprint", "0" * 16),
        ("blocks/001/manifest.json", "block-001", "input_checksum", "0" * 16),
        ("blocks/001/manifest.json", "block-001", "stage", "block-000"),
        ("model/manifest.json", "model", "fingerprint", "0" * 16),
        ("summary.json", "summary", "weights_checksum", "sha256:00"),
    ],
)
def test_well_formed_document_that_does_not_belong_to_the_run_is_named(
    run: Run, pattern: str, stage: str, field: str, value: object
) -> None:
    edit(run.path(pattern), set_field(field, value))
    report = verify_run(run.uri)
    assert {problem.stage for problem in report.problems} == {stage}
    assert {problem.key for problem in report.problems} == {run.key(pattern)}
    assert "got" in report.problems[0].what
    assert "want" in report.problems[0].what or field == "stage"


def test_unfinished_run_is_whole_until_its_checkpoint_is_damaged(stopped: Run, tmp_path: Path) -> None:
    run = stopped.copy(tmp_path / "copy")
    report = verify_run(run.uri)
    assert report.is_whole
    assert states(report)["block-001"] == "not finished"
    assert states(report)["model"] == "not finished"
    for pattern in ("blocks/001/*/checkpoint-00001.safetensors", "blocks/001/*/checkpoint.json"):
        flip_bit(run.path(pattern))
        report = verify_run(run.uri)
        assert run.key(pattern) in {problem.key for problem in report.problems}
        assert states(report)["block-001"] == "damaged"


def test_what_a_lost_attempt_left_is_counted_and_no_damage(run: Run) -> None:
    lost = run.folder / "blocks/000/attempt-ffffffff/weights.safetensors"
    lost.parent.mkdir()
    lost.write_bytes(b"x" * 100)
    report = verify_run(run.uri)
    assert report.is_whole
    assert (report.num_leftovers, report.leftover_bytes) == (1, 100)


def test_run_whose_activations_were_given_up_is_whole(run: Run) -> None:
    resume(run.uri, keep="none")
    assert not list(run.folder.glob("blocks/*/*/activations/*"))
    report = verify_run(run.uri)
    assert report.is_whole
    assert report.num_leftovers == 0


def test_run_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ObjectMissing, match="no run 'absent'"):
        verify_run(f"{tmp_path}/absent")


@pytest.mark.s3
def test_damage_on_s3_is_named_and_repaired(moto_uri: str) -> None:
    config = config_of(Path("unused"), storage__uri=moto_uri, train__epochs=1)
    weights_checksum = train(config)["weights_checksum"]
    uri, store = f"{moto_uri}/run", open_store(moto_uri)
    key = next(key for key, _ in store.list("run/blocks/001") if key.endswith("/weights.safetensors"))
    data = bytearray(store.get(key))
    data[1000] ^= 4
    store.put(key, data)
    report = verify_run(uri)
    assert [problem.key for problem in report.problems] == [key]
    assert resume(uri, repair=True)["weights_checksum"] == weights_checksum
    assert verify_run(uri).is_whole
