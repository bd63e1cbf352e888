"""Which objects of a run nobody needs any more: pure decisions about a listing.

Beside a running driver only what is provably dead counts: attempts that lost to a commit, rounds that were read, the
copy of a data set that was ingested. When nobody works on the run, everything goes that the next driver would not
read: of unfinished stages only the newest checkpoint of each kind of work stays, as it is where training goes on.
What a manifest names stays, wherever in the manifest it stands. Deliberately reads and deletes nothing.
Entries: `find_garbage`, `by_kind`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nf_pipeline.driver.stages import block_stage, commit_key
from nf_pipeline.storage.layout import RunLayout
from nf_pipeline.storage.manifest import StageManifest
from nf_pipeline.worker.checkpoint_record import CheckpointRecord

# As storage.local names what it writes beside the target.
_HALF_WRITTEN = re.compile(r"(?:.*/)?\.[^/]+\.[0-9a-f]{8}\.part")
_KINDS = (
    (_HALF_WRITTEN, "half-written files"),
    (re.compile(r".*/activations/[^/]+"), "activations"),
    (re.compile(r".*/checkpoint(-\d+)?\.(json|safetensors)"), "checkpoints"),
    (re.compile(r"[^/]+/dataset/.+"), "copies of data sets"),
    (re.compile(r"[^/]+/ingest/.+"), "images"),
    (re.compile(r".*/weights\.safetensors"), "weights"),
)


@dataclass(frozen=True, kw_only=True, order=True)
class Garbage:
    """One thing that may be deleted.

    Attributes:
        key: of the object.
        num_bytes: of it; 0 where the store does not say.
        kind: for people, such as "activations".
    """

    key: str
    num_bytes: int
    kind: str


@dataclass(frozen=True, kw_only=True)
class Inventory:
    """What is stored of a run.

    Attributes:
        layout: of the run.
        sizes: bytes of every object.
        manifests: of every committed stage and round, by key.
        checkpoints: records of checkpoints, by key; None for one that cannot be understood.
    """

    layout: RunLayout
    sizes: Mapping[str, int]
    manifests: Mapping[str, StageManifest]
    checkpoints: Mapping[str, CheckpointRecord | None] = field(default_factory=dict)

    @property
    def num_blocks(self) -> int:
        """Blocks that have stored anything."""
        prefix = f"{self.layout.blocks}/"
        found = {key.removeprefix(prefix).partition("/")[0] for key in self.sizes if key.startswith(prefix)}
        return max((int(name) + 1 for name in found if name.isdecimal()), default=0)

    @property
    def num_trained(self) -> int:
        """Blocks up to the deepest one that is finished."""
        done = [idx for idx in range(self.num_blocks) if self.is_committed(block_stage(idx))]
        return max(done, default=-1) + 1

    def is_committed(self, stage: str) -> bool:
        """Whether a stage is finished."""
        return commit_key(self.layout, stage) in self.manifests

    def below(self, prefix: str) -> set[str]:
        """Returns the keys that begin with a prefix."""
        return {key for key in self.sizes if key.startswith(prefix)}


def find_garbage(stored: Inventory, *, is_idle: bool) -> list[Garbage]:
    """Lists what may be deleted.

    Args:
        stored: everything below the run's prefix.
        is_idle: whether nobody works on the run.

    Returns:
        Sorted by key. Documents are among it, such as commits of rounds that were read: delete them first.
    """
    retired = {key for block_idx in range(stored.num_blocks) for key in _retired_rounds(stored, block_idx)}
    kept = [manifest for key, manifest in stored.manifests.items() if key not in retired]
    named = {text for manifest in kept for text in _texts(manifest.to_json())}
    found = set(_of_ingest(stored, is_idle=is_idle)) | retired
    if is_idle:
        found |= stored.below(stored.layout.attempt_prefix("plan", ""))  # what measuring the store had to leave
    for block_idx in range(stored.num_blocks):
        found |= _of_block(stored, block_idx, named, is_idle=is_idle)
    if is_idle:
        found |= {key for key in stored.sizes if _HALF_WRITTEN.fullmatch(key)}
    return [Garbage(key=key, num_bytes=stored.sizes[key], kind=_kind_of(key)) for key in sorted(found - named)]


def by_kind(garbage: Sequence[Garbage]) -> Iterator[tuple[str, int, int]]:
    """Yields kind, number and bytes, the largest first."""
    kinds = {item.kind for item in garbage}
    sums = [(kind, [item.num_bytes for item in garbage if item.kind == kind]) for kind in kinds]
    for kind, sizes in sorted(sums, key=lambda entry: (-sum(entry[1]), entry[0])):
        yield kind, len(sizes), sum(sizes)


def _of_ingest(stored: Inventory, *, is_idle: bool) -> Iterator[str]:
    layout = stored.layout
    if stored.is_committed("ingest") or is_idle:
        yield from stored.below(layout.ingest_attempt(""))
    # A complete copy that is not ingested yet is all that the run has.
    if stored.is_committed("ingest") or (is_idle and layout.dataset_manifest not in stored.sizes):
        yield from stored.below(f"{layout.dataset}/")


def _of_block(stored: Inventory, block_idx: int, named: set[str], *, is_idle: bool) -> set[str]:
    is_done = stored.is_committed(block_stage(block_idx))
    if not is_done and not is_idle:
        return set()
    attempts = stored.below(stored.layout.block_attempt(block_idx, ""))
    records = stored.below(stored.layout.publications(block_idx))
    return (attempts | records) - (set() if is_done else _resumable(stored, attempts, named))


def _resumable(stored: Inventory, keys: set[str], named: set[str]) -> set[str]:
    """Returns the checkpoints that the next attempt may go on from, and those of which nobody can tell."""
    newest: dict[tuple[str, int], tuple[int, str, str]] = {}
    kept: set[str] = set()
    for key in sorted(keys & stored.checkpoints.keys()):
        record, folder = stored.checkpoints[key], key.rpartition("/")[0]
        if record is None:
            kept |= {other for other in keys if other.startswith(f"{folder}/checkpoint")}
        elif record.key in named:  # how a round ended: the round after it goes on from there
            kept.add(key)
        elif record.key in stored.sizes:
            work = (record.fingerprint, record.batch_size)
            if work not in newest or record.epoch > newest[work][0]:
                newest[work] = (record.epoch, key, record.key)
    return kept.union(*({key, tensors} for _, key, tensors in newest.values()))


def _retired_rounds(stored: Inventory, block_idx: int) -> Iterator[str]:
    """Yields the commits of rounds that neither the block itself nor the next one goes on from."""
    readers = (block_stage(block_idx + 1), "model")
    if stored.is_committed(block_stage(block_idx)) and any(map(stored.is_committed, readers)):
        rounds = f"{stored.layout.rounds(block_idx)}/"
        yield from (key for key in stored.manifests if key.startswith(rounds))


def _kind_of(key: str) -> str:
    return next((kind for pattern, kind in _KINDS if pattern.fullmatch(key)), "records")


def _texts(document: Any) -> Iterator[str]:
    """Yields every text in a document: a key counts as named wherever it stands, facts included."""
    if isinstance(document, str):
        yield document
    elif isinstance(document, dict):
        for value in document.values():
            yield from _texts(value)
    elif isinstance(document, list):
        for value in document:
            yield from _texts(value)
