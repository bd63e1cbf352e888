"""Makes a damaged run whole: takes back the commits of damaged stages, so that resuming runs exactly these again.

What is intact stays: later stages count on, as training gives the same bits again. Where it does not, on another
machine, they are taken back too, one after the other, when they no longer fit. A commit is deleted first, then what
is damaged of what it named; the rest is garbage from then on. Everything is said in the run's log. Only the holder of
the run may repair it. Entry: `repair_while`.
"""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from itertools import takewhile
from typing import Any

from nf_pipeline.config import RunConfig, validate_config
from nf_pipeline.data.handed_over import is_handed_over
from nf_pipeline.data.ingest import ingest_fingerprint
from nf_pipeline.data.sources import open_source
from nf_pipeline.driver.early_end import find_early_end, read_results
from nf_pipeline.driver.retention import blocks_to_repeat
from nf_pipeline.driver.run_record import find_record, load_plan
from nf_pipeline.driver.stages import block_stage
from nf_pipeline.driver.verify import Problem, VerifyReport, inspect_run
from nf_pipeline.errors import DataError, ObjectCorrupt, ObjectMissing, StageOutdated, StorageError
from nf_pipeline.plans import Plan
from nf_pipeline.storage.layout import RunLayout
from nf_pipeline.storage.manifest import read_manifest
from nf_pipeline.storage.sealed import seal
from nf_pipeline.storage.store import Store
from nf_pipeline.worker.tasks import num_rounds

Tell = Callable[[str, str], None]
"""(stage, one line for the log)"""

_SHOWN = 3


def repair_while(
    store: Store,
    layout: RunLayout,
    tell: Tell,
    work: Callable[[], dict[str, Any]],
    *,
    has_dataset: bool = False,
    patience: int | None = None,
) -> dict[str, Any]:
    """Takes back what is damaged, then does the work, as often as it finds commits that no longer fit.

    Args:
        store, layout: of a run that the caller holds.
        tell: called with what is repaired, stage by stage.
        work: brings every stage to its commit.
        has_dataset: whether the caller brings the images, so that no source need be there to read them again.
        patience: `exits.patience` of the work: blocks that a run ends without need no input.

    Raises:
        ObjectMissing: there is no such run.
        ObjectCorrupt: neither run.json nor plan.json says what the run's configuration was.
        DataError: images are damaged, and their source is gone or has changed; nothing was deleted.
        StorageError: objects cannot be read; nothing was deleted.
        NFError: whatever the work raises.
    """
    repair = _Repair(store, layout, tell, patience)
    repair.mend_record()
    repair.take_back(inspect_run(store, layout), has_dataset=has_dataset)
    taken_back: set[str] = set()
    while True:
        try:
            return work()
        except StageOutdated as outdated:
            if outdated.commit in taken_back:
                raise
            taken_back.add(outdated.commit)
            repair.take_back_outdated(outdated)


