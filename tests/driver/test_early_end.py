"""Runs that end before all of their blocks are trained, because deeper exits do not pay."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nf_pipeline.config import DataConfig, RunConfig
from nf_pipeline.driver.early_end import find_early_end
from nf_pipeline.driver.gc import collect_garbage
from nf_pipeline.driver.run import resume, train
from nf_pipeline.driver.status import read_status
from nf_pipeline.driver.use import evaluate
from nf_pipeline.driver.verify import NOT_NEEDED, verify_run
from nf_pipeline.errors import ObjectMissing
from nf_pipeline.events import Event, Note, StageDone, StageNotNeeded, StageStarted
from nf_pipeline.storage.layout import RunLayout
from nf_pipeline.storage.store import open_store

MakeConfig = Callable[..., RunConfig]
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
    facts = {"val_correct": [1], "num_val": 10}
    assert find_early_end(config, NUM_BLOCKS, [facts, facts]) is None
    assert find_early_end(hopeless(), NUM_BLOCKS, [facts, facts]).num_blocks == 2


def test_run_whose_blocks_are_all_trained_did_not_end_early(hopeless: MakeConfig) -> None:
    facts = {"val_correct": [1], "num_val": 10}
    assert find_early_end(hopeless(), 2, [facts, facts]) is None
