"""Reads every byte of a run and says what is damaged: the documents, what they say of each other, and all objects.

Goes on after the first problem and changes nothing. A stage that is not finished is no damage: resuming makes it. Not
covered, because nothing is built on them: the event log, the lock, the copy of a data set that was handed over, and
what running stages announce to each other. Memory is that of one object per thread. Deliberately knows nothing of how
damage is mended (see `driver.repair`), and imports no torch. Entry: `verify_run`.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

from nf_pipeline.config import RunConfig, validate_config
from nf_pipeline.data.ingest import ingest_fingerprint_of
from nf_pipeline.driver.early_end import read_results
from nf_pipeline.driver.run_lock import read_lock
from nf_pipeline.driver.run_record import find_record, plan_of
from nf_pipeline.driver.stages import block_stage, commit_key
from nf_pipeline.errors import (
    ConfigError,
    ObjectCorrupt,
    ObjectMissing,
    OtherVersion,
    StorageError,
    StoreUnreachable,
)
from nf_pipeline.plans import Plan
from nf_pipeline.run_uri import join_run_uri, split_run_uri
from nf_pipeline.storage.layout import RunLayout, choice_number
from nf_pipeline.storage.manifest import ObjectInfo, StageManifest, read_manifest, read_object
from nf_pipeline.storage.sealed import read_sealed
from nf_pipeline.storage.shards import ShardInfo, TensorSpec, read_shard
from nf_pipeline.storage.store import Store, open_store
from nf_pipeline.worker.checkpoint_record import read_record
from nf_pipeline.worker.tasks import (
    assemble_fingerprint,
    block_fingerprint,
    chain_checksum,
    model_blocks,
    num_rounds,
    plan_fingerprint,
)

OK, DAMAGED, NOT_FINISHED, NOT_NEEDED = "ok", "damaged", "not finished", "not needed"

_THREADS = 4


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is not as it was written.

    Attributes:
        stage: "run", "ingest", "plan", "block-000", ..., "model" or "summary".
        key: of the damaged object.
        what: names the object, what was found and what was expected.
        commit: key of the commit without which the stage is repeated; "" where there is none to take back.
        is_unreadable: the store could not say what the object holds: it may be whole.
    """

    stage: str
    key: str
    what: str
    commit: str = ""
    is_unreadable: bool = False


