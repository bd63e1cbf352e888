"""A store in an S3 bucket, through s3fs.

Whole objects only: one PUT, one GET, nothing cached. Create-once uses If-None-Match where the server honours
it (AWS, recent MinIO, most others); older MinIO code ignores the header and silently overwrites, so every
store is asked once. Errors name the bucket and S3's code, never a credential. Deliberately knows nothing of
what the objects contain. Opened by `store.open_store`.
"""

import contextlib
import itertools
import logging
import math
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from nf_pipeline.errors import AlreadyExists, ConfigError, ObjectMissing, StorageError, StoreUnreachable
from nf_pipeline.redact import holds_credentials, redacted
from nf_pipeline.storage.leftovers import PROBE_PREFIX, Leftover, discard_leftover, find_leftovers
from nf_pipeline.storage.store import Data, check_key, open_store

_logger = logging.getLogger(__name__)

_Answer = TypeVar("_Answer")

CONNECT_TIMEOUT_S = 10
READ_TIMEOUT_S = 30
OPERATION_TIMEOUT_S = 300.0
MAX_ATTEMPTS = 4
OUTAGE_TIMEOUT_S = 120.0
_OUTAGE_WAITS_S = (1.0, 2.0, 5.0)

_ONE_PUT_BYTES = 2**30  # s3fs turns objects of twice this size into a multipart upload
_DELETE_THREADS = 8
_MARK = "nf-writer"

_MISSING = ("NoSuchKey", "404")
_REFUSED = (
    "AccessDenied",
    "AllAccessDisabled",
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidToken",
    "RequestTimeTooSkewed",
    "SignatureDoesNotMatch",
    "401",
    "403",
)
_TAKEN = ("PreconditionFailed", "412")
_CONFLICT = ("ConditionalRequestConflict", "OperationAborted", "409")
_NO_CONDITIONS = ("NotImplemented", "501", "InvalidArgument", "InvalidRequest")
_BUSY_STATUS = (408, 429, 500, 502, 503, 504)
_CONFLICT_WAITS_S = (0.2, 0.5, 1.0, 2.0)

_FIX_BUCKET = "create the bucket, or correct --store"
_FIX_REFUSED = "set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, if used, AWS_SESSION_TOKEN for this endpoint"
_FIX_TLS = (
    "AWS_ENDPOINT_URL with the name that the certificate is for, and AWS_CA_BUNDLE=FILE with the certificate of its "
    "authority where that is your own"
)
_FIX_REACH = "check AWS_ENDPOINT_URL, the network and that the server runs, then resume"


