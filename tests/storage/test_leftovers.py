"""What killed writers leave in S3 unseen: found, told from what is under way, and removed."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from nf_pipeline.driver.gc import collect_garbage
from nf_pipeline.storage.leftovers import find_leftovers
from nf_pipeline.storage.s3 import connect
from nf_pipeline.storage.store import Store, open_store

PART = b"x" * (5 * 2**20)
"""The smallest part that S3 takes before the last one."""


class HandMade:
    """Uploads in the bucket of a store, begun and never ended, as a writer leaves them that is killed."""

    def __init__(self, uri: str) -> None:
        self.bucket, _, self.prefix = uri.removeprefix("s3://").partition("/")
        self.files = connect(uri)

    def begin(self, key: str) -> None:
        name = f"{self.prefix}/{key}"
        upload = self.files.call_s3("create_multipart_upload", Bucket=self.bucket, Key=name)["UploadId"]
        self.files.call_s3("upload_part", Bucket=self.bucket, Key=name, UploadId=upload, PartNumber=1, Body=PART)

    def unfinished(self) -> list[str]:
        page = self.files.call_s3("list_multipart_uploads", Bucket=self.bucket, Prefix=f"{self.prefix}/")
        return [entry["Key"].removeprefix(f"{self.prefix}/") for entry in page.get("Uploads", ())]


@pytest.fixture(params=["minio_uri", pytest.param("moto_uri")])
def uri(request: pytest.FixtureRequest) -> str:
    return request.getfixturevalue(request.param)


@pytest.mark.s3
def test_gc_aborts_the_run_s_unfinished_uploads_and_nobody_else_s(uri: str) -> None:
    store, by_hand = open_store(uri), HandMade(uri)
    store.put("run/run.json", b"{}")
    for key in ("run/blocks/000/attempt-aa/weights.safetensors", "run-2/run.json"):
        by_hand.begin(key)
    found = collect_garbage(f"{uri}/run", dry_run=True)
    assert [(item.key, item.kind) for item in found] == [
        ("run/blocks/000/attempt-aa/weights.safetensors", "unfinished uploads")
    ]
    assert [item.num_bytes for item in found] == [len(PART)]
    assert len(by_hand.unfinished()) == 2
    assert collect_garbage(f"{uri}/run", dry_run=False) == found
    assert by_hand.unfinished() == ["run-2/run.json"]
    assert collect_garbage(f"{uri}/run", dry_run=False) == []


@pytest.mark.s3
def test_upload_that_has_just_begun_is_not_taken_for_a_dead_one(minio_uri: str) -> None:
    HandMade(minio_uri).begin("run/blocks/000/attempt-aa/weights.safetensors")
    store = open_store(minio_uri)
    assert store.leftovers("run", min_age_s=3600.0) == []
    assert len(store.leftovers("run", min_age_s=0.0)) == 1


@pytest.mark.s3
def test_probe_of_a_writer_at_work_stays(moto_uri: str) -> None:
    store = open_store(moto_uri)
    store.put(".nf-probe-0a1b2c3d", b"1")
    assert store.leftovers("run", min_age_s=0.0) == []
    store.put("run/run.json", b"{}")
    collect_garbage(f"{moto_uri}/run", dry_run=False)
    assert store.size(".nf-probe-0a1b2c3d") == 1


def answers(age: timedelta) -> Any:
    """A server whose only upload and only probe began so long before its answer, by its own clock."""
    began = datetime(2020, 1, 1, tzinfo=UTC)
    date = (began + age).strftime("%a, %d %b %Y %H:%M:%S GMT")

    def call(verb: str, key: str, method: str, **arguments: Any) -> dict[str, Any]:
        listed = {
            "list_multipart_uploads": {"Uploads": [{"Key": "p/run/a", "UploadId": "u", "Initiated": began}]},
            "list_objects_v2": {"Contents": [{"Key": "p/.nf-probe-1", "Size": 1, "LastModified": began}]},
            "list_parts": {"Parts": [{"Size": 3}, {"Size": 4}]},
        }
        return {**listed[method], "ResponseMetadata": {"HTTPHeaders": {"date": date}}}

    return call


def test_age_is_told_by_the_server_s_clock() -> None:
    young = find_leftovers(answers(timedelta(minutes=59)), "p/", "run", 3600.0)
    old = find_leftovers(answers(timedelta(minutes=61)), "p/", "run", 3600.0)
    assert young == []
    assert [(item.key, item.num_bytes, item.kind) for item in old] == [
        ("run/a", 7, "unfinished uploads"),
        (".nf-probe-1", 1, "probes"),
    ]


@pytest.mark.s3
def test_object_that_s3fs_would_send_in_parts_is_one_request(moto_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store: Store = open_store(moto_uri)
    sent: list[str] = []
    real = store._files._call_s3

    async def note(method: str, *arguments: Any, **settings: Any) -> Any:
        sent.append(method)
        return await real(method, *arguments, **settings)

    monkeypatch.setattr(store._files, "_call_s3", note)
    store.put("run/large", bytes(105 * 2**20))
    assert sent == ["put_object"]
