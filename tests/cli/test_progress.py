"""The displays, fed with whole sequences of events."""

import io
import re
from collections.abc import Callable

import pytest

from nf_pipeline.cli.progress import PlainProgress, RichProgress, WarningsOnly, open_progress
from nf_pipeline.events import (
    EpochDone,
    Event,
    Note,
    Progress,
    StageDone,
    StageFailed,
    StageSkipped,
    StageStarted,
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run_of_one_block() -> list[Event]:
    training = [
        Progress(
            stage="block-000",
            time_s=20.0 + i,
            phase="train",
            done=i,
            total=10,
            epoch=1,
            num_epochs=1,
            loss=2.0,
        )
        for i in range(10)
    ]
    return [
        StageSkipped(stage="ingest", time_s=10.0, note="verified"),
        StageStarted(stage="block-000", time_s=20.0, attempt="ab", worker="host:1"),
        *training,
        Note(stage="block-000", time_s=29.0, text="batch 32 -> 24", level="warning"),
        EpochDone(
            stage="block-000",
            time_s=30.0,
            epoch=1,
            num_epochs=1,
            losses=[0.5],
            val_accuracies=[0.75],
            images_per_s=100.0,
            loader_wait_s=0.0,
            peak_bytes=2**20,
        ),
        Progress(stage="block-000", time_s=31.0, phase="write", done=4, total=10),
        StageDone(stage="block-000", time_s=32.0, result={}, seconds=12.0),
        StageFailed(stage="model", time_s=33.0, attempt="cd", error="StorageError", text="disk full\nFix: free it"),
    ]


def show(display: Callable[[Event], None], events: list[Event]) -> None:
    for event in events:
        display(event)
    display.close()


def test_plain_progress_is_one_line_per_epoch_and_message() -> None:
    stream = io.StringIO()
    show(PlainProgress(stream), run_of_one_block())
    assert stream.getvalue().splitlines() == [
        "ingest | skipped: verified",
        "block 1 | started on host:1",
        "block 1 | warning: batch 32 -> 24",
        "block 1 | epoch 1/1 | loss 0.500 | val 75.0 % | img/s 100 | peak 1.0 MiB | ETA 0s",
        "block 1 | done in 12s",
        "model | failed: StorageError: disk full",
    ]


def test_plain_progress_of_a_long_epoch_gives_a_line_per_interval() -> None:
    stream = io.StringIO()
    display = PlainProgress(stream, interval_s=30.0)
    for second in range(100):
        display(Progress(stage="ingest", time_s=1000.0 + second, phase="read", done=second, total=100))
    lines = stream.getvalue().splitlines()
    assert [line.split()[3] for line in lines] == ["0/100", "30/100", "60/100", "90/100"]


@pytest.mark.parametrize(("stage", "phase"), [("block-000", "validate"), ("plan", "profile")])
def test_plain_progress_has_no_line_for_each_event_of_a_short_phase(stage: str, phase: str) -> None:
    stream = io.StringIO()
    display = PlainProgress(stream)
    display(StageStarted(stage=stage, time_s=1000.0, attempt="ab", worker="host:1"))
    for second in range(29):
        display(Progress(stage=stage, time_s=1000.0 + second, phase=phase, done=second, total=29))
    assert len(stream.getvalue().splitlines()) == 1


def test_warnings_only_shows_warnings_and_failures() -> None:
    stream = io.StringIO()
    show(WarningsOnly(stream), run_of_one_block())
    assert stream.getvalue().splitlines() == [
        "block 1 | warning: batch 32 -> 24",
        "model | failed: StorageError: disk full",
    ]


@pytest.fixture
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "xterm-256color")


def shown_text(stream: io.StringIO) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())


@pytest.mark.usefixtures("wide_terminal")
def test_rich_progress_draws_a_bar_with_all_fields_and_keeps_messages() -> None:
    stream = Terminal()
    display = RichProgress(stream)
    for event in run_of_one_block()[:-3]:
        display(event)
    display.close()
    text = shown_text(stream)
    assert re.search(r"block 1 ━+ epoch 1/1 \| loss 0\.500 \| val 75\.0 % \| img/s 100 \| peak 1\.0 MiB", text)
    assert "block 1 | warning: batch 32 -> 24" in text
    assert stream.getvalue().rstrip("\n").endswith("\x1b[?25h")  # the cursor is visible again


@pytest.mark.usefixtures("wide_terminal")
@pytest.mark.parametrize(
    ("event", "shown"),
    [
        (Progress(stage="plan", time_s=1.0, phase="profile", done=3, total=12), r"plan \S+ profile 3/12"),
        (
            Progress(stage="block-000", time_s=1.0, phase="validate", done=1, total=9, epoch=2, num_epochs=3),
            r"block 1 \S+ epoch 2/3 validate 1/9 \|",
        ),
    ],
)
def test_rich_progress_shows_the_phase(event: Event, shown: str) -> None:
    stream = Terminal()
    show(RichProgress(stream), [event])
    assert re.search(shown, shown_text(stream))


@pytest.mark.usefixtures("wide_terminal")
def test_rich_progress_draws_a_new_bar_for_a_second_attempt() -> None:
    stream = Terminal()
    start = StageStarted(stage="block-000", time_s=1.0, attempt="ab", worker="host:1")
    first, second = (
        Progress(stage="block-000", time_s=2.0, phase="train", done=1, total=2, epoch=epoch, num_epochs=2)
        for epoch in (2, 1)
    )
    failed = StageFailed(stage="block-000", time_s=3.0, attempt="ab", error="WorkerLost", text="gone")
    show(RichProgress(stream), [start, first, failed, start, second])
    bars = shown_text(stream).splitlines()[-2:]
    assert [re.findall(r"epoch \d/\d", bar) for bar in bars] == [["epoch 2/2"], ["epoch 1/2"]]
    assert "\x1b[1A" in stream.getvalue()  # up one line: the last frame is two lines high


@pytest.mark.usefixtures("wide_terminal")
def test_rich_progress_prints_texts_with_brackets_as_they_are() -> None:
    stream = Terminal()
    show(RichProgress(stream), [Note(stage="ingest", time_s=1.0, text="skipped [red]x[/nothing].png")])
    assert "ingest | skipped [red]x[/nothing].png" in shown_text(stream)


@pytest.mark.parametrize(
    ("stream", "term", "quiet", "kind"),
    [
        (Terminal(), "xterm", False, RichProgress),
        (Terminal(), "dumb", False, PlainProgress),
        (Terminal(), "xterm", True, WarningsOnly),
        (io.StringIO(), "xterm", False, PlainProgress),
    ],
)
def test_open_progress_chooses_by_stream(
    stream: io.StringIO, term: str, quiet: bool, kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", term)
    display = open_progress(stream, quiet=quiet)
    display.close()
    assert type(display) is kind
