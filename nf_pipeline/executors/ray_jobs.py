"""Ray's Jobs API: sends a command to a cluster, follows its log, stops it.

A job is known by its submission id, and what this project must find again stands in the job's metadata. Knows
nothing of runs and configurations. Nothing here needs a Ray on this machine: everything goes over HTTP to the
dashboard of the cluster's head. Entry: `RayJobs`.
"""

import asyncio
import logging
import os
import socket
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobSubmissionClient

from nf_pipeline.errors import ConfigError

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5.0
REQUEST_TIMEOUT_S = (CONNECT_TIMEOUT_S, 120.0)  # to connect, to wait for the next byte of an answer
SILENCE_TIMEOUT_S = 60.0  # how long the dashboard may be away while a log is followed
QUIET_TIMEOUT_S = 120.0  # a job may be quiet; after this the connection is made anew, it may be dead
RETRY_EVERY_S = 2.0
STOP_TIMEOUT_S = 30.0  # Ray gives a job 3 s to end before it kills it
POLL_EVERY_S = 0.5

_TALKATIVE = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
_ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"
_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
_FAILURES = (OSError, RuntimeError, ValueError, KeyError, AuthenticationError, aiohttp.ClientError)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One job of a cluster, as it was when Ray was asked.

    Attributes:
        submission_id: its name.
        status: PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED.
        message: Ray's words about the status.
        metadata: what was given with it.
        exit_code: of the command; None while it runs, and when Ray ended it.
    """

    submission_id: str
    status: str
    message: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    exit_code: int | None = None

    @property
    def ended(self) -> bool:
        """Whether it will not change any more."""
        return self.status in _ENDED


class SubmissionIdTaken(ConfigError):
    """A job with that submission id is there already; ids are never used twice.

    Example: two people submit the same run at the same moment.
    """


@dataclass
class _Place:
    """How far a log was read: characters, and when the last ones came."""

    seen: int = 0
    heard: float = field(default_factory=time.monotonic)


class _Client(JobSubmissionClient):
    def _do_request(self, *arguments: Any, **options: Any) -> Any:
        # Without this a dashboard that accepts and says nothing would be waited for without end.
        return super()._do_request(*arguments, **{"timeout": REQUEST_TIMEOUT_S, **options})


class RayJobs:
    """The jobs of one cluster."""

    def __init__(self, address: str) -> None:
        """Connects.

        Args:
            address: of the dashboard, "http://head:8265".

        Raises:
            ConfigError: nobody answers there, it is no Ray, or it wants another token.
        """
        self.address = address
        for name in _TALKATIVE:  # every package and every closed connection, at the level INFO
            logging.getLogger(name).setLevel(logging.WARNING)
        _check_answers(address)
        with self._explained("connect"), _named_by_the_environment(address):
            self._client = _Client(address)

    def list(self) -> list[Job]:
        """Returns every submitted job that the cluster remembers."""
        with self._explained("list jobs"):
            return [_job_of(details) for details in self._client.list_jobs() if details.submission_id]

    def get(self, submission_id: str) -> Job:
        """Returns one job.

        Raises:
            ConfigError: there is none, or the cluster does not answer.
        """
        with self._explained(f"ask for job {submission_id}"):
            return _job_of(self._client.get_job_info(submission_id))

    def submit(self, submission_id: str, entrypoint: str, runtime_env: Mapping[str, Any], metadata: Any) -> None:
        """Starts a command on the cluster.

        Args:
            submission_id: letters, digits, '-' and '_'; never used before on this cluster.
            entrypoint: for a shell in the folder that was shipped.
            runtime_env: of Ray; a local "working_dir" is uploaded.
            metadata: texts to find the job by.

        Raises:
            SubmissionIdTaken: there is such a job.
            ConfigError: the cluster refuses it.
        """
        with self._explained(f"submit job {submission_id}"):
            try:
                self._client.submit_job(
                    entrypoint=entrypoint,
                    submission_id=submission_id,
                    runtime_env=dict(runtime_env),
                    metadata=dict(metadata),
                )
            except RuntimeError as error:
                if f"submission_id {submission_id} already exists" not in str(error):
                    raise
                raise SubmissionIdTaken(f"there is a job {submission_id} already", "submit it again") from None

    def follow(self, submission_id: str) -> Iterator[str]:
        """Yields the job's log as it grows, from its beginning, until the job has ended.

        A connection that breaks is made anew and goes on where the other one ended.

        Raises:
            ConfigError: the dashboard was away for too long; the job may still run.
        """
        place = _Place()
        while True:
            try:
                closed = yield from self._tail(submission_id, place)
                # Asked after the log was read: what ended before its end was reached may have said more.
                if self.get(submission_id).ended and closed:
                    return
                place.heard = time.monotonic()
            except (*_FAILURES, ConfigError) as error:
                logger.debug("the log of %s broke off: %r", submission_id, error)
                if isinstance(error, AuthenticationError) or time.monotonic() - place.heard > SILENCE_TIMEOUT_S:
                    raise self._lost(submission_id, error) from None
            time.sleep(RETRY_EVERY_S)

    def stop(self, submission_id: str) -> Job:
        """Asks Ray to end a job and waits for it, half a minute at most; returns the job as it then is."""
        with self._explained(f"stop job {submission_id}"):
            self._client.stop_job(submission_id)
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while not (job := self.get(submission_id)).ended and time.monotonic() < deadline:
            time.sleep(POLL_EVERY_S)
        return job

    def _tail(self, submission_id: str, place: _Place) -> Generator[str, None, bool]:
        """Yields what is new from one connection; returns whether it ended, False if it was quiet for too long."""
        pieces = self._client.tail_job_logs(submission_id)
        skip = place.seen  # every connection begins at the beginning

        async def next_piece() -> str:
            return await asyncio.wait_for(anext(pieces, ""), QUIET_TIMEOUT_S)

        # The runner turns Ctrl-C into KeyboardInterrupt between two pieces, after the connection was closed.
        with asyncio.Runner() as runner:
            try:
                while piece := runner.run(next_piece()):
                    place.heard = time.monotonic()
                    rest = piece[skip:]
                    skip = max(0, skip - len(piece))
                    place.seen += len(rest)
                    if rest:
                        yield rest
            except TimeoutError:
                return False
        return True

    @contextmanager
    def _explained(self, action: str) -> Iterator[None]:
        try:
            yield
        except AuthenticationError as error:
            raise ConfigError(
                f"cannot {action}: the Ray cluster at {self.address} refuses: {_first_line(error)}",
                "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's token",
            ) from None
        except _FAILURES as error:
            raise ConfigError(
                f"cannot {action} at {self.address}: {type(error).__name__}: {_last_line(error)}",
                "check that --address is the dashboard of a Ray cluster, http://HEAD:8265",
            ) from None

    def _lost(self, submission_id: str, error: Exception) -> ConfigError:
        return ConfigError(
            f"lost the Ray cluster at {self.address} ({_first_line(error)}); job {submission_id} may still run",
            "give the same command again: it follows the job that runs, or starts the next one",
        )


@contextmanager
def _named_by_the_environment(address: str) -> Iterator[None]:
    """Ray prefers this variable, and after it RAY_ADDRESS, to the address that it is given."""
    before = os.environ.get(_ADDRESS_VARIABLE)
    os.environ[_ADDRESS_VARIABLE] = address
    try:
        yield
    finally:
        if before is None:
            del os.environ[_ADDRESS_VARIABLE]
        else:
            os.environ[_ADDRESS_VARIABLE] = before


def _check_answers(address: str) -> None:
    """Fails in seconds where a request would wait for minutes."""
    parts = urlsplit(address)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        with closing(socket.create_connection((parts.hostname or "", port), timeout=CONNECT_TIMEOUT_S)):
            return
    except OSError as error:
        raise ConfigError(
            f"no Ray dashboard answers at {address}: {error}",
            "--address http://HEAD:8265, a head that was started with its dashboard, and a route to it "
            "(ssh -L 8265:localhost:8265 HEAD)",
        ) from None


def _job_of(details: JobDetails) -> Job:
    return Job(
        submission_id=details.submission_id or "",
        status=str(details.status),
        message=details.message or "",
        metadata=details.metadata or {},
        exit_code=details.driver_exit_code,
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _last_line(error: Exception) -> str:
    """Ray's servers answer with a whole traceback, whose last line says what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:500] if lines else ""
