"""What a run's events say so far, as short texts: the state behind every progress display.

Time comes from the events, never from a clock, so that the same events give the same texts. Knows nothing of
terminals. Entry: `RunView.update`, then `line`, `fraction` or `messages`.
"""

from collections.abc import Callable
from dataclasses import dataclass

from nf_pipeline.cli.metric_text import error_text, percent
from nf_pipeline.events import (
    EpochDone,
    Event,
    Note,
    Progress,
    StageDone,
    StageFailed,
    StageNotNeeded,
    StageSkipped,
    StageStarted,
)
from nf_pipeline.plans import BlockPlan, Plan
from nf_pipeline.units import format_bytes

_BLOCK_PREFIX = "block-"
_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


@dataclass
class _StageState:
    started_s: float
    resumed_epochs: int = 0
    num_rounds: int = 1
    updated_s: float = 0.0
    phase: str = ""
    done: int = 0
    total: int = 0
    epoch: int = 0
    num_epochs: int = 0
    trained: float = 0.0
    loss: float | None = None
    val_accuracy: float | None = None
    val_error: float | None = None
    images_per_s: float | None = None
    peak_bytes: int | None = None
    seconds: float | None = None

    @property
    def is_training(self) -> bool:
        return self.num_epochs > 0 and self.phase in ("train", "validate")


class RunView:
    """Follows the events of one run.

    Args:
        plan: the run's plan if it is known before the first event, as on resume; otherwise it is taken
            from the event that ends the plan stage.
    """

    def __init__(self, plan: Plan | None = None) -> None:
        self._plan = plan
        self._stages: dict[str, _StageState] = {}

    def update(self, event: Event) -> None:
        """Takes one event in."""
        if isinstance(event, StageStarted) or event.stage not in self._stages:
            self._stages[event.stage] = _StageState(started_s=event.time_s)
        state = self._stages[event.stage]
        state.updated_s = event.time_s
        if isinstance(event, StageStarted):
            state.resumed_epochs, state.num_rounds = event.resumed_epochs, event.num_rounds
        elif isinstance(event, Progress):
            _take_progress(state, event)
        elif isinstance(event, EpochDone):
            _take_epoch(state, event)
        elif isinstance(event, StageDone):
            self._take_end(state, event)

    def label(self, stage: str) -> str:
        """Names a stage for people: "block 3/7" (1-based) or the stage's own name."""
        if not stage.startswith(_BLOCK_PREFIX):
            return stage
        number = int(stage.removeprefix(_BLOCK_PREFIX)) + 1
        return f"block {number}/{len(self._plan.blocks)}" if self._plan else f"block {number}"

    def fraction(self, stage: str) -> float:
        """Returns the part in [0, 1] that is done: of all epochs while a block trains, else of the phase."""
        state = self._stages.get(stage)
        if state is None:
            return 0.0
        if state.is_training:
            return state.trained
        return state.done / state.total if state.total else 0.0

    def eta_s(self, stage: str) -> float | None:
        """Estimates the seconds until this block and all later ones are trained.

        Every block sees the same rows for the same number of epochs, so what differs is the work per sample:
        the speed measured in this block (FLOPs per second since the attempt began) is applied to the FLOPs
        that are left. Stopping early, retries and writing the last shards are not foreseen. The blocks of a
        pipelined run train side by side: only this one's own epochs count, at the speed of this round.

        Returns:
            Seconds from the last event on; None before anything is measured.
        """
        state = self._stages.get(stage)
        if state is None or not state.num_epochs:
            return None
        gained = state.trained - state.resumed_epochs / state.num_epochs
        elapsed_s = state.updated_s - state.started_s
        if gained <= 0 or elapsed_s <= 0:
            return None
        later = self._later_work(stage) if state.num_rounds == 1 else 0.0
        return elapsed_s / gained * (1 - state.trained + later)

    def line(self, stage: str) -> str:
        """Describes where a stage stands, in a fixed order of fields; "-" marks what is not known yet."""
        return " | ".join([self.label(stage), *self.fields(stage)])

    def fields(self, stage: str) -> list[str]:
        """Returns the parts of `line` after the label."""
        state = self._stages[stage]
        if state.is_training:
            return self._training_fields(stage, state)
        parts = [_phase_text(state)]
        if state.images_per_s is not None:
            parts.append(f"img/s {state.images_per_s:,.0f}")
        return parts

    def messages(self, event: Event) -> list[str]:
        """Returns the lines for starts, ends, notes and failures; none for progress."""
        say = _MESSAGES.get(type(event))
        label = self.label(event.stage)
        texts = [] if say is None else say(event)
        lines = [f"{label} | {text}" for text in texts]
        if isinstance(event, StageDone) and event.stage == "plan" and self._plan is not None:
            lines += [_planned_block(self._plan, block) for block in self._plan.blocks]
        return lines

    def _training_fields(self, stage: str, state: _StageState) -> list[str]:
        budget = self._plan.blocks[int(stage.removeprefix(_BLOCK_PREFIX))].budget_bytes if self._plan else None
        return [
            f"epoch {state.epoch}/{state.num_epochs}"
            + (f" {_phase_text(state)}" if state.phase == "validate" else ""),
            f"loss {_or_dash(state.loss, '.3f')}",
            format_validation(state.val_accuracy, state.val_error),
            f"img/s {_or_dash(state.images_per_s, ',.0f')}",
            f"peak {format_peak(state.peak_bytes, budget)}",
            f"ETA {format_duration(self.eta_s(stage))}"
            if state.seconds is None
            else f"took {format_duration(state.seconds)}",
        ]

    def _take_end(self, state: _StageState, event: StageDone) -> None:
        state.seconds = event.seconds
        if state.num_epochs:  # what is left to see of a block is its training, not the last phase
            state.phase, state.trained = "train", state.epoch / state.num_epochs
        if event.stage == "plan" and "blocks" in event.result:
            self._plan = Plan.from_json(event.result)

    def _later_work(self, stage: str) -> float:
        if self._plan is None:
            return 0.0
        block_idx = int(stage.removeprefix(_BLOCK_PREFIX))
        work = [_block_flops(self._plan, block) for block in self._plan.blocks]
        return sum(work[block_idx + 1 :]) / max(1, work[block_idx])


