"""One stage, from "is it done already?" to its committed manifest, with the attempts in between."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nf_pipeline.driver.event_log import EventLog, Listener
from nf_pipeline.driver.stop_request import StopRequest
from nf_pipeline.errors import (
    AlreadyExists,
    InputReplaced,
    InternalError,
    ObjectCorrupt,
    OutOfBudget,
    RunInterrupted,
    StageOutdated,
    StageStopped,
)
from nf_pipeline.events import Event, Note, StageDone, StageFailed, StageSkipped
from nf_pipeline.executors.base import Executor, IsWanted, Resources, always
from nf_pipeline.redact import redacted
from nf_pipeline.retry import Decision, decide
from nf_pipeline.storage.layout import new_attempt_id
from nf_pipeline.storage.manifest import StageManifest, read_manifest, verify_manifest
from nf_pipeline.storage.sealed import repair_fix
from nf_pipeline.storage.store import Store

MakeTask = Callable[[str, int, int], Any]
"""(attempt id, attempts so far with this one, how often the batch must shrink) -> the stage's task."""


def never() -> bool:
    """Says no."""
    return False


@dataclass(frozen=True, kw_only=True)
class StageWork:
    """A stage that is to run.

    Attributes:
        name: "ingest", "plan", "block-000", ... or "model".
        function: "package.module:function" of its generator function.
        make_task: makes the argument of an attempt.
        resources: what the worker must have.
        commit_key: object whose existence means that the stage is done; "" if the driver commits it.
        attempts_before: by earlier drivers.
        is_wanted: asked while the stage waits or runs elsewhere; False ends it with `InputReplaced`.
        is_left_out: asked when it has ended so: True if nobody needs it any more, which is no failure.
    """

    name: str
    function: str
    make_task: MakeTask
    resources: Resources
    commit_key: str = ""
    attempts_before: int = 0
    is_wanted: IsWanted = always
    is_left_out: IsWanted = never


def ignore(event: Event) -> None:
    """Listens to nothing."""


class StageRunner:
    """Runs stages on an executor and logs what happens to them."""

    def __init__(self, store: Store, log: EventLog, executor: Executor, run: str, stop: StopRequest) -> None:
        self.store = store
        self.stop = stop
        self._log = log
        self._executor = executor
        self._run = run

    def committed(self, stage: str, key: str, fingerprint: str | None, fix: str = "") -> StageManifest | None:
        """Returns a finished stage's manifest after checking that what it names is there.

        Args:
            stage: name of the stage.
            key: of its manifest.
            fingerprint: that the manifest must have; None takes any.
            fix: what to do about objects that are damaged, where repeating this stage alone will not do.

        Raises:
            StageOutdated: the manifest belongs to other work.
            ObjectCorrupt: it is damaged, or names objects that are missing or cut short.
        """
        manifest = read_manifest(self.store, key)
        if manifest is None:
            return None
        if fingerprint is not None and manifest.fingerprint != fingerprint:
            raise StageOutdated(
                f"{key} has fingerprint {manifest.fingerprint}, this run's configuration and inputs give "
                f"{fingerprint}",
                self.store.uri,
                fix or repair_fix(self.store, key),
                key,
            )
        problems = verify_manifest(self.store, manifest)
        if problems:
            raise ObjectCorrupt(
                f"{stage} is committed, but {len(problems)} objects that {key} names are not there as written: "
                f"{'; '.join(problems[:3])}",
                self.store.uri,
                fix or repair_fix(self.store, key),
            )
        self._log.add(StageSkipped(stage=stage, note="finished before, verified"))
        return manifest

    def run(self, work: StageWork, listen: Listener = ignore) -> dict[str, Any]:
        """Runs attempts at a stage until one is done or the retry table gives up.

        Args:
            work: the stage.
            listen: called with its events, after they are logged.

        Returns:
            The result of the attempt that finished; empty if another one's commit was found. What counts is the
            manifest.

        Raises:
            NFError: as the last attempt raised it.
        """
        failures: Counter[type[BaseException]] = Counter()
        while True:
            attempt = new_attempt_id()
            try:
                return self._attempt(work, attempt, failures, listen)
            except (StageStopped, RunInterrupted):
                raise
            except AlreadyExists:
                if work.commit_key and self.store.size(work.commit_key) is None:
                    raise
                # An attempt that was given up for lost can still finish first: its commit counts.
                self._log.add(Note(stage=work.name, text=f"attempt {attempt}: another one committed first"))
                return {}
            except Exception as error:  # logged here, whatever it is, and raised again unless it is worth a retry
                if isinstance(error, InputReplaced):
                    self.stop.check()  # ended before it began, because that was asked for
                if work.is_left_out():
                    raise self._left_out(work, attempt, error) from error
                failures[type(error)] += 1
                decision = decide(error, failures[type(error)])
                text = redacted(str(error))
                failed = StageFailed(stage=work.name, attempt=attempt, error=type(error).__name__, text=text)
                self._log.add(failed)
                listen(failed)
                if decision is Decision.RAISE:
                    raise
                note = f"attempt {failures.total()} failed ({type(error).__name__}): {decision.value}"
                self._log.add(Note(stage=work.name, level="warning", text=note))
            if work.commit_key and self.store.size(work.commit_key) is not None:
                self._log.add(Note(stage=work.name, text="the lost attempt had committed: nothing to repeat"))
                return {}

    def _left_out(self, work: StageWork, attempt: str, error: Exception) -> InputReplaced:
        """Says that nobody needs the stage any more; a failure is told, but is no reason to repeat or to end."""
        if not isinstance(error, InputReplaced):
            failure = f"{type(error).__name__}: {redacted(str(error))}"
            text = f"attempt {attempt} failed, but the run needs this block no longer: {failure}"
            self._log.add(Note(stage=work.name, level="warning", text=text))
        return InputReplaced(work.name, f"attempt {attempt} has ended: the run needs this block no longer")

    def _attempt(
        self, work: StageWork, attempt: str, failures: Counter[type[BaseException]], listen: Listener
    ) -> dict[str, Any]:
        num_attempts = work.attempts_before + failures.total() + 1
        task = work.make_task(attempt, num_attempts, failures[OutOfBudget])
        name = f"{self._run}/{work.name} attempt {num_attempts}"
        result, has_begun = None, False
        self.stop.check()

        def is_wanted() -> bool:
            return work.is_wanted() and (has_begun or not self.stop.is_asked)

        for event in self._executor.run(name, work.function, task, work.resources, is_wanted):
            has_begun = True
            self._log.add(event)
            listen(event)
            if isinstance(event, StageDone):
                result = event.result
            else:
                self.stop.check(event)
        if result is None:
            raise InternalError(f"{work.name} ended without a result")
        return result
