"""Damage is noticed when it is read, and `resume(repair=True)` runs exactly the stages again that made it."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from damaged_runs import Run, config_of, edit, finish, flip_bit, truncate

import nf_pipeline.data
from nf_pipeline import load_model
from nf_pipeline.driver.evaluation import evaluate
from nf_pipeline.driver.run import resume, train
from nf_pipeline.driver.verify import verify_run
from nf_pipeline.errors import DataError, ObjectCorrupt, ObjectMissing, RunConflict, StageOutdated, StorageError
from nf_pipeline.events import EpochDone, Event, Note, StageStarted

DIGITS_FILE = Path(nf_pipeline.data.__file__).parent / "digits.parquet"

Damage = Callable[[Run, Run, str], None]
"""(the run to damage, another run of the same name, pattern of the object)"""


@dataclass(frozen=True)
class Case:
    """One kind of damage.

    Attributes:
        pattern: of the damaged object.
        damage: does it.
        stages: that must run again.
        unread_until: commit without which a resumed run reads the object; "" if it always does, None if never.
    """

    pattern: str
    damage: Damage
    stages: tuple[str, ...] = ()
    unread_until: str | None = ""


@pytest.fixture
def run(finished_run: Run, tmp_path: Path) -> Run:
    """A copy of a finished run, to be damaged."""
    return finished_run.copy(tmp_path / "copy")


def flipped(run: Run, other: Run, pattern: str) -> None:
    flip_bit(run.path(pattern))


def cut(run: Run, other: Run, pattern: str) -> None:
    truncate(run.path(pattern))


def missing(run: Run, other: Run, pattern: str) -> None:
    run.path(pattern).unlink()


def from_another_run(run: Run, other: Run, pattern: str) -> None:
    shutil.copy(other.path(pattern), run.path(pattern))


def from_another_stage(source: str) -> Damage:
    return lambda run, other, pattern: shutil.copy(run.path(source), run.path(pattern))


def of_another_version(run: Run, other: Run, pattern: str) -> None:
    edit(run.path(pattern), lambda document: document.update(format_version=1))


def edited(old: bytes, new: bytes) -> Damage:
    def damage(run: Run, other: Run, pattern: str) -> None:
        data = run.path(pattern).read_bytes()
        assert old in data
        run.path(pattern).write_bytes(data.replace(old, new, 1))

    return damage


IMAGES = "ingest/*/train-00000.parquet"
SHARD, LAST_SHARD = "blocks/000/*/activations/train-00000.parquet", "blocks/001/*/activations/val-00000.parquet"
WEIGHTS = "blocks/{}/*/weights.safetensors"
INGEST, MODEL = "ingest/manifest.json", "model/manifest.json"
BLOCKS = [f"blocks/{idx:03d}/manifest.json" for idx in range(3)]

CASES = {
    "image shard with a flipped bit": Case(IMAGES, flipped, ("ingest",), BLOCKS[0]),
    "image shard missing": Case(IMAGES, missing, ("ingest",)),
    "image shard of another stage": Case(IMAGES, from_another_stage(SHARD), ("ingest",)),
    "ingest manifest edited": Case(INGEST, edited(b'"num_rows": ', b'"num_rows": 1'), ("ingest",)),
    "ingest manifest of another run": Case(INGEST, from_another_run, ("ingest",)),
    "plan edited": Case("plan.json", edited(b'"batch_size": ', b'"batch_size": 1'), ("plan",)),
    "plan of another run": Case("plan.json", from_another_run, ("plan",)),
    "activations cut short": Case(SHARD, cut, ("block-000",)),
    "activations of another stage": Case(SHARD, from_another_stage(LAST_SHARD), ("block-000",)),
    "activations of another run": Case(SHARD, from_another_run, ("block-000",), BLOCKS[1]),
    "validation activations with a flipped bit": Case(LAST_SHARD, flipped, ("block-001",), BLOCKS[2]),
    "weights with a flipped bit": Case(WEIGHTS.format("000"), flipped, ("block-000",), MODEL),
    "weights missing": Case(WEIGHTS.format("002"), missing, ("block-002",)),
    "block manifest edited": Case(BLOCKS[1], edited(b'"train_s"', b'"train_t"'), ("block-001",)),
    "block manifest of another run": Case(BLOCKS[0], from_another_run, ("block-000",)),
    "block manifest of another stage": Case(BLOCKS[1], from_another_stage(BLOCKS[0]), ("block-001",)),
    "block manifest of another version": Case(BLOCKS[2], of_another_version, ("block-002",), None),
    "final weights with a flipped bit": Case("model/model.safetensors", flipped, ("model",), None),
    "model description edited": Case("model/model.json", edited(b'"mean"', b'"Mean"'), ("model",), None),
    "model card missing": Case("model/README.md", missing, ("model",)),
    "model manifest of another run": Case(MODEL, from_another_run, ("model",)),
    "summary edited": Case("summary.json", edited(b'"test_accuracy": 0', b'"test_accuracy": 1'), (), None),
    "record edited": Case("run.json", edited(b'"num_threads": 1', b'"num_threads": 2')),
    "record missing": Case("run.json", missing),
    "record of another run": Case("run.json", from_another_run),
}


def repair(run: Run) -> tuple[dict, list[str], list[str]]:
    """Returns the summary, the stages that ran, and what was said."""
    events: list[Event] = []
    summary = resume(run.uri, on_event=events.append, repair=True)
    started = [event.stage for event in events if isinstance(event, StageStarted)]
    return summary, started, [event.text for event in events if isinstance(event, Note)]


def changed(run: Run, before: dict[str, bytes]) -> set[str]:
    after = run.files()
    return {key for key, data in before.items() if after.get(key) != data}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_damage_is_named_and_repaired_by_running_exactly_its_stage_again(
    run: Run, other_run: Run, case: Case
) -> None:
    before = run.files()
    case.damage(run, other_run, case.pattern)
    damaged = changed(run, before)
    report = verify_run(run.uri)
    assert damaged <= {problem.key for problem in report.problems}
    summary, ran, said = repair(run)
    assert tuple(ran) == case.stages
    assert summary["weights_checksum"] == run.summary["weights_checksum"]
    assert verify_run(run.uri).is_whole
    assert any(Path(key).name in text for key in damaged for text in said if text.startswith("repair: "))
    repeated = {problem.commit for problem in report.problems}
    intact = changed(run, before) - damaged - repeated
    assert {key for key in intact if "/lock/" not in key} <= {"run/events.jsonl", "run/summary.json"}


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=name) for name, case in CASES.items() if case.unread_until is not None]
)
def test_damage_that_a_resumed_run_reads_ends_it_with_an_error_that_offers_the_repair(
    run: Run, other_run: Run, case: Case
) -> None:
    if case.unread_until:
        run.path(case.unread_until).unlink()
    key = run.key(case.pattern)
    case.damage(run, other_run, case.pattern)
    with pytest.raises((ObjectCorrupt, ObjectMissing)) as caught:
        resume(run.uri)
    assert key in str(caught.value)
    assert f"nf-pipeline resume {run.uri} --repair" in caught.value.fix


@pytest.mark.parametrize("pattern", ["model/model.safetensors", "model/model.json", MODEL, WEIGHTS.format("001")])
def test_damaged_weights_are_noticed_by_whoever_uses_the_model(run: Run, pattern: str) -> None:
    flip_bit(run.path(pattern))
    use = load_model if pattern.startswith("model") else lambda uri: evaluate(uri, config_of(run.store).data)
    with pytest.raises(ObjectCorrupt, match=Path(run.key(pattern)).name) as caught:
        use(run.uri)
    assert "--repair" in caught.value.fix


def test_several_damaged_stages_are_repaired_in_order(run: Run) -> None:
    flip_bit(run.path(IMAGES))
    truncate(run.path(WEIGHTS.format("001")))
    flip_bit(run.path("plan.json"))
    run.path("model/model.json").unlink()
    summary, ran, said = repair(run)
    assert ran == ["ingest", "plan", "block-001", "model"]
    assert summary["weights_checksum"] == run.summary["weights_checksum"]
    assert sum(text.startswith("repair: ") for text in said) == 4
    logged = (run.folder / "events.jsonl").read_text()
    assert all(text in logged for text in said[:1]), "the run's log tells it too"


@pytest.mark.parametrize("mode", ["sequential", "pipelined"])
def test_repair_that_is_interrupted_goes_on_with_a_plain_resume(tmp_path: Path, mode: str) -> None:
    run = finish(tmp_path / "runs", train__mode=mode)
    flip_bit(run.path(WEIGHTS.format("001")))

    def stop(event: Event) -> None:
        if isinstance(event, EpochDone):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        resume(run.uri, on_event=stop, repair=True)
    assert verify_run(run.uri).is_whole
    assert resume(run.uri)["weights_checksum"] == run.summary["weights_checksum"]
    assert verify_run(run.uri).is_whole


def test_repair_of_a_whole_run_changes_nothing(run: Run) -> None:
    before = run.files()
    _, ran, said = repair(run)
    assert (ran, said) == ([], ["repair: nothing is damaged"])
    after = run.files()
    assert [key for key in before if "lock/" not in key and after[key] != before[key]] == [
        "run/events.jsonl",
        "run/summary.json",
    ]


def test_later_stages_are_repeated_too_where_training_gives_other_bits(run: Run) -> None:
    shutil.copytree(run.folder, run.store / "kept")
    (run.folder / BLOCKS[0]).unlink()
    with torch.backends.mkldnn.flags(enabled=False):  # another machine
        with pytest.raises(
            StageOutdated, match=r"blocks/001/manifest\.json was committed for another input"
        ) as caught:
            resume(run.uri)
        assert "--repair" in caught.value.fix
        shutil.rmtree(run.folder)
        (run.store / "kept").rename(run.folder)
        flip_bit(run.path(SHARD))
        _, ran, said = repair(run)
    assert ran == ["block-000", "block-001", "block-002", "model"]
    assert sum("run again as well" in text for text in said) == 3
    assert verify_run(run.uri).is_whole


def stopped_after(store: Path, stage: str, **changes: object) -> Run:
    def stop(event: Event) -> None:
        if isinstance(event, EpochDone) and event.stage == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config_of(store, **changes), on_event=stop)
    return Run(store=store, summary={})


@pytest.mark.parametrize("pattern", ["checkpoint-00001.safetensors", "checkpoint.json"])
def test_damaged_checkpoint_is_dropped_and_the_block_starts_again(
    finished_run: Run, tmp_path: Path, pattern: str
) -> None:
    run = stopped_after(tmp_path / "runs", "block-001")
    flip_bit(run.path(f"blocks/001/*/{pattern}"))
    with pytest.raises(ObjectCorrupt, match=pattern) as caught:
        resume(run.uri)
    assert "--repair" in caught.value.fix
    summary, ran, _ = repair(run)
    assert ran == ["block-001", "block-002", "model"]
    assert summary["weights_checksum"] == finished_run.summary["weights_checksum"]


def test_damaged_block_of_a_pipelined_run_repeats_all_blocks_and_says_so(tmp_path: Path) -> None:
    pipelined = {"train__mode": "pipelined", "train__epochs": 2}
    run = finish(tmp_path / "runs", **pipelined)
    assert verify_run(run.uri).is_whole
    flip_bit(run.path(WEIGHTS.format("001")))
    summary, ran, said = repair(run)
    assert set(ran) == {"block-000", "block-001", "block-002"}
    assert any("all blocks are trained again" in text for text in said)
    assert summary["weights_checksum"] == run.summary["weights_checksum"]
    assert verify_run(run.uri).is_whole


def test_block_whose_input_was_given_up_is_repaired_from_the_last_block_that_has_one(tmp_path: Path) -> None:
    run = finish(tmp_path / "runs", storage__keep_activations="last")
    assert verify_run(run.uri).is_whole
    flip_bit(run.path(WEIGHTS.format("001")))
    summary, ran, said = repair(run)
    assert ran == ["block-000", "block-001"]
    assert any("its activations were given up" in text for text in said)
    assert summary["weights_checksum"] == run.summary["weights_checksum"]
    assert verify_run(run.uri).is_whole


@pytest.fixture
def own_images(tmp_path: Path) -> tuple[Run, Path]:
    """A run on a data set in a folder of its own."""
    source = tmp_path / "images"
    source.mkdir()
    shutil.copy(DIGITS_FILE, source / "train.parquet")
    return finish(tmp_path / "runs", data__source=str(source), train__epochs=1), source


def test_damaged_images_whose_source_is_gone_or_changed_are_an_error_that_deletes_nothing(
    own_images: tuple[Run, Path],
) -> None:
    run, source = own_images
    flip_bit(run.path(IMAGES))
    before = {key: data for key, data in run.files().items() if not key.startswith(("run/lock", "run/events"))}
    rows = pq.read_table(source / "train.parquet")
    pq.write_table(rows.slice(1), source / "train.parquet")
    with pytest.raises(DataError, match="not those any more that were ingested") as caught:
        repair(run)
    assert run.key(IMAGES) in str(caught.value)
    shutil.rmtree(source)
    with pytest.raises(DataError, match="cannot be read again") as caught:
        repair(run)
    assert str(source) in caught.value.fix
    assert {key: data for key, data in run.files().items() if key in before} == before


def test_damaged_images_that_came_as_an_object_need_it_again(tmp_path: Path) -> None:
    config = config_of(tmp_path / "runs", train__epochs=1)
    table = pq.read_table(DIGITS_FILE)
    run = Run(store=tmp_path / "runs", summary=train(config, dataset=table))
    flip_bit(run.path(IMAGES))
    with pytest.raises(DataError, match="came as a dataset object"):
        repair(run)
    again = train(config, dataset=table, repair=True)
    assert again["weights_checksum"] == run.summary["weights_checksum"]
    assert verify_run(run.uri).is_whole


def test_lost_record_of_a_run_without_a_plan_is_written_again_by_its_train_command(tmp_path: Path) -> None:
    run = finish(tmp_path / "runs", train__epochs=1)
    run.path("plan.json").unlink()
    flip_bit(run.path("run.json"))
    for continued in (resume, lambda uri: resume(uri, repair=True)):
        with pytest.raises(ObjectCorrupt, match=r"run\.json") as caught:
            continued(run.uri)
        assert "delete run/run.json and give the train command again" in caught.value.fix
    run.path("run.json").unlink()
    assert train(config_of(run.store, train__epochs=1))["weights_checksum"] == run.summary["weights_checksum"]


def test_run_under_another_name_is_refused_and_nothing_of_it_is_touched(run: Run) -> None:
    run.folder.rename(run.store / "renamed")
    before = sorted(path for path in (run.store / "renamed").rglob("*.*") if "lock" not in path.parts)
    for is_repair in (False, True):
        with pytest.raises(RunConflict, match="is that of run 'run'") as caught:
            resume(f"{run.store}/renamed", repair=is_repair)
        assert "move the run back to run" in caught.value.fix
    assert sorted(path for path in (run.store / "renamed").rglob("*.*") if "lock" not in path.parts) == before


def test_nothing_is_repaired_while_objects_cannot_be_read(run: Run) -> None:
    flip_bit(run.path(WEIGHTS.format("000")))
    weights = run.path(WEIGHTS.format("001"))
    weights.unlink()
    weights.mkdir()  # reading it fails, and not because it is missing
    with pytest.raises(StorageError, match="nothing is repaired"):
        repair(run)
    assert (run.folder / BLOCKS[0]).exists()


def test_repair_under_another_configuration_is_refused(run: Run) -> None:
    flip_bit(run.path(WEIGHTS.format("002")))
    with pytest.raises(RunConflict):
        train(config_of(run.store, train__epochs=3), repair=True)
