"""Only one driver works on a run: a lease in the run's store, renewed while its holder lives.

Whoever wants the run creates `lock/GENERATION.json` one above the newest; creating is exclusive, so of several only
one gets it. The holder counts up a beat in it. A beat that does not move for `EXPIRES_AFTER_S` means that the holder
is gone: nobody compares clocks of different machines, a waiting driver only watches. A holder that was frozen and
wakes up finds a newer generation and ends; until then its commits are harmless, as every commit counts only once.
A store without exclusive creation (older MinIO code) may let two drivers in at the same moment: the one whose record
was overwritten notices at its next beat. Deliberately knows nothing of what a driver does. Entry: `hold_run`.
"""

import json
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from nf_pipeline.documents import parse_json
from nf_pipeline.errors import AlreadyExists, ObjectMissing, RunLocked, StorageError
from nf_pipeline.host import has_ended, process_identity, worker_name
from nf_pipeline.storage.layout import RunLayout
from nf_pipeline.storage.store import Store

logger = logging.getLogger(__name__)

RENEW_EVERY_S = 5.0
EXPIRES_AFTER_S = 30.0
LOOK_EVERY_S = 0.5
RELEASE_TIMEOUT_S = 5.0
SURE_FOR_S = 15.0
"""A holder that has not renewed for so long, by a clock that also runs while it sleeps, asks before it goes on."""


@dataclass(frozen=True, kw_only=True)
class LockRecord:
    """What one generation of the lock says.

    Attributes:
        generation: counts the drivers that have held the run; part of the key.
        holder: "host:pid", for people.
        process: the holder's process, as `host.process_identity` names it.
        token: random, of this very holder.
        since_s: seconds since 1970 by the holder's clock, for people.
        beat: counts up while the holder lives.
        is_released: the holder has ended in order.
    """

    generation: int
    holder: str
    process: str
    token: str
    since_s: float
    beat: int = 0
    is_released: bool = False

    @property
    def is_free(self) -> bool:
        """Whether the holder has released the run, or is a process of this machine that has ended."""
        return self.is_released or has_ended(self.process)


@contextmanager
def hold_run(
    store: Store,
    layout: RunLayout,
    *,
    patience_s: float = EXPIRES_AFTER_S,
    on_wait: Callable[[str], None] = logger.info,
) -> Iterator["RunLock"]:
    """Holds a run until the block ends, however it ends.

    Args:
        store, layout: of the run.
        patience_s: how long a silent holder is watched before its lock is taken over; shorter is not safe.
        on_wait: told, once, that a holder is being watched.

    Raises:
        RunLocked: a living driver holds the run; names it.
        StorageError: the store cannot be read or written.
    """
    lock = RunLock(store, layout, _acquire(store, layout, patience_s, on_wait))
    try:
        yield lock
    finally:
        lock.release()


def read_lock(store: Store, layout: RunLayout) -> LockRecord | None:
    """Returns the newest generation of a run's lock; None if no driver has ever held it, or it is unreadable."""
    return _look(store, layout)[1]


class RunLock:
    """The lock of a run, held by this process; a thread renews it."""

    def __init__(self, store: Store, layout: RunLayout, record: LockRecord) -> None:
        self._store = store
        self._layout = layout
        self._record = record
        self._lost_to: LockRecord | None = None
        self._renewed_s = time.time()
        self._renewing = threading.Lock()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="run-lock", daemon=True)
        self._thread.start()

    @property
    def is_lost(self) -> bool:
        """Whether another driver holds the run now."""
        return self._lost_to is not None

    def check(self) -> None:
        """Ends a driver whose run was taken over; one that was frozen finds out here before it does anything.

        Raises:
            RunLocked: another driver holds the run now.
        """
        if abs(time.time() - self._renewed_s) > SURE_FOR_S:
            self._renew(is_released=False)
        if self._lost_to is not None:
            raise RunLocked(
                f"run {self._layout.run!r} was taken over by {self._lost_to.holder}: this driver had not renewed its "
                f"lock for {EXPIRES_AFTER_S:.0f} s",
                "let the other one finish; what this one committed counts",
            )

    def release(self) -> None:
        """Lets the next driver in at once; a store that does not answer is not waited for."""
        self._ending.set()
        self._thread.join(RELEASE_TIMEOUT_S)

    def _keep(self) -> None:
        while not self._ending.wait(RENEW_EVERY_S):
            self._renew(is_released=False)
        self._renew(is_released=True)

    def _renew(self, *, is_released: bool) -> None:
        if not self._renewing.acquire(timeout=RELEASE_TIMEOUT_S):
            return  # another thread is at it, and waits for a store that does not answer
        try:
            self._lost_to = self._lost_to or self._find_successor()
            if self._lost_to is None:
                self._record = replace(self._record, beat=self._record.beat + 1, is_released=is_released)
                _write(self._store.put, self._layout, self._record)
        except (StorageError, OSError, RuntimeError) as error:
            # The beats must go on: without them the run is given away. RuntimeError is what a client's event loop
            # raises that is being closed. Any other error is ours, and ends the driver at its next event.
            # Nobody else can take a run over in a store that cannot be reached; if only we cannot, we find out later.
            logger.warning("the lock of run %s could not be renewed: %s", self._layout.run, error)
        finally:
            self._renewed_s = time.time()
            self._renewing.release()

    def _find_successor(self) -> LockRecord | None:
        newest = read_lock(self._store, self._layout)
        if newest is None or newest.token == self._record.token or newest.generation < self._record.generation:
            return None
        return newest


