"""JSON documents that notice when they are changed: the last line is the checksum of everything before it.

    {
     "stage": "block-000",
     ...
     "checksum": "sha256:..."
    }

Every small document of a run is written like this, as no manifest could vouch for it: a flipped bit, a cut end or a
well-meant edit is an error that names the document instead of another result. It guards against damage, not against
whoever can write to the store. Of what the documents say it knows the format version, and refuses every other one.
Entries: `seal`, `read_sealed`, `check_version`.
"""

import json
import re
import shlex
from collections.abc import Mapping
from typing import Any

from nf_pipeline.config import FORMAT_VERSION
from nf_pipeline.documents import parse_json
from nf_pipeline.errors import ObjectCorrupt, ObjectMissing, OtherVersion
from nf_pipeline.run_uri import join_run_uri
from nf_pipeline.storage.store import Data, Store, checksum_of

_END = re.compile(rb',\n "checksum": "(sha256:[0-9a-f]{64})"\n}')
_END_BYTES = len(b',\n "checksum": "sha256:"\n}') + 64


def seal(document: Mapping[str, Any]) -> bytes:
    """Returns a document, which must not be empty, as JSON with its checksum at the end."""
    text = json.dumps(document, indent=1).removesuffix("\n}").encode()
    return text + f',\n "checksum": "{checksum_of(text)}"\n}}'.encode()


def unseal(data: Data) -> dict[str, Any]:
    """Reads what `seal` returned.

    Raises:
        ValueError: it is something else, or was changed since; says how.
    """
    text = bytes(data)
    document = parse_json(text)
    end = _find_end(text)
    if not isinstance(document, dict):
        raise ValueError(f"got a JSON {type(document).__name__}, want an object")
    if end is None:
        raise ValueError("no checksum in its last line: it was changed, or cut, since it was written")
    found = checksum_of(text[: end.start()])
    if found != end.group(1).decode():
        raise ValueError(f"checksum: got {found}, want {end.group(1).decode()}: it was changed since it was written")
    del document["checksum"]
    return document


def read_sealed(store: Store, key: str, fix: str = "") -> dict[str, Any] | None:
    """Reads a sealed document, None if there is none.

    Args:
        store, key: where it is.
        fix: what to do if it is damaged; by default a repair of the run.

    Raises:
        OtherVersion: another version of this program wrote it.
        ObjectCorrupt: it was changed since it was written, or is something else.
    """
    try:
        data = store.get(key)
    except ObjectMissing:
        return None
    try:
        document = unseal(data)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        check_version(_unsealed(data), key, store.uri)
        raise ObjectCorrupt(f"{key} is damaged: {error}", store.uri, fix or repair_fix(store, key)) from None
    check_version(document, key, store.uri)
    return document


def check_version(document: Any, where: str, uri: str) -> None:
    """Refuses a document that says that it is of another format version; one that says nothing passes.

    Raises:
        OtherVersion: names the version that was found and the one that this program reads.
    """
    found = document.get("format_version", FORMAT_VERSION) if isinstance(document, dict) else FORMAT_VERSION
    if found != FORMAT_VERSION:
        raise OtherVersion(
            f"{where} was written by another version of this program: format_version: got {found!r}, "
            f"want {FORMAT_VERSION}",
            uri,
            "use the version that wrote it, or train again under another --run name",
        )


def _find_end(text: bytes) -> re.Match[bytes] | None:
    return _END.fullmatch(text, max(0, len(text) - _END_BYTES))


def _unsealed(data: Data) -> Any:
    """Reads a document that never had a checksum, as those of the first versions; None for every other one."""
    text = bytes(data)
    try:
        return None if _find_end(text) else parse_json(text)
    except ValueError:
        return None


def repair_fix(store: Store, key: str) -> str:
    """Names the command that runs the stage again which made a damaged object.

    Args:
        store: of the run.
        key: of the object, or just the run's name.
    """
    return f"{repair_command(store, key)}, which runs the stage again that made it"


def repair_command(store: Store, key: str) -> str:
    """Returns `nf-pipeline resume STORE/NAME --repair` for the run that a key belongs to."""
    run_uri = join_run_uri(store.uri, key.partition("/")[0])
    return f"nf-pipeline resume {shlex.quote(run_uri)} --repair"
