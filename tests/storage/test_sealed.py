"""Sealed documents notice every change, whoever made it."""

import json
from pathlib import Path

import pytest

from nf_pipeline.config import FORMAT_VERSION
from nf_pipeline.errors import ObjectCorrupt, OtherVersion
from nf_pipeline.storage.sealed import read_sealed, repair_command, seal, unseal
from nf_pipeline.storage.store import open_store

DOCUMENT = {
    "format_version": FORMAT_VERSION,
    "rate": 1e-05,
    "names": ["Zürich", 'a "quoted" text'],
    "inner": {"checksum": "sha256:"},
}


def test_sealed_document_reads_back_and_is_plain_json_with_its_checksum_last() -> None:
    data = seal(DOCUMENT)
    assert unseal(data) == DOCUMENT
    assert list(json.loads(data)) == [*DOCUMENT, "checksum"]


def test_every_flipped_bit_is_noticed() -> None:
    data = seal(DOCUMENT)
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError, match=r"\S"):
            unseal(changed)


def test_every_cut_is_noticed() -> None:
    data = seal(DOCUMENT)
    for length in range(len(data)):
        with pytest.raises(ValueError, match=r"\S"):
            unseal(data[:length])


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b'{"a": 1}', "no checksum in its last line"),
        (b"[1]", "got a JSON list, want an object"),
        (json.dumps(json.loads(seal(DOCUMENT))).encode(), "no checksum in its last line"),
        (seal(DOCUMENT).replace(b"Z", b"X"), "checksum: got sha256:.*, want sha256:.*"),
        (seal(DOCUMENT) + b" ", "no checksum in its last line"),
        (b"\xff\xfe", "Expecting value"),
        (b"[" * 100_000, "recursion|nested"),
    ],
    ids=["unsealed", "list", "laid out anew", "edited", "longer", "no text", "deep"],
)
def test_document_that_was_changed_is_named_with_what_is_wrong(tmp_path: Path, data: bytes, problem: str) -> None:
    store = open_store(str(tmp_path / "my runs"))
    store.put("run/plan.json", data)
    with pytest.raises(ObjectCorrupt, match=rf"(?s)run/plan\.json is damaged: .*({problem})") as caught:
        read_sealed(store, "run/plan.json")
    assert caught.value.fix.startswith(f"nf-pipeline resume '{tmp_path}/my runs/run' --repair")


def test_absent_document_is_none(tmp_path: Path) -> None:
    assert read_sealed(open_store(str(tmp_path)), "run/plan.json") is None


def test_command_that_repairs_names_the_run_of_any_key(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    assert repair_command(store, "r/blocks/000/manifest.json") == f"nf-pipeline resume {tmp_path}/r --repair"


@pytest.mark.parametrize("is_sealed", [True, False], ids=["sealed", "from before documents were sealed"])
def test_document_of_another_version_is_refused_with_both_versions_and_a_way_out(
    tmp_path: Path, is_sealed: bool
) -> None:
    store, document = open_store(str(tmp_path)), {**DOCUMENT, "format_version": 1}
    store.put("run/run.json", seal(document) if is_sealed else json.dumps(document, indent=1).encode())
    with pytest.raises(OtherVersion, match=r"run/run\.json .*format_version: got 1, want 4") as caught:
        read_sealed(store, "run/run.json")
    assert "another --run name" in caught.value.fix


def test_damaged_version_of_a_sealed_document_is_damage(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.put("run/run.json", seal(DOCUMENT).replace(b'"format_version": 4', b'"format_version": 5'))
    with pytest.raises(ObjectCorrupt, match="is damaged: checksum"):
        read_sealed(store, "run/run.json")
