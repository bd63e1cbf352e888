"""events.jsonl of a run: what happened, in order, readable while the run works.

Progress within an epoch goes to the listener only. The object is rewritten at most every few seconds, since an
object store cannot append, and at every change of stage. It is held in memory: a log that becomes too long forgets
its older epochs, except each stage's newest.
"""

import json
import logging
import threading
import time
from collections.abc import Callable

from nf_pipeline.documents import parse_json
from nf_pipeline.errors import ObjectMissing, StorageError
from nf_pipeline.events import EpochDone, Event, Note, Progress, StageFailed
from nf_pipeline.storage.store import Store

logger = logging.getLogger(__name__)

Listener = Callable[[Event], None]

FLUSH_EVERY_S = 5.0
MAX_BYTES_PER_S = 100_000
MAX_LOG_BYTES = 16 * 2**20

_EPOCH = b'{"event": "EpochDone"'


class EventLog:
    """Hands events to listeners and keeps the run's log; appends to what an earlier driver wrote.

    Stages that run at the same time may add from several threads; a listener sees one event at a time.
    """

    def __init__(self, store: Store, key: str, *listeners: Listener) -> None:
        self._store = store
        self._key = key
        self._listeners = listeners
        self._lock = threading.RLock()
        try:
            self._lines = [bytes(store.get(key))]
        except ObjectMissing:
            self._lines = []
        self._max_bytes = MAX_LOG_BYTES
        self._flushed = time.monotonic()
        self._dirty = False

    def add(self, event: Event) -> None:
        """Takes one event."""
        with self._lock:
            for listener in self._listeners:
                listener(event)
            if isinstance(event, Progress):
                if self._dirty and time.monotonic() - self._flushed >= self._pause_s(event):
                    self.flush()
                return
            self._lines.append(json.dumps(event.to_json()).encode() + b"\n")
            self._dirty = True
            if self._num_bytes > self._max_bytes:
                self._forget_epochs()
            if time.monotonic() - self._flushed >= self._pause_s(event):
                self.flush()

    @property
    def _num_bytes(self) -> int:
        return sum(map(len, self._lines))

    def _forget_epochs(self) -> None:
        lines = b"".join(self._lines).splitlines(keepends=True)
        self._lines = [b"".join(_without_older_epochs(lines))]
        # Should epochs not be what makes it long, it may grow: going through all of it at every event would not end.
        self._max_bytes = max(MAX_LOG_BYTES, 2 * self._num_bytes)

    def _pause_s(self, event: Event) -> float:
        """Returns how long the log must have rested before an event is stored."""
        if isinstance(event, StageFailed):
            return 0.0
        # The whole object is written each time: a long log is written less often, whatever happens.
        rest_s = self._num_bytes / MAX_BYTES_PER_S
        return max(FLUSH_EVERY_S, rest_s) if isinstance(event, EpochDone | Note) else rest_s

    def flush(self) -> None:
        """Writes what has come since the last flush."""
        with self._lock:
            if not self._dirty:
                return
            self._lines = [b"".join(self._lines)]
            self._flushed = time.monotonic()
            try:
                self._store.put(self._key, self._lines[0])
            except StorageError as error:
                # The log is for people: losing its end must neither stop a training nor hide what did.
                logger.warning("the event log could not be written: %s", error)
                return
            self._dirty = False


def _without_older_epochs(lines: list[bytes]) -> list[bytes]:
    """Leaves out the older half of the finished epochs, but keeps the newest one of each stage: a status shows it."""
    epochs = [(position, stage) for position, line in enumerate(lines) if (stage := _stage_of_epoch(line))]
    newest = {stage: position for position, stage in epochs}
    older = {position for position, _ in epochs[: len(epochs) // 2]} - set(newest.values())
    return [line for position, line in enumerate(lines) if position not in older]


def _stage_of_epoch(line: bytes) -> str:
    """Returns the stage of a finished epoch; "" for any other line, and for one that cannot be understood."""
    try:
        return str(parse_json(line)["stage"]) if line.startswith(_EPOCH) else ""
    except (ValueError, TypeError, KeyError):
        return ""
