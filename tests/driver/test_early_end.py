"""Runs that end before all of their blocks are trained, because deeper exits do not pay."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from damaged_runs import Run, edit, finish

from nf_pipeline.config import DataConfig, RunConfig
from nf_pipeline.core.hits import Hits
from nf_pipeline.driver import run as driver_run
from nf_pipeline.driver.early_end import find_early_end
from nf_pipeline.driver.evaluation import evaluate
from nf_pipeline.driver.gc import collect_garbage
from nf_pipeline.driver.run import resume, train
from nf_pipeline.driver.status import read_status
from nf_pipeline.driver.verify import NOT_NEEDED, verify_run
from nf_pipeline.errors import Diverged, ObjectCorrupt, ObjectMissing
from nf_pipeline.events import Event, Note, Publishing, StageDone, StageFailed, StageNotNeeded, StageStarted
from nf_pipeline.executors.inline import InlineExecutor
from nf_pipeline.storage.layout import RunLayout
from nf_pipeline.storage.store import open_store

MakeConfig = Callable[..., RunConfig]
Facts = dict[str, Any]
LAYOUT = RunLayout("run")
NUM_BLOCKS = 3


@pytest.fixture
def hopeless(digits_config: MakeConfig) -> MakeConfig:
    """Makes configurations of runs of three blocks that learn next to nothing: no block is better than the first."""

    def make(**changes: Any) -> RunConfig:
        small = {"data__max_train_images": 200, "train__epochs": 1, "memory__join_threshold": 0.0}
        return digits_config(**{**small, "train__lr": 1e-7, "exits__patience": 1, **changes})

    return make


def uri_of(config: RunConfig) -> str:
    return f"{config.storage.uri}/{config.run}"


def blocks_with_shards(config: RunConfig) -> list[int]:
    store = open_store(config.storage.uri)
    found = range(NUM_BLOCKS)
    return [idx for idx in found if any(LAYOUT.is_shard(key) for key, _ in store.list(LAYOUT.block(idx)))]


def states(config: RunConfig) -> list[str]:
    return [stage["state"] for stage in read_status(uri_of(config))["stages"]]


def test_run_ends_without_blocks_that_would_not_pay_and_says_why(hopeless: MakeConfig) -> None:
    config, events = hopeless(), []
    summary = train(config, on_event=events.append)
    assert (summary["stopped_early"], summary["stopped_after_block"]) == (True, 1)
    assert (len(summary["blocks"]), summary["num_blocks_planned"]) == (2, NUM_BLOCKS)
    assert len(summary["exits"]) == 2
    assert [event.stage for event in events if isinstance(event, StageNotNeeded)] == ["block-002"]
    assert any(isinstance(event, Note) and summary["stop_reason"] in event.text for event in events)
    assert states(config) == ["done", "done", "done", "done", "not needed", "done"]
    assert len(evaluate(uri_of(config), DataConfig(source="digits"))) == 2


def test_finished_run_that_ended_early_is_whole_and_needs_nothing_more(hopeless: MakeConfig) -> None:
    config, events = hopeless(), []
    first = train(config)
    report = verify_run(uri_of(config))
    assert report.is_whole
    assert {stage.stage: stage.state for stage in report.stages}["block-002"] == NOT_NEEDED
    again = resume(uri_of(config), on_event=events.append, repair=True)
    assert not [event for event in events if isinstance(event, StageStarted)]
    assert again["weights_checksum"] == first["weights_checksum"]
    assert again["stopped_early"]


def test_run_killed_where_it_would_have_ended_ends_there_all_the_same(hopeless: MakeConfig, tmp_path: Path) -> None:
    straight = train(hopeless(storage__uri=str(tmp_path / "straight")))
    config = hopeless()

    def kill(event: Event) -> None:
        if isinstance(event, StageDone) and event.stage == "block-001":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, on_event=kill)
    summary = train(config)
    assert summary["weights_checksum"] == straight["weights_checksum"]
    assert summary["stopped_after_block"] == straight["stopped_after_block"] == 1


def test_run_that_ended_early_goes_on_when_told_never_to_stop(hopeless: MakeConfig, tmp_path: Path) -> None:
    never = train(hopeless(storage__uri=str(tmp_path / "never"), exits__patience="never"))
    config = hopeless()
    assert train(config)["stopped_early"]
    events: list[Event] = []
    summary = resume(uri_of(config), patience="never", on_event=events.append)
    assert [e.stage for e in events if isinstance(e, StageStarted)] == ["block-002", "model"]
    assert not summary["stopped_early"]
    assert len(summary["blocks"]) == NUM_BLOCKS
    assert summary["weights_checksum"] == never["weights_checksum"]
    assert "not needed" not in states(config)
    # What is trained counts: the same command as at first takes nothing back.
    assert train(config)["weights_checksum"] == never["weights_checksum"]


@pytest.mark.parametrize(("keep", "kept"), [("all", [0, 1]), ("last", [1]), ("none", [])])
def test_policies_hold_for_a_run_that_ended_early(hopeless: MakeConfig, keep: str, kept: list[int]) -> None:
    config = hopeless(storage__keep_activations=keep)
    train(config)
    assert blocks_with_shards(config) == kept
    assert verify_run(uri_of(config)).is_whole


def test_gc_releases_what_a_run_that_ended_early_keeps(hopeless: MakeConfig) -> None:
    config = hopeless()
    train(config)
    collect_garbage(uri_of(config), dry_run=False, keep="none")
    assert blocks_with_shards(config) == []
    assert resume(uri_of(config))["stopped_early"]
    with pytest.raises(ObjectMissing, match="block-000, block-001 again"):
        resume(uri_of(config), patience="never")
    summary = resume(uri_of(config), patience="never", repair=True)
    assert len(summary["blocks"]) == NUM_BLOCKS


def test_pipelined_run_trains_all_blocks(hopeless: MakeConfig) -> None:
    config = hopeless(train__mode="pipelined")
    found = [Hits(0b1, 10)]
    assert find_early_end(config, NUM_BLOCKS, [found, found]) is None
    assert find_early_end(hopeless(), NUM_BLOCKS, [found, found]).num_blocks == 2


def test_run_whose_blocks_are_all_trained_did_not_end_early(hopeless: MakeConfig) -> None:
    found = [Hits(0b1, 10)]
    assert find_early_end(hopeless(), 2, [found, found]) is None


@pytest.fixture(scope="module")
def ended_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of three blocks that ended after two, and that nobody may change."""
    hopeless = {"train__lr": 1e-7, "train__epochs": 1, "memory__join_threshold": 0.0, "exits__patience": 1}
    return finish(tmp_path_factory.mktemp("ended") / "runs", **hopeless)