class _Repair:
    """The repair of one run."""

    def __init__(self, store: Store, layout: RunLayout, tell: Tell, patience: int | None) -> None:
        self._store = store
        self._layout = layout
        self._tell = tell
        self._patience = patience

    def mend_record(self) -> None:
        """Writes run.json again, as plan.json knows it, if it is damaged."""
        record, problem = find_record(self._store, self._layout)
        if record is None:
            raise ObjectMissing(f"there is no run {self._layout.run!r}", self._store.uri, "check STORE/NAME")
        if problem:
            self._store.put(self._layout.run_json, seal(record))
            self._tell("run", f"{problem}: written again as plan.json knows it")

    def take_back(self, report: VerifyReport, *, has_dataset: bool) -> None:
        """Takes back the commits of all damaged stages, and of those that must be repeated to repeat them."""
        _refuse(report.problems, self._store, self._layout)
        config = self._config()
        for problem in [problem for problem in report.problems if problem.stage == "ingest"][:1]:
            if not has_dataset:
                self._check_source(config, problem)
        commits = list(dict.fromkeys(problem.commit for problem in report.problems if problem.commit))
        stages = {problem.commit: problem.stage for problem in report.problems}
        if num_rounds(config) > 1 and any(commit.startswith(f"{self._layout.blocks}/") for commit in commits):
            self._take_back_all_blocks("rounds were deleted as they were read")
        for commit in commits:
            what = "; ".join([problem.what for problem in report.problems if problem.commit == commit][:_SHOWN])
            self._drop(commit, stages[commit], f"{what}: {stages[commit]} is run again")
        self._drop_objects(report.problems)
        if num_rounds(config) == 1:
            self._take_back_released()
        if report.is_whole:
            self._tell("run", "nothing is damaged")

    def take_back_outdated(self, outdated: StageOutdated) -> None:
        """Takes back a commit that does not fit what the stages before it have made now."""
        is_block = outdated.commit.startswith(f"{self._layout.blocks}/")
        if is_block and num_rounds(self._config()) > 1:
            self._take_back_all_blocks(outdated.what)
        self._drop(outdated.commit, _stage_of(outdated.commit), f"{outdated.what}: it is run again as well")

    def _config(self) -> RunConfig:
        record, _ = find_record(self._store, self._layout)
        return validate_config({**record["config"], "run": self._layout.run})

    def _check_source(self, config: RunConfig, problem: Problem) -> None:
        """Makes sure that the images can be read again before anything is deleted.

        Raises:
            DataError: their source is gone, or no longer what was ingested.
        """
        source = config.data.source
        if is_handed_over(self._store, self._layout, config) and not self._store.list(self._layout.dataset):
            raise DataError(
                f"{problem.what}: the run's images came as a dataset object, which is not there any more",
                "train(config, dataset=..., repair=True) with the same dataset, or start another run",
            )
        try:
            wanted = ingest_fingerprint(config, open_source(config.data))
        except (DataError, StorageError) as error:
            what = f"{problem.what}: the images cannot be read again: {error.what}"
            raise DataError(what, f"bring the data back to {source}, or start another run") from None
        manifest = None
        with contextlib.suppress(ObjectCorrupt):  # then it is seen after ingest: the plan knows the images' checksum
            manifest = read_manifest(self._store, self._layout.ingest_manifest)
        if manifest is not None and problem.key != self._layout.ingest_manifest and manifest.fingerprint != wanted:
            what = f"{problem.what}: the images in {source} are not those any more that were ingested"
            raise DataError(what, "bring the data back as it was, or start another run")

    def _take_back_all_blocks(self, why: str) -> None:
        commits = [key for key, _ in self._store.list(self._layout.blocks) if key.endswith("/manifest.json")]
        for commit in reversed(commits):
            self._drop(commit, _stage_of(commit), f"{why}: all blocks are trained again, {commit} is taken back")

    def _take_back_released(self) -> None:
        try:
            plan = load_plan(self._store, self._layout)
        except ObjectMissing:  # it is made anew, and says then what has to be trained again
            return
        for block_idx, block in enumerate(plan.blocks[: self._num_wanted(plan)]):
            source = block.source_block
            if source < 0 or self._store.size(self._layout.block_manifest(block_idx)) is not None:
                continue
            stored = read_manifest(self._store, self._layout.block_manifest(source))
            if stored is None or not stored.is_released:
                continue
            for idx in blocks_to_repeat(self._store, self._layout, plan, block_idx):
                if self._store.size(self._layout.block_manifest(idx)) is None:
                    continue
                what = f"its activations were given up and block {block_idx} has to read them: it is trained again"
                self._drop(self._layout.block_manifest(idx), block_stage(idx), what)

    def _num_wanted(self, plan: Plan) -> int:
        """Returns how many blocks there will be: those that a run ended without read nothing."""
        config = self._config()
        config = config.model_copy(update={"exits": config.exits.model_copy(update={"patience": self._patience})})
        manifests = [read_manifest(self._store, self._layout.block_manifest(idx)) for idx in range(len(plan.blocks))]
        done = list(takewhile(lambda manifest: manifest is not None, manifests))
        if any(manifest is not None for manifest in manifests[len(done) :]):
            return len(plan.blocks)
        results = []
        for planned, block in zip(plan.blocks, done, strict=False):
            key, num_val = self._layout.block_manifest(planned.block_idx), done[0].facts["num_val"]
            results.append(read_results(self._store, key, block, plan, planned, num_val))
        end = find_early_end(config, len(plan.blocks), results)
        return len(plan.blocks) if end is None else end.num_blocks

    def _drop(self, commit: str, stage: str, what: str) -> None:
        if self._store.size(commit) is not None:
            self._store.delete([commit])
        self._tell(stage, what)

    def _drop_objects(self, problems: Iterable[Problem]) -> None:
        """Deletes what is damaged, after the commits; a checkpoint's record before its tensors."""
        for problem in problems:
            record = self._layout.checkpoint_record(problem.key.rpartition("/")[0])
            if problem.stage.startswith("block-"):
                self._store.delete([record])
            self._store.delete([problem.key])
            if not problem.commit:
                instead = (
                    "it is written again" if problem.stage == "summary" else "the block goes on from what is left"
                )
                self._tell(problem.stage, f"{problem.what}: {instead}")


def _refuse(problems: Sequence[Problem], store: Store, layout: RunLayout) -> None:
    """Ends a repair that could take back what is whole."""
    for problem in [problem for problem in problems if problem.stage == "run"]:
        fix = f"delete {layout.run_json} and give the train command again that began the run: what fits it is kept"
        raise ObjectCorrupt(problem.what, store.uri, fix)
    unreadable = [problem for problem in problems if problem.is_unreadable]
    if unreadable:
        what = f"{len(unreadable)} objects cannot be read, nothing is repaired: {unreadable[0].what}"
        raise StorageError(what, store.uri, "see that the store can be read, then repair")


def _stage_of(commit: str) -> str:
    """Names the stage of a commit."""
    parts = commit.split("/")
    if parts[1] == "blocks":
        return block_stage(int(parts[2]))
    return parts[1].removesuffix(".json")