class S3Store:
    """Objects below a prefix of a bucket, which must exist.

    Endpoint, region and credentials come from the environment when the store is opened. Requests are retried
    with backoff; none takes longer than OPERATION_TIMEOUT_S. A server that has answered before and falls silent
    is asked again until OUTAGE_TIMEOUT_S have passed, so that a restart of it costs time and no work; one that has
    never answered fails at once. s3fs runs one event loop in a thread of its own,
    which is why a store can be used from any thread, but not in a forked child.

    Args:
        bucket: its name.
        prefix: of every key, without slashes at its ends; may be empty.
    """

    def __init__(self, bucket: str, prefix: str) -> None:
        self.uri = f"s3://{bucket}/{prefix}" if prefix else f"s3://{bucket}"
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self._files = connect(self.uri)
        self._silent_since = -math.inf  # monotonic seconds; inf while the server answers
        self._conditional: bool | None = None
        self._probe_lock = threading.Lock()

    def __repr__(self) -> str:
        return f"S3Store({self.uri!r})"

    def __reduce__(self) -> tuple[object, ...]:
        return open_store, (self.uri,)

    def get(self, key: str) -> Data:
        """Reads a whole object (see `Store.get`)."""
        path = f"{self._bucket}/{self._name(key)}"
        try:
            # One stream per object: s3fs would ask for the size first, and split what is larger than 50 MiB.
            return self._ask(lambda: self._files.cat_file(path, max_concurrency=1, timeout=OPERATION_TIMEOUT_S))
        except s3_failures() as error:
            raise self._explain(error, "read", key) from None

    def view(self, key: str) -> Data:
        """Reads a whole object (see `Store.view`)."""
        return self.get(key)

    def put(self, key: str, data: Data) -> None:
        """Writes a whole object (see `Store.put`)."""
        try:
            self._pipe(key, data)
        except s3_failures() as error:
            raise self._explain(error, "write", key) from None

    def create(self, key: str, data: Data) -> None:
        """Writes an object that must not exist yet (see `Store.create`).

        Without conditional writes on the server this is best effort: two writers within the same moment may
        both believe that they were first, though only one object remains. Whoever commits therefore reads the
        object that it goes on with.
        """
        if self._honours_conditions():
            self._create_conditionally(key, data)
        else:
            self._create_and_compare(key, data)

    def size(self, key: str) -> int | None:
        """Returns the bytes of an object (see `Store.size`)."""
        head = self._head(key)
        return None if head is None else int(head["ContentLength"])

    def delete(self, keys: Iterable[str]) -> None:
        """Removes objects (see `Store.delete`)."""
        # One request per key: the request for many needs an MD5 on older MinIO code, a CRC on AWS.
        with ThreadPoolExecutor(_DELETE_THREADS, thread_name_prefix="s3-delete") as pool:
            for _ in pool.map(self._delete_one, keys):
                pass

    def list(self, prefix: str) -> list[tuple[str, int]]:
        """Lists objects (see `Store.list`)."""
        prefix = prefix.removesuffix("/")
        folder = f"{self._name(prefix)}/" if prefix else self._prefix
        found: list[tuple[str, int]] = []
        more: dict[str, str] = {}
        while True:
            page = self._call("list", prefix, "list_objects_v2", Prefix=folder, **more)
            for entry in page.get("Contents", ()):
                if not entry["Key"].endswith("/"):  # consoles make empty objects to show a folder
                    found.append((entry["Key"].removeprefix(self._prefix), int(entry["Size"])))
            if not page.get("IsTruncated"):
                return sorted(found)
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def leftovers(self, prefix: str, *, min_age_s: float) -> Sequence[Leftover]:
        """Lists unfinished uploads and forgotten probes (see `Store.leftovers`)."""
        return find_leftovers(self._call, self._prefix, prefix, min_age_s)

    def discard(self, leftovers: Iterable[Leftover]) -> None:
        """Removes leftovers (see `Store.discard`)."""
        for leftover in leftovers:
            discard_leftover(self._call, self._prefix, leftover)

    def _delete_one(self, key: str) -> None:
        with contextlib.suppress(ObjectMissing):
            self._call("delete", key, "delete_object", Key=self._name(key))

    def _create_conditionally(self, key: str, data: Data) -> None:
        mark = secrets.token_hex(8)
        for wait_s in _CONFLICT_WAITS_S:
            code = self._put_if_absent(key, data, mark)
            if code is None:
                return
            if code in _TAKEN:
                head = self._head(key)
                # A retried request meets its own first try, whose answer was lost: then the mark is ours.
                if head is not None and head.get("Metadata", {}).get(_MARK) == mark:
                    return
                raise self._exists(key)
            time.sleep(wait_s)
        raise StorageError(f"cannot create {key}: the server keeps answering {code}", self.uri, "resume")

    def _create_and_compare(self, key: str, data: Data) -> None:
        if self._head(key) is not None:
            raise self._exists(key)
        self.put(key, data)
        if bytes(self.get(key)) != bytes(data):
            raise self._exists(key)

    def _honours_conditions(self) -> bool:
        with self._probe_lock:
            if self._conditional is None:
                self._conditional = self._probe()
                _logger.info("%s: conditional writes: %s", self.uri, "yes" if self._conditional else "no")
            return self._conditional

    def _probe(self) -> bool:
        key = f"{PROBE_PREFIX}{secrets.token_hex(8)}"
        self.put(key, b"1")
        try:
            return self._put_if_absent(key, b"2", "probe") in _TAKEN
        finally:
            with contextlib.suppress(StorageError):  # a store that never deletes still takes runs
                self.delete([key])

    def _put_if_absent(self, key: str, data: Data, mark: str) -> str | None:
        """Returns None where the object was written, otherwise S3's code of a condition that did not hold."""
        try:
            self._pipe(key, data, mode="create", Metadata={_MARK: mark})
        except s3_failures() as error:
            code = _code_of(error)
            if code in (*_TAKEN, *_CONFLICT, *_NO_CONDITIONS):
                return code
            raise self._explain(error, "create", key) from None
        return None

    def _pipe(self, key: str, data: Data, **options: Any) -> None:
        body = data if isinstance(data, bytes) else bytes(data)  # botocore takes no memoryview
        path = f"{self._bucket}/{self._name(key)}"
        settings = {"chunksize": _ONE_PUT_BYTES, "timeout": OPERATION_TIMEOUT_S, **options}
        self._ask(lambda: self._files.pipe_file(path, body, **settings))

    def _head(self, key: str) -> dict[str, Any] | None:
        try:
            return self._call("look up", key, "head_object", Key=self._name(key))
        except ObjectMissing:
            self._call("look up", key, "head_bucket")  # a HEAD does not say which of the two is missing
            return None

    def _call(self, verb: str, key: str, method: str, **arguments: Any) -> dict[str, Any]:
        settings = {"Bucket": self._bucket, "timeout": OPERATION_TIMEOUT_S, **arguments}
        try:
            return self._ask(lambda: self._files.call_s3(method, **settings))
        except s3_failures() as error:
            raise self._explain(error, verb, key, method) from None

    def _ask(self, request: Callable[[], _Answer]) -> _Answer:
        """Sends a request, again and again while the server is away for less than OUTAGE_TIMEOUT_S."""
        waits = itertools.chain(_OUTAGE_WAITS_S, itertools.repeat(_OUTAGE_WAITS_S[-1]))
        began = time.monotonic()
        while True:
            try:
                answer = request()
            except s3_failures() as error:
                wait_s = next(waits)
                if not may_pass(error):
                    self._silent_since = math.inf if _response_of(error) else self._silent_since
                    raise
                if not self._has_patience(began, wait_s):
                    raise
                _logger.warning("%s does not answer (%s): asked again", self.uri, redacted(str(error)))
                time.sleep(wait_s)
            else:
                self._silent_since = math.inf
                return answer

    def _has_patience(self, began: float, wait_s: float) -> bool:
        # All threads share the clock: after one outage that was too long nothing waits until the server is back.
        # Where others are answered meanwhile (reads pass, writes do not), a request's own time is what ends it.
        self._silent_since = min(self._silent_since, began)
        return time.monotonic() + wait_s <= self._silent_since + OUTAGE_TIMEOUT_S

    def _name(self, key: str) -> str:
        return self._prefix + check_key(key)

    def _exists(self, key: str) -> AlreadyExists:
        return AlreadyExists(f"object {key} exists already", self.uri)

    def _explain(self, error: Exception, verb: str, key: str, method: str = "") -> StorageError:
        code = _code_of(error)
        if code == "NoSuchBucket" or (method == "head_bucket" and code in _MISSING):
            return StorageError(f"bucket {self._bucket} does not exist", self.uri, _FIX_BUCKET)
        if code in _MISSING:
            return ObjectMissing(f"object {key} does not exist", self.uri)
        return explain_failure(error, f"cannot {verb} {key}", self.uri)