def _without_counts(facts: Facts) -> None:
    del facts["val_correct"], facts["num_val"]


CRAFTED: dict[str, Callable[[Facts], object]] = {
    "no count": lambda facts: facts.update(val_correct=[]),
    "more correct than there are": lambda facts: facts.update(val_correct=[facts["num_val"] + 1]),
    "fewer than none": lambda facts: facts.update(val_correct=[-1]),
    "counts missing": lambda facts: facts.pop("val_correct"),
    "samples missing": lambda facts: facts.pop("num_val"),
    "both missing": _without_counts,
    "more counts than exits": lambda facts: facts.update(val_correct=[1, *facts["val_correct"]]),
    "counts of other samples": lambda facts: facts.update(num_val=10**6),
}


@pytest.mark.parametrize("change", CRAFTED)
def test_counts_that_cannot_be_are_damage_not_a_decision(ended_run: Run, tmp_path: Path, change: str) -> None:
    run = ended_run.copy(tmp_path / "runs")
    edit(run.path("blocks/001/manifest.json"), lambda document: CRAFTED[change](document["facts"]))
    with pytest.raises(ObjectCorrupt, match=r"blocks/001/manifest.json is damaged: facts\.val_correct") as caught:
        resume(run.uri)
    assert "--repair" in caught.value.fix
    assert [problem.stage for problem in verify_run(run.uri).problems] == ["block-001"]


@pytest.mark.parametrize("change", ["no count", "more counts than exits"])
def test_repair_trains_a_block_again_whose_counts_cannot_be(ended_run: Run, tmp_path: Path, change: str) -> None:
    run = ended_run.copy(tmp_path / "runs")
    edit(run.path("blocks/001/manifest.json"), lambda document: CRAFTED[change](document["facts"]))
    summary = resume(run.uri, repair=True)
    assert (summary["stopped_after_block"], summary["weights_checksum"]) == (1, ended_run.summary["weights_checksum"])


