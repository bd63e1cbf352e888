"""One stage, from "is it done already?" to its committed manifest, with the attempts in between."""

from collections.abc import Callable
from typing import Any

from nf_pipeline.driver.event_log import EventLog
from nf_pipeline.errors import AlreadyExists, InternalError, NFError, ObjectCorrupt
from nf_pipeline.events import Note, StageDone, StageFailed, StageSkipped
from nf_pipeline.executors.base import Executor, Resources
from nf_pipeline.retry import Decision, decide
from nf_pipeline.storage.layout import new_attempt_id
from nf_pipeline.storage.manifest import StageManifest, read_manifest, verify_manifest
from nf_pipeline.storage.store import Store

MakeTask = Callable[[str, int, int], Any]
"""(attempt id, attempts so far with this one, how often the batch shrank) -> the stage's task."""


class StageRunner:
    """Runs stages on an executor and logs what happens to them."""

    def __init__(self, store: Store, log: EventLog, executor: Executor) -> None:
        self._store = store
        self._log = log
        self._executor = executor

    def committed(self, stage: str, key: str, fingerprint: str | None) -> StageManifest | None:
        """Returns a finished stage's manifest after checking that what it names is there.

        Args:
            stage: name of the stage.
            key: of its manifest.
            fingerprint: that the manifest must have; None takes any.

        Raises:
            ObjectCorrupt: the manifest belongs to other work, or names objects that are missing or cut short.
        """
        manifest = read_manifest(self._store, key)
        if manifest is None:
            return None
        if fingerprint is not None and manifest.fingerprint != fingerprint:
            raise ObjectCorrupt(
                f"{key} has fingerprint {manifest.fingerprint}, this run's configuration and inputs give "
                f"{fingerprint}",
                self._store.uri,
                f"delete {key} to repeat {stage}, or use another --run name",
            )
        problems = verify_manifest(self._store, manifest)
        if problems:
            raise ObjectCorrupt(
                f"{stage} is committed, but {len(problems)} of its objects are not there as written: "
                f"{'; '.join(problems[:3])}",
                self._store.uri,
                f"delete {key} and resume: {stage} is repeated from its input",
            )
        self._log.add(StageSkipped(stage=stage, note="finished before, verified"))
        return manifest

    def run(
        self, stage_name: str, stage: str, make_task: MakeTask, resources: Resources, attempts_before: int = 0
    ) -> dict[str, Any]:
        """Runs attempts at a stage until one is done or the retry table gives up.

        Returns:
            The result of the attempt that finished; empty if it found another one's commit. What counts is the
            manifest.

        Raises:
            NFError: as the last attempt raised it.
        """
        attempts, shrunk = 0, 0
        while True:
            attempt = new_attempt_id()
            attempts += 1
            try:
                task = make_task(attempt, attempts_before + attempts, shrunk)
                return self._attempt(stage_name, stage, task, resources)
            except AlreadyExists:
                # An attempt that was given up for lost can still finish first: its commit counts.
                self._log.add(Note(stage=stage_name, text=f"attempt {attempt}: another one committed first"))
                return {}
            except NFError as error:
                self._log.add(
                    StageFailed(stage=stage_name, attempt=attempt, error=type(error).__name__, text=str(error))
                )
                decision = decide(error, attempts)
                if decision is Decision.RAISE:
                    raise
                shrunk += decision is Decision.SHRINK_BATCH
                note = f"attempt {attempts} failed ({type(error).__name__}): {decision.value}"
                self._log.add(Note(stage=stage_name, level="warning", text=note))

    def _attempt(self, stage_name: str, stage: str, task: Any, resources: Resources) -> dict[str, Any]:
        result = None
        for event in self._executor.run(stage_name, stage, task, resources):
            self._log.add(event)
            if isinstance(event, StageDone):
                result = event.result
        if result is None:
            raise InternalError(f"{stage_name} ended without a result")
        return result