def format_validation(accuracy: float | None, error: float | None) -> str:
    """Formats what validation found, "val 61.3 %" of classes, "val error 0.412" of values; "val -" before either."""
    return f"val {percent(accuracy)}" if error is None else f"val error {error_text(error)}"


def format_duration(seconds: float | None) -> str:
    """Formats seconds in at most two units, "35s", "4m", "1h 20m"; "-" for None."""
    if seconds is None:
        return "-"
    minutes = round(seconds / 60)
    if seconds < 59.5:
        return f"{max(0, round(seconds))}s"
    return f"{minutes}m" if minutes < 60 else f"{minutes // 60}h {minutes % 60}m"


def format_peak(peak_bytes: int | None, budget_bytes: int | None) -> str:
    """Formats a peak against its budget in one unit, "5.1/6.0 GiB (85 %)"; "-" for an unknown peak."""
    if peak_bytes is None:
        return "-"
    if not budget_bytes:
        return format_bytes(peak_bytes)
    unit, factor = next(((unit, size) for unit, size in _UNITS if budget_bytes >= size), ("B", 1))
    used = f"{peak_bytes / factor:.1f}/{budget_bytes / factor:.1f} {unit}"
    return f"{used} ({peak_bytes / budget_bytes:.0%})".replace("%", " %")


def _take_progress(state: _StageState, event: Progress) -> None:
    state.phase, state.done, state.total = event.phase, event.done, event.total
    if event.images_per_s is not None and not (event.phase == "validate" and state.is_training):
        state.images_per_s = event.images_per_s  # a block shows the speed of its training
    state.peak_bytes = event.peak_bytes if event.peak_bytes is not None else state.peak_bytes
    state.loss = event.loss if event.loss is not None else state.loss
    if not event.num_epochs:
        return
    state.epoch, state.num_epochs = event.epoch, event.num_epochs
    if event.phase == "train" and event.total:
        state.trained = (event.epoch - 1 + event.done / event.total) / event.num_epochs


def _phase_text(state: _StageState) -> str:
    return f"{state.phase} {state.done:,}/{state.total:,}" if state.total else f"{state.phase} {state.done:,}"


def _take_epoch(state: _StageState, event: EpochDone) -> None:
    state.phase, state.epoch, state.num_epochs = "train", event.epoch, event.num_epochs
    state.trained = event.epoch / event.num_epochs
    state.loss = event.losses[-1] if event.losses else state.loss
    state.val_accuracy = event.val_accuracies[-1] if event.val_accuracies else state.val_accuracy
    state.val_error = event.val_errors[-1] if event.val_errors else state.val_error
    state.images_per_s, state.peak_bytes = event.images_per_s, event.peak_bytes


def _block_flops(plan: Plan, block: BlockPlan) -> int:
    layers = plan.layers[block.layers[0] : block.layers[1]]
    beside = sum(unit.head_flops + unit.context_flops for unit in plan.units_of(block))
    return sum(layer.flops for layer in layers) + beside


def _planned_block(plan: Plan, block: BlockPlan) -> str:
    parts = [
        "plan",
        f"block {block.block_idx + 1}/{len(plan.blocks)}",
        f"layers {block.layers[0]}-{block.layers[1] - 1}",
        f"batch {block.batch_size}",
        f"predicted peak {format_peak(block.predicted_peak_bytes, block.budget_bytes)}",
        block.reason,
    ]
    return " | ".join(parts)


def _or_dash(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def _say_started(event: StageStarted) -> list[str]:
    resumed = f", {event.resumed_epochs} epochs taken over from a checkpoint" if event.resumed_epochs else ""
    return [f"started on {event.worker}{resumed}" + (f" | {event.note}" if event.note else "")]


def _say_failed(event: StageFailed) -> list[str]:
    return [f"failed: {event.error}: {event.text.splitlines()[0] if event.text else ''}"]


def _say_note(event: Note) -> list[str]:
    return [event.text if event.level == "info" else f"{event.level}: {event.text}"]


_MESSAGES: dict[type[Event], Callable[..., list[str]]] = {
    StageStarted: _say_started,
    StageSkipped: lambda event: ["skipped" + (f": {event.note}" if event.note else "")],
    StageNotNeeded: lambda event: ["not needed" + (f": {event.note}" if event.note else "")],
    StageFailed: _say_failed,
    Note: _say_note,
    StageDone: lambda event: [f"done in {format_duration(event.seconds)}"],
}
