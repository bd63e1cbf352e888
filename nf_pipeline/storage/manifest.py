"""The commit of a stage: one small JSON object, written last and only once.

Whatever a stage wrote counts from the moment its manifest exists; readers open only what a manifest names and
compare sizes and checksums. Deliberately knows nothing of stages' order. Entry points: `commit_manifest`,
`read_manifest`, `verify_manifest`.
"""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

from nf_pipeline.config import fingerprint_of
from nf_pipeline.errors import ConfigError, ObjectCorrupt, ObjectMissing
from nf_pipeline.storage.shards import REPEAT_FIX, ShardInfo, TensorSpec
from nf_pipeline.storage.store import Store, checksum_of

__all__ = [
    "MANIFEST_VERSION",
    "ObjectInfo",
    "StageManifest",
    "checksum_of",
    "commit_manifest",
    "read_manifest",
    "verify_manifest",
]

MANIFEST_VERSION = 1

_LOOK_UP_THREADS = 8


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
    facts: dict[str, Any] = field(default_factory=dict)
    format_version: int = MANIFEST_VERSION

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

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON document that `from_json` reads back."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_json(cls, document: Any, where: str = "manifest") -> "StageManifest":
        """Reads what `to_json` returned.

        Raises:
            ObjectCorrupt: a field is missing or has another type, or the version is another; names it.
        """
        _known_version(document, where)
        shards = _typed(document, "shards", dict, where)
        return cls(
            format_version=MANIFEST_VERSION,
            stage=_typed(document, "stage", str, where),
            fingerprint=_typed(document, "fingerprint", str, where),
            input_checksum=_typed(document, "input_checksum", str, where),
            attempt=_typed(document, "attempt", str, where),
            spec=_read_spec(document, where),
            shards={split: _read_shards(shards, split, where) for split in shards},
            weights=_read_weights(document, where),
            facts=_typed(document, "facts", dict, where),
        )


def commit_manifest(store: Store, key: str, manifest: StageManifest) -> None:
    """Makes a stage's result count, unless another attempt was first.

    Raises:
        AlreadyExists: another attempt committed; read its manifest and drop this attempt.
    """
    store.create(key, json.dumps(manifest.to_json(), indent=1).encode())


def read_manifest(store: Store, key: str) -> StageManifest | None:
    """Reads a stage's manifest; None if the stage is not finished.

    Raises:
        ObjectCorrupt: it cannot be understood.
    """
    try:
        data = store.get(key)
    except ObjectMissing:
        return None
    where = f"{key} at {store.uri}"
    try:
        document = json.loads(bytes(data))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise _corrupt(where, f"no JSON: {error}") from None
    return StageManifest.from_json(document, where)


def verify_manifest(store: Store, manifest: StageManifest) -> list[str]:
    """Checks that every named object is there with its size; the checksums are compared when it is read.

    Returns:
        One line per problem: nothing means that the stage need not be repeated.
    """
    with ThreadPoolExecutor(_LOOK_UP_THREADS, thread_name_prefix="verify") as pool:
        lines = pool.map(lambda entry: _problem(store, entry), list(_objects(manifest)))
        return [line for line in lines if line]


def _objects(manifest: StageManifest) -> Iterator[ShardInfo | ObjectInfo]:
    for shards in manifest.shards.values():
        yield from shards
    if manifest.weights is not None:
        yield manifest.weights


def _problem(store: Store, entry: ShardInfo | ObjectInfo) -> str:
    size = store.size(entry.key)
    if size is None:
        return f"object {entry.key} is missing"
    return "" if size == entry.num_bytes else f"object {entry.key}: got {size} bytes, want {entry.num_bytes}"


def _known_version(document: Any, where: str) -> None:
    if not isinstance(document, dict):
        raise _corrupt(where, f"got {type(document).__name__}, want an object")
    version = _typed(document, "format_version", int, where)
    if version != MANIFEST_VERSION:
        raise ObjectCorrupt(
            f"{where}: format_version: got {version}, want {MANIFEST_VERSION}",
            "",
            "use the version of this program that wrote the run, or start a new --run",
        )


def _read_spec(document: dict[str, Any], where: str) -> TensorSpec | None:
    entry = _optional(document, "spec", where)
    if entry is None:
        return None
    inner = f"{where}: spec"
    shape = _typed(entry, "shape", list, inner)
    try:
        return TensorSpec(_typed(entry, "dtype", str, inner), tuple(shape), _typed(entry, "codec", str, inner))
    except ConfigError as error:
        raise _corrupt(inner, error.what) from None


def _read_shards(shards: dict[str, Any], split: str, where: str) -> tuple[ShardInfo, ...]:
    entries = _typed(shards, split, list, f"{where}: shards")
    return tuple(
        _read_shard_info(entry, f"{where}: shards.{split}[{position}]") for position, entry in enumerate(entries)
    )


def _read_shard_info(entry: Any, where: str) -> ShardInfo:
    return ShardInfo(
        key=_typed(entry, "key", str, where),
        num_bytes=_typed(entry, "num_bytes", int, where),
        num_rows=_typed(entry, "num_rows", int, where),
        checksum=_typed(entry, "checksum", str, where),
    )


def _read_weights(document: dict[str, Any], where: str) -> ObjectInfo | None:
    entry = _optional(document, "weights", where)
    if entry is None:
        return None
    inner = f"{where}: weights"
    return ObjectInfo(
        key=_typed(entry, "key", str, inner),
        num_bytes=_typed(entry, "num_bytes", int, inner),
        checksum=_typed(entry, "checksum", str, inner),
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
    return value


def _corrupt(where: str, problem: str) -> ObjectCorrupt:
    return ObjectCorrupt(f"{where} is damaged: {problem}", "", REPEAT_FIX)