@dataclass(frozen=True, kw_only=True)
class StageReport:
    """What was found of one stage.

    Attributes:
        stage: see `Problem`.
        state: "ok", "damaged", "not finished" or, of a block that a finished run ended without, "not needed".
        num_objects, num_bytes: that were named by what is committed, or by checkpoints, documents included.
    """

    stage: str
    state: str
    num_objects: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What was found of a run.

    Attributes:
        uri: STORE/NAME.
        stages: in order.
        problems: one per damaged object.
        num_leftovers, leftover_bytes: objects of committed stages that nothing names; harmless, `gc` deletes them.
        holder: driver that works on the run, "" if none: what it replaces meanwhile can look damaged.
    """

    uri: str
    stages: tuple[StageReport, ...]
    problems: tuple[Problem, ...]
    num_leftovers: int
    leftover_bytes: int
    holder: str = ""

    @property
    def is_whole(self) -> bool:
        """Whether nothing is damaged; stages may be unfinished."""
        return not self.problems


def verify_run(uri: str) -> VerifyReport:
    """Checks a whole run, reading every object that it names.

    Args:
        uri: STORE/NAME.

    Raises:
        ObjectMissing: there is no such run.
        StoreUnreachable: the store does not answer.
    """
    store_uri, run = split_run_uri(uri)
    return inspect_run(open_store(store_uri), RunLayout(run))


def inspect_run(store: Store, layout: RunLayout) -> VerifyReport:
    """See `verify_run`."""
    sizes = dict(store.list(layout.run))
    if not sizes:
        raise ObjectMissing(f"there is no run {layout.run!r}", store.uri, "check STORE/NAME")
    inspection = _Inspection(store, layout, sizes)
    inspection.look()
    return inspection.report()


@dataclass(frozen=True, kw_only=True)
class _Named:
    """An object that something vouches for."""

    stage: str
    entry: ShardInfo | ObjectInfo
    spec: TensorSpec | None
    commit: str


class _Inspection:
    """One pass over one run."""

    def __init__(self, store: Store, layout: RunLayout, sizes: dict[str, int]) -> None:
        self._store = store
        self._layout = layout
        self._sizes = sizes
        self._problems: list[Problem] = []
        self._stages: list[str] = []
        self._finished: set[str] = set()
        self._documents: list[tuple[str, str]] = []
        self._named: list[_Named] = []
        self._holder = ""
        self._num_in_model: int | None = None

    def look(self) -> None:
        """Reads documents first, then every object that they name."""
        lock = read_lock(self._store, self._layout)
        self._holder = "" if lock is None or lock.is_free else lock.holder
        config = self._look_at_record()
        ingest = self._look_at_ingest(config)
        plan = self._look_at_plan(config, ingest)
        finals = self._look_at_blocks(config, plan, ingest)
        self._look_at_summary(self._look_at_model(config, finals))
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="verify") as pool:
            found = pool.map(lambda named: _check(self._store, named), self._named)
            self._problems += [problem for problem in found if problem is not None]

    def report(self) -> VerifyReport:
        """Sums up."""
        leftovers = self._leftovers()
        return VerifyReport(
            uri=join_run_uri(self._store.uri, self._layout.run),
            stages=tuple(self._stage_report(stage) for stage in self._stages),
            problems=tuple(sorted(self._problems, key=lambda problem: self._stages.index(problem.stage))),
            num_leftovers=len(leftovers),
            leftover_bytes=sum(self._sizes[key] for key in leftovers),
            holder=self._holder,
        )

    def _look_at_record(self) -> RunConfig | None:
        key = self._begin("run", self._layout.run_json)
        self._finished.add("run")
        with self._noting("run", key):
            record, problem = find_record(self._store, self._layout)
            if problem or record is None:
                self._add("run", key, problem or f"{key} is missing")
            if record is None:
                return None
            config = validate_config({**record["config"], "run": self._layout.run})
            self._expect("run", key, "fingerprint", record.get("fingerprint"), config.fingerprint)
            return config
        return None

    def _look_at_ingest(self, config: RunConfig | None) -> StageManifest | None:
        key = self._begin("ingest", self._layout.ingest_manifest)
        manifest = self._read_manifest("ingest", key)
        if manifest is None or config is None:
            return manifest
        wanted = ingest_fingerprint_of(config, str(manifest.facts.get("source_fingerprint")))
        return manifest if self._expect("ingest", key, "fingerprint", manifest.fingerprint, wanted, key) else None

    def _look_at_plan(self, config: RunConfig | None, ingest: StageManifest | None) -> Plan | None:
        key = self._begin("plan", self._layout.plan_json)
        with self._noting("plan", key, key):
            document = read_sealed(self._store, key)
            if document is None:
                return None
            self._finished.add("plan")
            plan = plan_of(document, self._store.uri)
            found = document.get("fingerprint")
            wanted = plan_fingerprint(config, ingest.content_checksum) if config and ingest else found
            same = self._expect("plan", key, "fingerprint", found, wanted, key)
            return plan if same else None
        return None

    def _look_at_blocks(
        self, config: RunConfig | None, plan: Plan | None, ingest: StageManifest | None
    ) -> list[StageManifest | None]:
        last = num_rounds(config) - 1 if config else 0
        wholes: list[dict[int, StageManifest | None]] = [dict.fromkeys(range(last + 1), ingest)]
        for block_idx in range(len(plan.blocks) if plan else self._count_blocks()):
            stage = block_stage(block_idx)
            commits = self._commits_of(block_idx, last)
            self._begin(stage, commits[last])
            found = {idx: self._read_manifest(stage, key) for idx, key in commits.items()}
            whole = {}
            for idx, manifest in found.items():
                wanted = _fingerprint(config, plan, block_idx, idx)
                # Without a plan nobody knows what the block read.
                inputs = [of.get(idx) for of in wholes[plan.blocks[block_idx].source_block + 1 :]] if plan else [None]
                whole[idx] = self._belongs(commits[idx], manifest, inputs, wanted)
                if whole[idx] is not None and plan is not None and ingest is not None:
                    with self._noting(stage, commits[idx], commits[idx]):
                        counted = (whole[idx], plan, plan.blocks[block_idx], ingest.num_rows("val"))
                        read_results(self._store, commits[idx], *counted)
            if found[last] is None:
                self._finished.discard(stage)
                self._look_at_checkpoints(stage, block_idx)
            wholes.append(whole)
        if config is not None and last > 0:
            self._check_rounds(last, len(wholes) - 1)
        return [whole[last] for whole in wholes[1:]]

    def _belongs(
        self,
        key: str,
        manifest: StageManifest | None,
        inputs: Sequence[StageManifest | None],
        fingerprint: Callable[[str], str] | None,
    ) -> StageManifest | None:
        """Returns a block's manifest if it is of this configuration and of the very input that is stored.

        Args:
            inputs: what it read, and the blocks that it ran again; None for what is unknown.
        """
        if manifest is None:
            return None
        wanted = fingerprint(manifest.input_checksum) if fingerprint else manifest.fingerprint
        if not self._expect(manifest.stage, key, "fingerprint", manifest.fingerprint, wanted, key):
            return None
        wanted = manifest.input_checksum
        if None not in inputs:
            wanted = chain_checksum([part.content_checksum for part in inputs])
        same = self._expect(manifest.stage, key, "checksum of its input", manifest.input_checksum, wanted, key)
        return manifest if same else None

    def _check_rounds(self, last: int, num_blocks: int) -> None:
        """Finds blocks whose next input is gone: rounds were deleted as they were read."""
        counts = [self._count_rounds(idx, last) for idx in range(num_blocks)]
        for block_idx, count in enumerate(counts[1:], start=1):
            before, needed = block_idx - 1, self._layout.round_manifest(block_idx - 1, min(count, last), last + 1)
            if counts[before] <= last < count:
                needed = self._layout.block_manifest(before)
                self._add(block_stage(before), needed, f"{needed} is missing, but the next block is finished", needed)
            elif count <= last and count < counts[before] and needed not in self._sizes:
                what = f"{needed} is missing, which block {block_idx} has to read next"
                self._add(block_stage(before), needed, what, needed)

    def _count_rounds(self, block_idx: int, last: int) -> int:
        commits = self._commits_of(block_idx, last)
        return max((idx + 1 for idx, key in commits.items() if key in self._sizes), default=0)

    def _look_at_checkpoints(self, stage: str, block_idx: int) -> None:
        prefix = f"{self._layout.block(block_idx)}/"
        vouched = {named.entry.key for named in self._named}  # by the commit of a round, whose state it is
        for key in [key for key in self._sizes if key.startswith(prefix)]:
            if key != self._layout.checkpoint_record(key.rpartition("/")[0]):
                continue
            with self._noting(stage, key):
                record = read_record(self._store, key)
                self._documents.append((stage, key))
                # Without its tensors a record is as good as none: the block goes on from an older state.
                if record is not None and record.key in self._sizes.keys() - vouched:
                    size = self._sizes[record.key]
                    tensors = ObjectInfo(key=record.key, num_bytes=size, checksum=record.checksum)
                    self._named.append(_Named(stage=stage, entry=tensors, spec=None, commit=""))

    def _look_at_model(
        self, config: RunConfig | None, blocks: Sequence[StageManifest | None]
    ) -> StageManifest | None:
        key = self._begin("model", self._layout.model_manifest)
        manifest = self._read_manifest("model", key)
        self._look_at_choices()
        if manifest is None or config is None:
            return manifest
        checksums = [block.content_checksum for block in takewhile(lambda block: block is not None, blocks)]
        num_blocks = model_blocks(config, checksums, manifest.fingerprint)  # fewer than all if the run ended early
        if num_blocks is not None:
            self._num_in_model = num_blocks
            return manifest
        if None in blocks:
            return manifest
        wanted = assemble_fingerprint(config, checksums)
        return manifest if self._expect("model", key, "fingerprint", manifest.fingerprint, wanted, key) else None

    def _look_at_choices(self) -> None:
        """Looks at choices that no manifest names yet: the next attempt at the model goes on from one of them."""
        named = {named.entry.key for named in self._named}
        for key in self._sizes:
            if key.startswith(f"{self._layout.model}/") and choice_number(key) is not None and key not in named:
                with self._noting("model", key, self._layout.model_manifest):
                    read_sealed(self._store, key)
                    self._documents.append(("model", key))

    def _look_at_summary(self, model: StageManifest | None) -> None:
        key = self._begin("summary", self._layout.summary_json)
        with self._noting("summary", key):
            summary = read_sealed(self._store, key)
            if summary is not None:
                self._finished.add("summary")
            if summary is not None and model is not None:
                found, wanted = summary.get("weights_checksum"), model.weights.checksum
                self._expect("summary", key, "weights_checksum", found, wanted)

    def _read_manifest(self, stage: str, key: str) -> StageManifest | None:
        if key not in self._sizes:
            return None
        with self._noting(stage, key, key):
            manifest = read_manifest(self._store, key)
            if manifest is None:
                return None
            self._finished.add(stage)
            self._documents.append((stage, key))
            self._named += [
                _Named(stage=stage, entry=entry, spec=manifest.spec, commit=key) for entry in manifest.named_objects
            ]
            return manifest
        return None

    def _commits_of(self, block_idx: int, last: int) -> dict[int, str]:
        """Returns the commits of a block by round: those that are there, and that of the last round."""
        prefix = f"{self._layout.rounds(block_idx)}/"
        keys = [key for key in self._sizes if key.startswith(prefix) and self._layout.round_of(key) is not None]
        rounds = {self._layout.round_of(key): key for key in sorted(keys)}
        return {**rounds, last: self._layout.block_manifest(block_idx)}

    def _count_blocks(self) -> int:
        count = 0
        while any(key.startswith(f"{self._layout.block(count)}/") for key in self._sizes):
            count += 1
        return count

    def _leftovers(self) -> list[str]:
        """Lists what lost attempts at committed stages have left."""
        kept = {named.entry.key for named in self._named} | {key for _, key in self._documents}
        attempts = [
            self._layout.attempt_prefix(stage, "")
            for stage in self._finished
            if stage not in ("run", "plan", "summary") and commit_key(self._layout, stage) in self._sizes
        ]
        return [key for key in self._sizes if key.startswith(tuple(attempts)) and key not in kept]

    def _stage_report(self, stage: str) -> StageReport:
        keys = {key for of, key in self._documents if of == stage}
        keys |= {named.entry.key for named in self._named if named.stage == stage}
        is_damaged = any(problem.stage == stage for problem in self._problems)
        state = DAMAGED if is_damaged else OK if stage in self._finished else self._unfinished(stage)
        there = [self._sizes[key] for key in keys if key in self._sizes]
        return StageReport(stage=stage, state=state, num_objects=len(there), num_bytes=sum(there))

    def _unfinished(self, stage: str) -> str:
        left_out = () if self._num_in_model is None else range(self._num_in_model, len(self._stages))
        return NOT_NEEDED if stage in map(block_stage, left_out) else NOT_FINISHED

    def _begin(self, stage: str, key: str) -> str:
        self._stages.append(stage)
        if key in self._sizes and stage in ("run", "plan", "summary"):
            self._documents.append((stage, key))
        return key

    def _expect(self, stage: str, key: str, name: str, found: Any, wanted: Any, commit: str = "") -> bool:
        if found != wanted:
            self._add(stage, key, f"{key}: {name}: got {found}, want {wanted}", commit)
        return found == wanted

    def _add(self, stage: str, key: str, what: str, commit: str = "") -> None:
        self._problems.append(Problem(stage=stage, key=key, what=what, commit=commit))

    @contextmanager
    def _noting(self, stage: str, key: str, commit: str = "") -> Iterator[None]:
        try:
            yield
        except (ObjectMissing, ObjectCorrupt, ConfigError) as error:
            if stage == "run" and isinstance(error, OtherVersion):
                raise  # then so is all the rest
            self._add(stage, key, error.what, commit)
        except StoreUnreachable:
            raise
        except StorageError as error:
            self._problems.append(Problem(stage=stage, key=key, what=error.what, is_unreadable=True))


def _fingerprint(
    config: RunConfig | None, plan: Plan | None, block_idx: int, round_idx: int
) -> Callable[[str], str] | None:
    """Returns a function from a block's input to the fingerprint it must have; None as long as that is unknown."""
    if config is None or plan is None:
        return None
    return lambda checksum: block_fingerprint(config, plan, block_idx, round_idx, checksum)


def _check(store: Store, named: _Named) -> Problem | None:
    entry = named.entry
    problem = Problem(stage=named.stage, key=entry.key, what="", commit=named.commit)
    try:
        if isinstance(entry, ObjectInfo):
            read_object(store, entry)
        elif named.spec is None:
            raise ObjectCorrupt(f"{named.commit} does not say what its shards hold")
        else:
            read_shard(store, entry, named.spec)
    except (ObjectMissing, ObjectCorrupt) as error:
        return replace(problem, what=error.what)
    except StoreUnreachable:
        raise  # nothing else can be read now either
    except StorageError as error:
        return replace(problem, what=error.what, is_unreadable=True)
    return None
