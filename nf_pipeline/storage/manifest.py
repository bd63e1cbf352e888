"""The commit of a stage: one small JSON object, written last and only once.

Whatever a stage wrote counts from the moment its manifest exists; readers open only what a manifest names and
compare sizes and checksums. One thing may change later: a manifest may stop naming its shards, before they are
deleted; rows and checksums stay, and with them the identity of what the stage made. A manifest that was changed
otherwise, or that names what is not its stage's own, is damaged. Deliberately knows nothing of stages' order. Entry
points: `commit_manifest`, `read_manifest`, `read_object`, `verify_manifest`.
"""

import json
import math
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pydantic import PositiveInt

from nf_pipeline.config import FORMAT_VERSION, fingerprint_of
from nf_pipeline.documents import check_types
from nf_pipeline.errors import ConfigError, ObjectCorrupt, ObjectMissing, WorkerLost
from nf_pipeline.samples import InputSpec, TargetSpec
from nf_pipeline.storage.affine import Affine
from nf_pipeline.storage.layout import commit_home, stage_home
from nf_pipeline.storage.sealed import check_version, read_sealed, repair_fix, seal
from nf_pipeline.storage.shards import ShardInfo, TensorSpec, read_shard_info
from nf_pipeline.storage.store import Data, Store, checksum_of

__all__ = [
    "ObjectInfo",
    "StageManifest",
    "check_stored",
    "checksum_of",
    "commit_manifest",
    "read_manifest",
    "read_object",
    "replace_manifest",
    "store_object",
    "verify_manifest",
]

_LOOK_UP_THREADS = 8
_LIST_FROM = 16


@dataclass(frozen=True, kw_only=True)
class ObjectInfo:
    """What a manifest says of an object that is no shard.

    Attributes:
        key: relative to the store.
        num_bytes: of the object.
        checksum: "sha256:..." of the object.
    """

    key: str
    num_bytes: int
    checksum: str