def connect(uri: str) -> Any:
    """Makes the client; no request is sent."""
    import s3fs

    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None
    if endpoint and holds_credentials(endpoint):
        raise ConfigError(f"store {uri}: AWS_ENDPOINT_URL holds credentials (not shown)", "remove them there")
    _check_authorities(uri)
    config = {
        "connect_timeout": CONNECT_TIMEOUT_S,
        "read_timeout": READ_TIMEOUT_S,
        "retries": {"mode": "standard", "total_max_attempts": MAX_ATTEMPTS},
        # Older servers reject the checksums that botocore adds by default; manifests hold a SHA-256 anyway.
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
        "max_pool_connections": 32,
    }
    if endpoint:
        config["s3"] = {"addressing_style": "path"}  # bucket.host needs DNS that few own servers have
    try:
        # client_kwargs is given, though empty, so that no configuration file of fsspec can turn off the verification
        # of certificates. Which authorities are trusted is up to AWS_CA_BUNDLE, which botocore reads.
        files = s3fs.S3FileSystem(
            endpoint_url=endpoint,
            config_kwargs=config,
            client_kwargs={},
            use_listings_cache=False,
            skip_instance_cache=True,
        )
        files.retries = 2  # of bodies that break off; botocore retries everything else
        files.connect()
    except ValueError as error:
        raise ConfigError(f"store {uri}: {redacted(str(error))}", "correct AWS_ENDPOINT_URL") from None
    except s3_failures() as error:
        raise explain_failure(error, "cannot open the store", uri) from None
    return files


