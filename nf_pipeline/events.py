"""What a stage reports while it works: small frozen records, written as JSON lines, rendered by the driver.

A stage is a generator of events that ends with `StageDone`. Events carry numbers and names only, never tensors.
"""

import time
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Event:
    """Base of all events.

    Attributes:
        stage: "ingest", "plan", "block-000", ..., "model".
        time_s: Unix time at which it happened.
    """

    stage: str
    time_s: float = field(default_factory=time.time)

    def to_json(self) -> dict[str, Any]:
        """Returns the fields plus `event`, the class name."""
        return {"event": type(self).__name__, **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class StageStarted(Event):
    """An attempt at a stage begins.

    Attributes:
        attempt: id of the attempt; its objects live under this name.
        worker: host and process that run it.
        resumed_epochs: epochs taken over from a checkpoint.
        round_idx, num_rounds: 0-based round of a block in pipelined mode, and how many there are.
        note: one line for the log.
    """

    attempt: str
    worker: str
    resumed_epochs: int = 0
    round_idx: int = 0
    num_rounds: int = 1
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Progress(Event):
    """Part of a stage is done.

    Attributes:
        phase: "read", "profile", "wait", "train", "validate" or "write".
        done, total: in the phase's own unit (samples, units of the profile); total 0 if unknown.
        epoch, num_epochs: 1-based epoch, 0 outside training.
        loss: newest fetched training loss of the last unit.
        images_per_s: in this phase.
        peak_bytes: measured since the stage began.
    """

    phase: str
    done: int
    total: int
    epoch: int = 0
    num_epochs: int = 0
    loss: float | None = None
    images_per_s: float | None = None
    peak_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class EpochDone(Event):
    """One pass over the train split ended and is checkpointed.

    Attributes:
        epoch, num_epochs: 1-based.
        losses: mean training loss per unit of the block.
        val_accuracies: accuracy in [0, 1] on the validation split per unit of the block, where classes are predicted.
        val_errors: where values are, the part of their variance on that split that each unit leaves, 0 or more.
        images_per_s: training samples per second of this epoch.
        loader_wait_s: seconds the training loop waited for data in this epoch.
        peak_bytes: measured since the stage began.
    """

    epoch: int
    num_epochs: int
    losses: list[float]
    images_per_s: float
    loader_wait_s: float
    peak_bytes: int
    val_accuracies: list[float] = field(default_factory=list)
    val_errors: list[float] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Publishing(Event):
    """A block begins to write its activations: from now on the next block can read them as they come.

    Attributes:
        round_idx: 0-based.
    """

    round_idx: int


@dataclass(frozen=True, kw_only=True)
class Note(Event):
    """Something a person should know: a changed batch size, a skipped image, a retry.

    Attributes:
        level: "info" or "warning".
        text: one line.
    """

    text: str
    level: str = "info"


@dataclass(frozen=True, kw_only=True)
class StageSkipped(Event):
    """A stage was found finished and verified.

    Attributes:
        note: one line for the log.
    """

    note: str = ""


@dataclass(frozen=True, kw_only=True)
class StageNotNeeded(Event):
    """A stage is left out: the run ends without it.

    Attributes:
        note: one line for the log.
    """

    note: str = ""


@dataclass(frozen=True, kw_only=True)
class StageFailed(Event):
    """An attempt ended with an error.

    Attributes:
        attempt: id of the attempt.
        error: class name of the error.
        text: its message.
    """

    attempt: str
    error: str
    text: str


@dataclass(frozen=True, kw_only=True)
class StageDone(Event):
    """The stage is committed.

    Attributes:
        result: small JSON document, the stage's facts.
        seconds: wall time of the attempt.
    """

    result: dict[str, Any]
    seconds: float