@dataclass(frozen=True, kw_only=True)
class StageManifest:
    """Everything that a finished stage leaves behind.

    Attributes:
        stage: "ingest", "block-000", ... or "model".
        fingerprint: of what decided the stage's result.
        input_checksum: of the manifest that the stage read its input from; "" if there is none.
        attempt: id of the attempt that wrote the objects.
        spec: of the tensors in the shards; None without shards.
        shards: split ("train", "val", "test") -> shards in stored order.
        weights: None where a stage trains nothing.
        objects: other files that the stage wrote for its readers.
        facts: small JSON document with results.
        format_version: of this document.
    """

    stage: str
    fingerprint: str
    attempt: str
    input_checksum: str = ""
    spec: TensorSpec | None = None
    shards: dict[str, tuple[ShardInfo, ...]] = field(default_factory=dict)
    weights: ObjectInfo | None = None
    objects: tuple[ObjectInfo, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @property
    def content_checksum(self) -> str:
        """Identifies what the stage made, whichever attempt made it (16 hex digits).

        Two attempts with the same result have the same one: keys, times and other facts are left out.
        """
        shards = {split: [[s.num_rows, s.checksum] for s in infos] for split, infos in self.shards.items()}
        weights = self.weights.checksum if self.weights else ""
        return fingerprint_of([self.stage, self.fingerprint, shards, weights])

    def num_rows(self, split: str) -> int:
        """Samples of a split; 0 if it has none."""
        return sum(shard.num_rows for shard in self.shards.get(split, ()))

    @property
    def named_shards(self) -> list[ShardInfo]:
        """The shards of all splits that are stored: those that were not released."""
        return [shard for infos in self.shards.values() for shard in infos if not shard.is_released]

    @property
    def is_released(self) -> bool:
        """Whether shards were given up that a reader would need."""
        return any(shard.is_released for infos in self.shards.values() for shard in infos)

    @property
    def named_objects(self) -> list[ShardInfo | ObjectInfo]:
        """Everything that must be stored: shards that were not released, weights, other files."""
        weights = [self.weights] if self.weights is not None else []
        return [*self.named_shards, *weights, *self.objects]

    def without_shards(self) -> "StageManifest":
        """Returns the manifest of the same result (`content_checksum`) that names no shard any more."""
        released = {split: tuple(replace(s, key="") for s in infos) for split, infos in self.shards.items()}
        return replace(self, shards=released)

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON document that `from_json` reads back."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_json(cls, document: Any, where: str = "manifest") -> "StageManifest":
        """Reads what `to_json` returned.

        Raises:
            OtherVersion: it is of another format version.
            ObjectCorrupt: a field is missing or has another type; names it.
        """
        _known_version(document, where)
        shards = _typed(document, "shards", dict, where)
        return cls(
            stage=_typed(document, "stage", str, where),
            fingerprint=_typed(document, "fingerprint", str, where),
            input_checksum=_typed(document, "input_checksum", str, where),
            attempt=_typed(document, "attempt", str, where),
            spec=_read_spec(document, where),
            shards={split: _read_shards(shards, split, where) for split in shards},
            weights=_read_weights(document, where),
            objects=_read_objects(document, where),
            facts=_read_facts(document, where),
        )


def commit_manifest(store: Store, key: str, manifest: StageManifest) -> None:
    """Makes a stage's result count, unless another attempt was first.

    Raises:
        AlreadyExists: another attempt committed; read its manifest and drop this attempt.
    """
    store.create(key, seal(manifest.to_json()))


def check_stored(store: Store, manifest: StageManifest) -> None:
    """Makes sure before a commit that nobody has cleared the attempt away: without its driver it was garbage to `gc`.

    Raises:
        WorkerLost: objects that the manifest names are not there.
    """
    problems = verify_manifest(store, manifest)
    if problems:
        what = f"attempt {manifest.attempt} was given up and cleared away: {'; '.join(problems[:3])}"
        raise WorkerLost(manifest.stage, what, "resume the run")


def replace_manifest(store: Store, key: str, manifest: StageManifest) -> None:
    """Writes a committed manifest again, with the same `content_checksum`; only the holder of the run may."""
    store.put(key, seal(manifest.to_json()))


def read_manifest(store: Store, key: str) -> StageManifest | None:
    """Reads a stage's manifest; None if the stage is not finished.

    Raises:
        OtherVersion: another version of this program wrote it.
        ObjectCorrupt: it was changed, cannot be understood, is another stage's, or names what is not its stage's.
    """
    document = read_sealed(store, key)
    if document is None:
        return None
    try:
        manifest = StageManifest.from_json(document, key)
        _check_home(manifest, key)
    except ObjectCorrupt as error:
        raise ObjectCorrupt(error.what, store.uri, repair_fix(store, key)) from None
    return manifest


def verify_manifest(store: Store, manifest: StageManifest) -> list[str]:
    """Checks that every named object is there with its size; the checksums are compared when it is read.

    Returns:
        One line per problem: nothing means that the stage need not be repeated.
    """
    sizes = _stored_sizes(store, [entry.key for entry in manifest.named_objects])
    lines = [_problem(entry, sizes.get(entry.key)) for entry in manifest.named_objects]
    return [line for line in lines if line]


def store_object(store: Store, key: str, data: Data) -> ObjectInfo:
    """Writes an object and returns what a manifest has to say of it."""
    store.put(key, data)
    return ObjectInfo(key=key, num_bytes=len(data), checksum=checksum_of(data))


def read_object(store: Store, entry: ObjectInfo) -> bytes:
    """Fetches an object that a manifest names, and verifies it.

    Raises:
        ObjectMissing: it is not there.
        ObjectCorrupt: its size or checksum is not what the manifest says.
    """
    fix = repair_fix(store, entry.key)
    try:
        data = bytes(store.get(entry.key))
    except ObjectMissing as error:
        raise ObjectMissing(error.what, store.uri, fix) from None
    for what, got, want in (
        ("bytes", len(data), entry.num_bytes),
        ("checksum", checksum_of(data), entry.checksum),
    ):
        if got != want:
            raise ObjectCorrupt(f"object {entry.key} is damaged: {what}: got {got}, want {want}", store.uri, fix)
    return data


def _check_home(manifest: StageManifest, key: str) -> None:
    """Refuses another stage's manifest: nothing outside of a stage's own prefix may be read, or deleted."""
    home = commit_home(key)
    if stage_home(key, manifest.stage) != home:
        raise _corrupt(key, f"stage: got {manifest.stage}, which does not belong at this key")
    for entry in manifest.named_objects:
        if not entry.key.startswith(f"{home}/"):
            raise _corrupt(key, f"it names {entry.key}, want keys below {home}/")


def _stored_sizes(store: Store, keys: Sequence[str]) -> dict[str, int | None]:
    """Looks objects up, those of a folder that holds many by listing it: one request tells of a thousand."""
    folders = Counter(key.rpartition("/")[0] for key in keys)
    crowded = [folder for folder, count in folders.items() if count >= _LIST_FROM]
    single = [key for key in keys if folders[key.rpartition("/")[0]] < _LIST_FROM]
    with ThreadPoolExecutor(_LOOK_UP_THREADS, thread_name_prefix="verify") as pool:
        listed = {key: size for folder in pool.map(store.list, crowded) for key, size in folder}
        return {**listed, **dict(zip(single, pool.map(store.size, single), strict=True))}


def _problem(entry: ShardInfo | ObjectInfo, size: int | None) -> str:
    if size is None:
        return f"object {entry.key} is missing"
    return "" if size == entry.num_bytes else f"object {entry.key}: got {size} bytes, want {entry.num_bytes}"


def _known_version(document: Any, where: str) -> None:
    if not isinstance(document, dict):
        raise _corrupt(where, f"got {type(document).__name__}, want an object")
    _typed(document, "format_version", int, where)
    check_version(document, where, "")


def _read_spec(document: dict[str, Any], where: str) -> TensorSpec | None:
    entry = _optional(document, "spec", where)
    if entry is None:
        return None
    inner = f"{where}: spec"
    shape = _typed(entry, "shape", list, inner)
    try:
        return TensorSpec(
            _typed(entry, "dtype", str, inner),
            tuple(shape),
            _typed(entry, "codec", str, inner),
            _read_affine(entry, inner),
            _typed(entry, "label_values", int, inner),
            _read_sample(entry, inner),
        )
    except ConfigError as error:
        raise _corrupt(inner, error.what) from None


def _read_sample(spec: dict[str, Any], where: str) -> TensorSpec | None:
    entry = _optional(spec, "sample", where) if "sample" in spec else None  # earlier versions knew none
    if entry is None:
        return None
    inner = f"{where}: sample"
    return TensorSpec(_typed(entry, "dtype", str, inner), tuple(_typed(entry, "shape", list, inner)))


def _read_affine(spec: dict[str, Any], where: str) -> Affine | None:
    entry = _optional(spec, "affine", where) if "affine" in spec else None  # earlier versions knew none
    if entry is None:
        return None
    inner = f"{where}: affine"
    scales, zero_points = (_typed(entry, name, list, inner) for name in ("scales", "zero_points"))
    return Affine(tuple(scales), tuple(zero_points))


def _read_shards(shards: dict[str, Any], split: str, where: str) -> tuple[ShardInfo, ...]:
    entries = _typed(shards, split, list, f"{where}: shards")
    return tuple(
        _read_shard_info(entry, f"{where}: shards.{split}[{position}]") for position, entry in enumerate(entries)
    )


def _read_shard_info(entry: Any, where: str) -> ShardInfo:
    try:
        return read_shard_info(entry)
    except ValueError as error:
        raise _corrupt(where, str(error)) from None


def _read_weights(document: dict[str, Any], where: str) -> ObjectInfo | None:
    entry = _optional(document, "weights", where)
    return None if entry is None else _read_object_info(entry, f"{where}: weights")


def _read_objects(document: dict[str, Any], where: str) -> tuple[ObjectInfo, ...]:
    entries = _typed(document, "objects", list, where)
    return tuple(_read_object_info(entry, f"{where}: objects[{idx}]") for idx, entry in enumerate(entries))


def _read_object_info(entry: Any, where: str) -> ObjectInfo:
    return ObjectInfo(
        key=_typed(entry, "key", str, where),
        num_bytes=_typed(entry, "num_bytes", int, where),
        checksum=_typed(entry, "checksum", str, where),
    )


class _Facts(dict[str, Any]):
    """Facts of a damaged manifest may lack what a reader asks for: that is no KeyError."""

    def __missing__(self, name: str) -> Any:
        raise ObjectCorrupt(f"manifest is damaged: facts.{name}: missing")


@dataclass(kw_only=True)
class _KnownFacts:
    """The facts that later stages compute with, where a stage has them."""

    inputs: InputSpec | None = None
    target: TargetSpec | None = None
    class_names: list[str] = field(default_factory=list)
    split_rows: dict[str, int] = field(default_factory=dict)
    num_val: PositiveInt = 1
    val_correct: list[int] = field(default_factory=list)
    val_hits: list[str] = field(default_factory=list)
    val_errors: list[float] = field(default_factory=list)
    val_sample_errors: list[str] = field(default_factory=list)
    train_s: float = 0.0
    write_s: float = 0.0


def _read_facts(document: dict[str, Any], where: str) -> dict[str, Any]:
    facts = _typed(document, "facts", dict, where)
    try:
        known = check_types(_KnownFacts, facts)
        for spec in (known.inputs, known.target):
            if spec is not None:
                spec.check()
        _check_counts(facts)
    except ValueError as error:
        raise _corrupt(where, f"facts.{error}") from None
    return _Facts(facts)


def _check_counts(facts: dict[str, Any]) -> None:
    """Refuses what no validation can find; the accuracies of exits are quotients of counts.

    Raises:
        ValueError: names the fact.
    """
    if facts.keys().isdisjoint(("val_correct", "val_errors", "num_val")):
        return  # not of a block
    counts, num_val = facts.get("val_correct", []), facts.get("num_val", 0)
    if errors := facts.get("val_errors"):
        if not (num_val and all(0 <= error < math.inf for error in errors)):
            raise ValueError(
                f"val_errors, num_val: got {errors[:5]} of {num_val} samples, want numbers of 0 and more"
            )
        return
    if not counts or not 0 <= min(counts) <= max(counts) <= num_val:
        raise ValueError(
            f"val_correct, num_val: got {counts[:5]} of {num_val}, want a count of 0 to num_val per exit"
        )


def _optional(document: dict[str, Any], name: str, where: str) -> dict[str, Any] | None:
    if name in document and document[name] is None:
        return None
    return _typed(document, name, dict, where)


def _typed(document: Any, name: str, kind: type, where: str) -> Any:
    if not isinstance(document, dict):
        raise _corrupt(where, f"got {type(document).__name__}, want an object")
    if name not in document:
        raise _corrupt(where, f"{name}: missing")
    value = document[name]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise _corrupt(where, f"{name}: got {type(value).__name__}, want {kind.__name__}")
    if kind is int and value < 0:
        raise _corrupt(where, f"{name}: got {value}, want 0 or more")
    return value


def _corrupt(where: str, problem: str) -> ObjectCorrupt:
    return ObjectCorrupt(f"{where} is damaged: {problem}")
