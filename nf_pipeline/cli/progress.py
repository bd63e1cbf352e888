"""Shows a run's events while they happen: one bar per stage on a terminal, plain lines in a job's log.

What the texts say is decided in `run_view`; nothing here decides anything about the run. rich is loaded only
where there is a terminal. Entry: `open_progress`.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Protocol, TextIO

from nf_pipeline.cli.run_view import RunView
from nf_pipeline.events import EpochDone, Event, Note, Progress, StageDone, StageFailed, StageNotNeeded, StageSkipped
from nf_pipeline.plans import Plan

if TYPE_CHECKING:
    from rich.progress import Progress as RichBars
    from rich.progress import TaskID

_ENDS = (StageDone, StageSkipped, StageNotNeeded, StageFailed)


class ProgressDisplay(Protocol):
    """Takes events; `close` leaves the terminal as it was."""

    def __call__(self, event: Event) -> None: ...

    def close(self) -> None: ...


def open_progress(stream: TextIO, *, plan: Plan | None = None, quiet: bool = False) -> ProgressDisplay:
    """Chooses the display that suits a stream.

    Args:
        stream: where it writes; a terminal gets bars, anything else lines.
        plan: the run's plan, if it is known already.
        quiet: show warnings and failures only.
    """
    if quiet:
        return WarningsOnly(stream, plan=plan)
    if stream.isatty() and os.environ.get("TERM") != "dumb":
        return RichProgress(stream, plan=plan)
    return PlainProgress(stream, plan=plan)


class PlainProgress:
    """One line per finished epoch and per message, and one now and then while nothing else happens.

    Args:
        stream: text stream; every line is flushed.
        plan: the run's plan, if it is known already.
        interval_s: seconds between two lines of the same stage while it only makes progress, by the
            events' own time.
    """

    def __init__(self, stream: TextIO, *, plan: Plan | None = None, interval_s: float = 30.0) -> None:
        self._stream = stream
        self._view = RunView(plan)
        self._interval_s = interval_s
        self._last_line_s = 0.0

    def __call__(self, event: Event) -> None:
        """Shows one event."""
        self._view.update(event)
        lines = self._view.messages(event)
        overdue = event.time_s - self._last_line_s >= self._interval_s
        if isinstance(event, EpochDone) or (isinstance(event, Progress) and overdue):
            lines.append(self._view.line(event.stage))
        if lines:
            self._last_line_s = event.time_s
            print(*lines, sep="\n", file=self._stream, flush=True)

    def close(self) -> None:
        """Has nothing to restore."""


class WarningsOnly:
    """Shows warnings and failures, nothing else."""

    def __init__(self, stream: TextIO, *, plan: Plan | None = None) -> None:
        self._stream = stream
        self._view = RunView(plan)

    def __call__(self, event: Event) -> None:
        """Shows the event if it is a warning or a failure."""
        self._view.update(event)
        if isinstance(event, StageFailed) or (isinstance(event, Note) and event.level != "info"):
            print(*self._view.messages(event), sep="\n", file=self._stream, flush=True)

    def close(self) -> None:
        """Has nothing to restore."""


class RichProgress:
    """One bar per stage that stays when the stage ends; messages scroll above the bars.

    Args:
        stream: a terminal.
        plan: the run's plan, if it is known already.
    """

    def __init__(self, stream: TextIO, *, plan: Plan | None = None) -> None:
        self._view = RunView(plan)
        self._bars = _make_bars(stream)
        self._tasks: dict[str, TaskID] = {}
        self._bars.start()

    def __call__(self, event: Event) -> None:
        """Shows one event."""
        self._view.update(event)
        for line in self._view.messages(event):
            self._bars.console.print(line, markup=False, highlight=False, soft_wrap=True)
        if isinstance(event, Progress | EpochDone):
            self._advance(event.stage)
        elif isinstance(event, _ENDS) and event.stage in self._tasks:
            self._end(event)

    def close(self) -> None:
        """Stops drawing and shows the cursor again."""
        self._bars.stop()

    def _advance(self, stage: str) -> None:
        label = self._view.label(stage)
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(label, total=1.0, fields="")
        self._bars.update(
            self._tasks[stage],
            description=label,
            completed=self._view.fraction(stage),
            fields=" | ".join(self._view.fields(stage)),
        )

    def _end(self, event: Event) -> None:
        if isinstance(event, StageDone) and 0.0 < self._view.fraction(event.stage) < 1.0:
            return  # a round: the block goes on in the same bar
        task = self._tasks.pop(event.stage)
        if isinstance(event, StageDone):
            self._bars.update(task, completed=1.0, fields=" | ".join(self._view.fields(event.stage)))
        self._bars.stop_task(task)


def _make_bars(stream: TextIO) -> RichBars:
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as RichBars
    from rich.table import Column

    # Fields wrap on a narrow terminal instead of losing the ETA at their end.
    fields = TextColumn("{task.fields[fields]}", markup=False, table_column=Column(overflow="fold"))
    label = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True))
    return RichBars(label, BarColumn(bar_width=12), fields, console=Console(file=stream), auto_refresh=True)
