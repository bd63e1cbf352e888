"""What writers leave behind in S3 when they are killed, and no listing of objects shows or ties to a run.

Large objects are uploads of several parts: one that is never completed is stored, and paid for, unseen. The probe
with which a store finds out about conditional writes lies outside every run. Ages are told by the server's clock
alone. Deliberately knows nothing of connections: the store sends its requests. Entries: `find_leftovers`,
`discard_leftover`.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from nf_pipeline.errors import ObjectMissing, StorageError

logger = logging.getLogger(__name__)

PROBE_PREFIX = ".nf-probe-"
PROBE_AGE_S = 3600.0

Call = Callable[..., dict[str, Any]]
"""(verb for errors, key for errors, method of S3's client, its arguments but for the bucket) -> answer."""


@dataclass(frozen=True, kw_only=True)
class Leftover:
    """One thing that a killed writer left.

    Attributes:
        key: relative to the store.
        num_bytes: stored so far; 0 where the server does not say.
        kind: "unfinished uploads" or "probes".
        upload_id: of an upload.
    """

    key: str
    num_bytes: int
    kind: str
    upload_id: str = ""


def find_leftovers(call: Call, root: str, prefix: str, min_age_s: float) -> list[Leftover]:
    """Lists unfinished uploads below a prefix, and probes at the store's root that nobody waits for any more.

    Args:
        call: sends a request.
        root: of the store in its bucket; empty or with a "/" at its end.
        prefix: folder-like, relative to the store.
        min_age_s: of uploads.

    Returns:
        Nothing where the server does not offer this or the credentials do not allow it: then a log entry says so.
    """
    try:
        uploads = list(_uploads(call, root, f"{root}{prefix.removesuffix('/')}/", min_age_s))
        return uploads + list(_probes(call, root))
    except StorageError as error:
        logger.warning("unfinished uploads cannot be listed: %s", error)
        return []


def discard_leftover(call: Call, root: str, leftover: Leftover) -> None:
    """Removes a leftover; one that is gone already is fine."""
    name = root + leftover.key
    try:
        if leftover.upload_id:
            call("abort the upload of", leftover.key, "abort_multipart_upload", Key=name, UploadId=leftover.upload_id)
        else:
            call("delete", leftover.key, "delete_object", Key=name)
    except ObjectMissing:
        return


def _uploads(call: Call, root: str, folder: str, min_age_s: float) -> Iterator[Leftover]:
    more: dict[str, str] = {}
    while True:
        page = call("list uploads below", folder, "list_multipart_uploads", Prefix=folder, **more)
        for upload in page.get("Uploads", ()):
            if _age_s(page, upload["Initiated"]) >= min_age_s:
                key, upload_id = upload["Key"], upload["UploadId"]
                size = _stored_bytes(call, key, upload_id)
                name = key.removeprefix(root)
                yield Leftover(key=name, num_bytes=size, kind="unfinished uploads", upload_id=upload_id)
        if not page.get("IsTruncated"):
            return
        more = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}


def _probes(call: Call, root: str) -> Iterator[Leftover]:
    page = call("list", PROBE_PREFIX, "list_objects_v2", Prefix=root + PROBE_PREFIX)  # a thousand at a time will do
    for entry in page.get("Contents", ()):
        if _age_s(page, entry["LastModified"]) >= PROBE_AGE_S:
            yield Leftover(key=entry["Key"].removeprefix(root), num_bytes=int(entry["Size"]), kind="probes")


def _stored_bytes(call: Call, key: str, upload_id: str) -> int:
    try:
        page = call("look up the parts of", key, "list_parts", Key=key, UploadId=upload_id)
    except ObjectMissing:  # completed or aborted since it was listed
        return 0
    return sum(int(part["Size"]) for part in page.get("Parts", ()))


def _age_s(page: dict[str, Any], began: Any) -> float:
    """Returns seconds between a time of the server and its answer, whose date has no fractions; 0 without a date."""
    answered = page.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date")
    return max(0.0, (parsedate_to_datetime(answered) - began).total_seconds()) if answered else 0.0