@pytest.mark.parametrize("keep", ["all", "last", "none"])
def test_what_blocks_left_out_would_read_stays_unless_nothing_is_kept(hopeless: MakeConfig, keep: str) -> None:
    """The fourth block reads the first one's activations, and is left out with the one before it."""
    config = hopeless(storage__cache="shards", train__unit_layers=1, memory__budget_bytes="16MiB")
    config = config.model_copy(update={"storage": config.storage.model_copy(update={"keep_activations": keep})})
    with pytest.raises(KeyboardInterrupt):
        train(config, on_event=_interrupt_first_block)
    edit(Path(config.storage.uri, "run", "plan.json"), _plan_one_unit_each)
    assert train(config)["stopped_after_block"] == 1
    assert verify_run(uri_of(config)).is_whole
    assert blocks_with_shards(config) == {"all": [0, 1], "last": [0, 1], "none": []}[keep]
    if keep == "none":
        with pytest.raises(ObjectMissing, match="--repair, which trains block-000, block-001 again"):
            resume(uri_of(config), patience="never")
    summary = resume(uri_of(config), patience="never", repair=keep == "none")
    assert len(summary["blocks"]) == summary["num_blocks_planned"] == 6


def _plan_one_unit_each(document: dict[str, Any]) -> None:
    block, num_units = document["blocks"][0], len(document["units"])
    document["blocks"] = [
        {**block, "block_idx": idx, "units": [idx, idx + 1], "layers": [idx, idx + 1], "source_block": source}
        for idx, source in zip(range(num_units), (-1, 0, 1, 0, 3, 4), strict=True)
    ]


def _interrupt_first_block(event: Event) -> None:
    if isinstance(event, StageStarted) and event.stage == "block-000":
        raise KeyboardInterrupt


class OverlappingExecutor(InlineExecutor):
    """Runs stages in threads of this process. The third block fails while the second one is still being written, or
    only once nobody needs it any more."""

    def __init__(self, *, fails_at_once: bool) -> None:
        self._fails_at_once = fails_at_once
        self._may_go_on = threading.Event()

    @property
    def is_parallel(self) -> bool:
        """Lets blocks overlap."""
        return True

    def run(self, name: str, stage: str, task: Any, resources: Any, is_wanted: Any) -> Iterator[Event]:
        """Holds the second block until the third one has begun, or failed."""
        if "/block-002 " in name:
            yield from self._fail(is_wanted)
        for event in super().run(name, stage, task, resources):
            yield event
            if isinstance(event, Publishing) and event.stage == "block-001":
                assert self._may_go_on.wait(30)

    def observe(self, event: Event) -> None:
        """Lets the second block end."""
        if event.stage == "block-002" and isinstance(event, StageFailed if self._fails_at_once else StageStarted):
            self._may_go_on.set()

    def _fail(self, is_wanted: Callable[[], bool]) -> Iterator[Event]:
        yield StageStarted(stage="block-002", attempt="a", worker="w")
        while not self._fails_at_once and is_wanted():
            self._may_go_on.wait(0.01)
        raise Diverged("block-002", "loss nan in epoch 1", "lower train.lr")


@pytest.mark.parametrize(("fails_at_once", "tells"), [(True, StageFailed), (False, Note)])
def test_failure_of_a_block_that_is_left_out_is_told_and_does_not_fail_the_run(
    hopeless: MakeConfig, monkeypatch: pytest.MonkeyPatch, fails_at_once: bool, tells: type[Event]
) -> None:
    executor, events = OverlappingExecutor(fails_at_once=fails_at_once), []
    monkeypatch.setattr(driver_run, "open_executor", lambda cluster, run: executor)
    summary = train(config := hopeless(), on_event=events.append)
    assert summary["stopped_after_block"] == 1
    assert any(e.stage == "block-002" and isinstance(e, tells) and "loss nan" in e.text for e in events)
    assert states(config)[4] == "not needed"


def test_failure_of_a_block_that_is_needed_fails_the_run(
    hopeless: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = OverlappingExecutor(fails_at_once=True)
    monkeypatch.setattr(driver_run, "open_executor", lambda cluster, run: executor)
    with pytest.raises(Diverged, match="loss nan"):
        train(hopeless(exits__patience=3))