def await_free(
    store: Store,
    layout: RunLayout,
    patience_s: float = EXPIRES_AFTER_S,
    on_wait: Callable[[str], None] = logger.info,
) -> int:
    """Watches until nobody holds a run.

    Args:
        store, layout, patience_s, on_wait: see `hold_run`.

    Returns:
        The generation that was the last one; -1 if there was none.

    Raises:
        RunLocked: the holder lives; names it.
    """
    watched: LockRecord | None = None
    silent_s, looked = 0.0, time.monotonic()
    while True:
        generation, newest = _look(store, layout)
        # A look that took long says nothing of the holder: the store may have been away for both.
        silent_s += min(time.monotonic() - looked, 2 * LOOK_EVERY_S)
        looked = time.monotonic()
        if newest is None or newest.is_free:
            return generation
        if watched is None or newest.token != watched.token:
            watched, silent_s = newest, 0.0
            on_wait(f"{newest.holder} holds run {layout.run}: watching for up to {patience_s:.0f} s if it lives")
        elif newest.beat != watched.beat:
            raise _taken(layout, newest)
        elif silent_s > patience_s:
            return generation
        time.sleep(LOOK_EVERY_S)


def _acquire(store: Store, layout: RunLayout, patience_s: float, on_wait: Callable[[str], None]) -> LockRecord:
    while True:
        record = _create(store, layout, await_free(store, layout, patience_s, on_wait) + 1)
        if record is not None:
            return record


def _create(store: Store, layout: RunLayout, generation: int) -> LockRecord | None:
    """Creates a generation and removes older ones; None if another driver was faster."""
    record = LockRecord(
        generation=generation,
        holder=worker_name(),
        process=process_identity(),
        token=secrets.token_hex(8),
        since_s=time.time(),
    )
    try:
        _write(store.create, layout, record)
    except AlreadyExists:
        return None
    generations = _generations(store, layout)
    is_newest = generation == max(generations, default=generation)
    outdated = [older for older in generations if older < generation] if is_newest else [generation]
    try:
        store.delete([layout.lock(number) for number in outdated])
    except StorageError as error:  # who may not delete may still train
        logger.warning("old locks of run %s could not be deleted: %s", layout.run, error)
    return record if is_newest else None


def _look(store: Store, layout: RunLayout) -> tuple[int, LockRecord | None]:
    """Returns the newest generation, -1 if there is none, and what it says, None if that is nothing."""
    generation = max(_generations(store, layout), default=-1)
    return generation, None if generation < 0 else _read(store, layout, generation)


def _generations(store: Store, layout: RunLayout) -> list[int]:
    listed = (layout.lock_generation(key) for key, _ in store.list(layout.locks))
    return [generation for generation in listed if generation is not None]


def _read(store: Store, layout: RunLayout, generation: int) -> LockRecord | None:
    try:
        return _parse(parse_json(store.get(layout.lock(generation))), generation)
    except ObjectMissing:  # a newer driver has just removed it
        return None
    except (ValueError, TypeError, KeyError, OverflowError, OSError) as error:
        # Not worth a run: a new generation is made, and whoever wrote this ends when it sees that.
        logger.warning("%s is no lock: %s", layout.lock(generation), error)
        return None


def _parse(document: dict[str, Any], generation: int) -> LockRecord:
    since_s = float(document["since_s"])
    time.gmtime(since_s)  # refuses what is no time
    return LockRecord(
        generation=generation,
        holder=str(document["holder"]),
        process=str(document["process"]),
        token=str(document["token"]),
        since_s=since_s,
        beat=int(document["beat"]),
        is_released=document["is_released"] is True,
    )


def _write(write: Callable[[str, bytes], None], layout: RunLayout, record: LockRecord) -> None:
    document: dict[str, Any] = asdict(record)
    write(layout.lock(document.pop("generation")), json.dumps(document).encode())


def _taken(layout: RunLayout, record: LockRecord) -> RunLocked:
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(record.since_s))
    return RunLocked(
        f"run {layout.run!r} is held by {record.holder} since {since}",
        "wait until it has ended (nf-pipeline status shows how far the run is), stop it, or use another --run name",
    )