def _check_authorities(uri: str) -> None:
    """Finds in a moment what would otherwise look like a server that does not answer."""
    for name in ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE"):
        bundle = os.environ.get(name)
        if bundle is not None and not os.path.isfile(bundle):
            raise ConfigError(f"store {uri}: {name} is {bundle!r}, which is no file", f"correct {name}, or unset it")


def s3_failures() -> tuple[type[Exception], ...]:
    """Returns what a request may raise: imported late, as only this store needs it."""
    from aiohttp import ClientError as HttpError
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError

    return OSError, BotoCoreError, ClientError, ResponseParserError, HttpError


def may_pass(error: Exception) -> bool:
    """Tells whether one of `s3_failures` says that the server is away or busy, rather than that it refuses."""
    from botocore.exceptions import BotoCoreError, ConnectionError, HTTPClientError, SSLError

    response = _response_of(error)
    if response:
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode") in _BUSY_STATUS
    if isinstance(error, BotoCoreError):  # what is not of the connection is of the configuration
        return isinstance(error, ConnectionError | HTTPClientError) and not isinstance(error, SSLError)
    return True


def _response_of(error: BaseException) -> dict[str, Any]:
    """Returns the server's answer, which s3fs keeps in the cause; {} if none came."""
    for candidate in (error, error.__cause__):
        response = getattr(candidate, "response", None)
        if isinstance(response, dict):
            return response
    return {}


def _code_of(error: BaseException) -> str:
    """Returns S3's own code; "" if no answer came."""
    return str(_response_of(error).get("Error", {}).get("Code", ""))


def explain_failure(error: Exception, what: str, uri: str) -> StorageError:
    """Turns one of `s3_failures` into an error that says what to do, without credentials."""
    from botocore.exceptions import NoCredentialsError, PartialCredentialsError, ProfileNotFound, SSLError

    code = _code_of(error)
    if code in _REFUSED:
        return StorageError(f"{what}: the server refused the credentials ({code})", uri, _FIX_REFUSED)
    if isinstance(error, NoCredentialsError | PartialCredentialsError | ProfileNotFound):
        return StorageError(f"{what}: {redacted(str(error))}", uri, _FIX_REFUSED)
    if isinstance(error, SSLError):
        return StorageError(f"{what}: the server's certificate is not trusted: {redacted(str(error))}", uri, _FIX_TLS)
    text = redacted(str(error)) or type(error).__name__
    kind = StoreUnreachable if may_pass(error) else StorageError
    return kind(f"{what}: {text}" if code in text else f"{what}: {code}: {text}", uri, _FIX_REACH)
