"""A run that is asked to end stops where nothing is lost, and goes on from there."""

from collections.abc import Callable
from typing import Any

import pytest

from nf_pipeline.config import RunConfig
from nf_pipeline.driver.run import train
from nf_pipeline.driver.stop_request import StopRequest
from nf_pipeline.errors import RunInterrupted
from nf_pipeline.events import EpochDone, Event, Progress, StageDone, StageFailed, StageStarted

MakeConfig = Callable[..., RunConfig]


def progress(phase: str) -> Progress:
    return Progress(stage="block-000", phase=phase, done=1, total=2)


@pytest.mark.parametrize("phase", ["train", "validate"])
def test_epoch_that_is_being_trained_is_finished_first(phase: str) -> None:
    stop = StopRequest()
    stop.check(progress(phase))
    stop.ask()
    stop.check(progress(phase))
    assert stop.is_asked


@pytest.mark.parametrize("event", [None, progress("write"), progress("wait"), progress("ingest")])
def test_whatever_can_be_repeated_quickly_is_left_at_once(event: Event | None) -> None:
    stop = StopRequest()
    stop.check(event)
    stop.ask()
    with pytest.raises(RunInterrupted):
        stop.check(event)


@pytest.mark.parametrize(
    ("kind", "stage", "resumed_epochs"),
    [
        (StageDone, "ingest", 0),
        (StageStarted, "block-000", 0),
        (EpochDone, "block-001", 1),
        (StageDone, "block-001", 0),
    ],
)
def test_stopped_run_loses_no_epoch_and_resumes_to_the_same_weights(
    digits_config: MakeConfig, kind: type[Event], stage: str, resumed_epochs: int
) -> None:
    straight = train(digits_config(run="straight"))
    stop, first, second = StopRequest(), [], []

    def listen(event: Event) -> None:
        first.append(event)
        if isinstance(event, kind) and event.stage == stage:
            stop.ask()

    with pytest.raises(RunInterrupted):
        train(digits_config(run="stopped"), on_event=listen, stop=stop)
    assert not [event for event in first if isinstance(event, StageFailed)]
    resumed = train(digits_config(run="stopped"), on_event=second.append)
    assert resumed["weights_checksum"] == straight["weights_checksum"]
    begun = next(event for event in second if isinstance(event, StageStarted) and event.stage.startswith("block"))
    assert begun.resumed_epochs == resumed_epochs
    assert _epochs(first) + _epochs(second) == sum(2 for _ in straight["blocks"])


def _epochs(events: list[Any]) -> int:
    return sum(isinstance(event, EpochDone) for event in events)
