"""Pipelined runs in one process: what they store, what they end with, and how they continue after a stop."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from nf_pipeline.config import RunConfig
from nf_pipeline.driver.gc import collect_garbage
from nf_pipeline.driver.round_schedule import MAX_ROUNDS_AHEAD
from nf_pipeline.driver.run import resume, train
from nf_pipeline.driver.status import read_status
from nf_pipeline.driver.verify import verify_run
from nf_pipeline.errors import ObjectCorrupt, ObjectMissing
from nf_pipeline.events import EpochDone, Event, StageDone, StageSkipped, StageStarted
from nf_pipeline.model_files import load_model

MakeConfig = Callable[..., RunConfig]
NUM_ROUNDS = 5


@pytest.fixture
def pipelined(digits_config: MakeConfig) -> MakeConfig:
    """Makes fast pipelined configurations of five rounds of one epoch."""

    def make(**changes: object) -> RunConfig:
        rounds = {"train__mode": "pipelined", "train__epochs": NUM_ROUNDS, "train__augment": "crop_flip"}
        return digits_config(**{**rounds, **changes})

    return make


def run_folder(config: RunConfig) -> Path:
    return Path(config.storage.uri, config.run)


def stored_rounds(config: RunConfig) -> dict[str, int]:
    """Counts per block the attempts that hold activations or a state for the next round."""
    counts: dict[str, int] = {}
    for block in (run_folder(config) / "blocks").glob("*"):
        holders = {f.relative_to(block).parts[0] for f in block.rglob("*.parquet")}
        counts[block.name] = len(holders | {f.parent.name for f in block.rglob("*.safetensors")})
    return counts


def test_storage_stays_bounded_and_only_the_last_rounds_remain(pipelined: MakeConfig) -> None:
    config, most = pipelined(), []

    def look(event: Event) -> None:
        if isinstance(event, StageStarted) and event.stage.startswith("block-"):
            most.append(max(stored_rounds(config).values(), default=0))

    summary = train(config, on_event=look)
    assert max(most) <= MAX_ROUNDS_AHEAD + 1 < NUM_ROUNDS
    assert set(stored_rounds(config).values()) == {1}
    assert not list(run_folder(config).rglob("rounds/*/manifest.json"))
    assert [block["attempts"] for block in summary["blocks"]] == [1] * len(summary["blocks"])


def test_final_model_is_that_of_any_other_run(pipelined: MakeConfig) -> None:
    config = pipelined()
    summary = train(config)
    model = load_model(f"{config.storage.uri}/{config.run}")
    assert sum(parameter.numel() for parameter in model.parameters()) == summary["params_final"]
    assert summary["mode"] == "pipelined"
    assert all(block["measured_peak_bytes"] <= block["budget_bytes"] for block in summary["blocks"])


def test_every_block_trains_every_epoch_once_in_rounds_behind_the_block_before(pipelined: MakeConfig) -> None:
    events: list[Event] = []
    train(pipelined(train__round_epochs=2), on_event=events.append)
    epochs = [(event.stage, event.epoch) for event in events if isinstance(event, EpochDone)]
    blocks = sorted({stage for stage, _ in epochs})
    for stage in blocks:
        assert [epoch for name, epoch in epochs if name == stage] == list(range(1, NUM_ROUNDS + 1))
    for before, after in pairwise(blocks):
        for last_epoch in (2, 4, 5):
            first_epoch = last_epoch - (last_epoch - 1) % 2
            assert epochs.index((before, last_epoch)) < epochs.index((after, first_epoch))


@pytest.mark.parametrize("num_events", [6, 9, 14, 21, 30, 38])
def test_stopped_run_continues_to_the_same_weights(pipelined: MakeConfig, num_events: int) -> None:
    straight = train(pipelined(run="straight"))
    seen: list[Event] = []

    def stop(event: Event) -> None:
        if isinstance(event, StageStarted | EpochDone | StageDone):
            seen.append(event)
            if len(seen) == num_events:
                raise KeyboardInterrupt

    config = pipelined(run="stopped")
    with pytest.raises(KeyboardInterrupt):
        train(config, on_event=stop)
    assert read_status(f"{config.storage.uri}/stopped")["state"] != "done"
    collect_garbage(f"{config.storage.uri}/stopped", dry_run=False)
    assert resume(f"{config.storage.uri}/stopped")["weights_checksum"] == straight["weights_checksum"]


def test_finished_run_is_not_repeated(pipelined: MakeConfig) -> None:
    config = pipelined()
    first = train(config)
    events: list[Event] = []
    assert train(config, on_event=events.append)["weights_checksum"] == first["weights_checksum"]
    assert not [event for event in events if isinstance(event, StageStarted)]
    assert len([event for event in events if isinstance(event, StageSkipped)]) == 3 + len(first["blocks"])


@pytest.mark.parametrize("deleted", ["000", "001"])
def test_deleted_commit_of_a_block_before_finished_ones_is_an_error_that_says_what_to_do(
    pipelined: MakeConfig, deleted: str
) -> None:
    config = pipelined()
    first = train(config)
    (run_folder(config) / "blocks" / deleted / "manifest.json").unlink()
    with pytest.raises(ObjectMissing, match=r"block-00[12] is finished, but .*\n?.*--repair: all blocks are trained"):
        train(config)
    assert not verify_run(str(run_folder(config))).is_whole
    assert train(config, repair=True)["weights_checksum"] == first["weights_checksum"]


def test_state_of_a_round_that_is_gone_is_an_error_and_no_new_beginning(pipelined: MakeConfig) -> None:
    config = pipelined()

    def stop(event: Event) -> None:
        if isinstance(event, EpochDone) and (event.stage, event.epoch) == ("block-001", 3):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, on_event=stop)
    for state in (run_folder(config) / "blocks" / "001").rglob("*.safetensors"):
        state.unlink()
    with pytest.raises(
        ObjectCorrupt, match=r"round 2 of block-001 .* not all of its objects(.|\n)*--repair: all blocks"
    ):
        train(config)
