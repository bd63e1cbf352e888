"""A run as a job of a Ray cluster: what is sent, which job belongs to which run, what its end means.

The job is `nf-pipeline train` with the resolved configuration; everything else, resuming included, is the run's own
doing. Jobs find their run by metadata, so that submitting a run twice never trains it twice. Prints nothing.
Entries: `prepare`, `submit`.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

from nf_pipeline.config import RunConfig
from nf_pipeline.data.sources import DIGITS, absolute_source
from nf_pipeline.errors import EXIT_BLOCK, EXIT_DONE, ConfigError
from nf_pipeline.executors.ray_jobs import Job, RayJobs, SubmissionIdTaken
from nf_pipeline.redact import holds_credentials, names_a_secret
from nf_pipeline.run_uri import join_run_uri
from nf_pipeline.storage.store import open_store
from nf_pipeline.trust import is_factory

CONFIG_FILE = "nf-pipeline-run.json"
ENTRYPOINT = f"nf-pipeline train --config {CONFIG_FILE}"
RUN_KEY = "nf_run"
FINGERPRINT_KEY = "nf_fingerprint"

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")  # those of Ray, in its order
EXIT_STOPPED = 130
NUM_TRIES = 3

_PRIVATE = (".env",)  # credentials: who may use the cluster's API may read what is shipped
_IGNORE_FILES = (".rayignore", ".gitignore")  # what Ray heeds when it packs a folder
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True, kw_only=True)
class RunRequest:
    """What a job is to train.

    Attributes:
        config: as the job reads it: paths are absolute, stages run as Ray tasks of the job's own cluster.
        environment: variables that the job gets; no credentials.
        working_dir: local folder that is shipped beside the configuration; None ships nothing else.
        notes: what a person should know, one line each.
    """

    config: RunConfig
    environment: Mapping[str, str]
    working_dir: Path | None
    notes: tuple[str, ...]

    @property
    def run_uri(self) -> str:
        """STORE/NAME."""
        return join_run_uri(self.config.storage.uri, self.config.run)

    @property
    def metadata(self) -> dict[str, str]:
        """What a later submission finds the job by."""
        return {RUN_KEY: self.run_uri, FINGERPRINT_KEY: self.config.fingerprint}


def jobs_address(given: str | None, environment: Mapping[str, str] = os.environ) -> str:
    """Returns the dashboard's address: the given one, that of RAY_API_SERVER_ADDRESS or RAY_ADDRESS, this machine's.

    Raises:
        ConfigError: it is an address for drivers, such as head:6379, or no URL.
    """
    named = [("--address", given), *((name, environment.get(name)) for name in ADDRESS_VARIABLES)]
    where, address = next(((name, value) for name, value in named if value), ("", DEFAULT_ADDRESS))
    try:
        parts = urlsplit(address)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        usable = False
    if not usable:
        raise ConfigError(
            f"{where} {address}: jobs are submitted to the dashboard of the cluster's head, over HTTP",
            "--address http://HEAD:8265",
        )
    if "@" in parts.netloc:
        raise ConfigError(f"{where}: credentials do not belong into the URL (not shown)", "set RAY_AUTH_TOKEN")
    return address.rstrip("/")


def prepare(config: RunConfig, variables: Sequence[str] = (), working_dir: Path | None = None) -> RunRequest:
    """Turns a configuration of this machine into one that means the same on a cluster.

    Args:
        config: as `train` would take it; where it runs is replaced.
        variables: names of environment variables to hand on.
        working_dir: local folder with the code of the model's factory.

    Raises:
        ConfigError: it asks for the inline executor, a variable is not set or holds a credential, or there is no such
            folder.
    """
    if config.cluster.executor != "ray":
        raise ConfigError(
            f"cluster.executor is {config.cluster.executor!r}: the job's stages run as Ray tasks", "--executor ray"
        )
    if working_dir is not None and not (working_dir.is_dir() and os.access(working_dir, os.R_OK | os.X_OK)):
        raise ConfigError(f"--working-dir {working_dir}: no folder to read", "give the folder that holds the factory")
    store_uri, source = open_store(config.storage.uri).uri, absolute_source(config.data.source)
    settled = config.model_copy(
        update={
            "storage": config.storage.model_copy(update={"uri": store_uri}),
            "data": config.data.model_copy(update={"source": source}),
            "cluster": config.cluster.model_copy(update={"executor": "ray", "address": "auto"}),
        }
    )
    return RunRequest(
        config=settled,
        environment=_handed_on(variables),
        working_dir=working_dir,
        notes=tuple(_notes(settled, working_dir)),
    )


def submit(jobs: RayJobs, request: RunRequest) -> tuple[Job, bool]:
    """Starts a job for the run, or finds the one that trains it already.

    A run whose last job has ended, however it ended, gets another one: `train` skips what is finished.

    Returns:
        The job, and whether it was there before.

    Raises:
        ConfigError: a job trains this run with other settings, or the cluster refuses.
    """
    for _ in range(NUM_TRIES - 1):
        with suppress(SubmissionIdTaken):  # somebody else submits the same run at this moment: look again
            return _find_or_start(jobs, request)
    return _find_or_start(jobs, request)


def running_job(known: Sequence[Job], request: RunRequest) -> Job | None:
    """Returns the job that trains this very run now.

    Raises:
        ConfigError: it trains it with other settings.
    """
    for job in known:
        if job.ended or job.metadata.get(RUN_KEY) != request.run_uri:
            continue
        theirs, ours = job.metadata.get(FINGERPRINT_KEY, ""), request.config.fingerprint
        if theirs != ours:
            raise ConfigError(
                f"job {job.submission_id} ({job.status}) trains {request.run_uri} with other settings: "
                f"fingerprint there {theirs or 'none'}, here {ours}",
                "another --run NAME, the settings of that job, or stop it first",
            )
        return job
    return None


def next_submission_id(run: str, known: Sequence[Job]) -> str:
    """Returns "nf-RUN-N" with the smallest N behind all that were used; ids are never used twice."""
    prefix = f"nf-{re.sub(r'[^A-Za-z0-9_-]', '-', run)}-"
    behind = (job.submission_id.removeprefix(prefix) for job in known if job.submission_id.startswith(prefix))
    return f"{prefix}{max((int(text) for text in behind if text.isdecimal()), default=0) + 1}"


def exit_code_of(job: Job) -> int:
    """Returns the exit code of the job's command; where there is none, what its status stands for."""
    if job.exit_code is not None:
        return job.exit_code if job.exit_code >= 0 else 128 - job.exit_code  # as shells write "ended by a signal"
    return {"SUCCEEDED": EXIT_DONE, "STOPPED": EXIT_STOPPED}.get(job.status, EXIT_BLOCK)


def _find_or_start(jobs: RayJobs, request: RunRequest) -> tuple[Job, bool]:
    known = jobs.list()
    running = running_job(known, request)
    if running is not None:
        return running, True
    submission_id = next_submission_id(request.config.run, known)
    with _shipped_folder(request) as folder:
        runtime_env: dict[str, Any] = {"working_dir": str(folder), "env_vars": dict(request.environment)}
        jobs.submit(submission_id, ENTRYPOINT, runtime_env, request.metadata)
    return jobs.get(submission_id), False


@contextmanager
def _shipped_folder(request: RunRequest) -> Iterator[Path]:
    """Yields a folder with the configuration and links to what goes along; Ray packs what they lead to."""
    document = request.config.model_dump(mode="json")
    with TemporaryDirectory(prefix="nf-pipeline-") as name:
        folder = Path(name)
        for entry in () if request.working_dir is None else request.working_dir.absolute().iterdir():
            if entry.name in _IGNORE_FILES and entry.is_file():
                # A pattern such as *.json must not leave the configuration behind; the last match wins.
                (folder / entry.name).write_bytes(entry.read_bytes() + f"\n!{CONFIG_FILE}\n".encode())
            elif entry.name not in (CONFIG_FILE, *_PRIVATE):
                (folder / entry.name).symlink_to(entry, target_is_directory=entry.is_dir())
        (folder / CONFIG_FILE).write_text(json.dumps(document, indent=2), encoding="utf8")
        yield folder


def _handed_on(variables: Sequence[str]) -> dict[str, str]:
    for name in variables:
        if not _VARIABLE.fullmatch(name):
            shown = name.partition("=")[0]
            raise ConfigError(
                f"--env {shown}{'=...' if '=' in name else ''}: want the name of a variable; its value is taken from "
                "this command's environment, where others do not see it",
                f"export {shown or 'NAME'}, then --env {shown or 'NAME'}",
            )
        if name not in os.environ:
            raise ConfigError(f"--env {name}: there is no such variable here", f"export {name}, or leave it out")
        if names_a_secret(name) or holds_credentials(os.environ[name]):
            raise ConfigError(
                f"--env {name}: it holds a credential (not shown), and Ray shows the environment of jobs to "
                "everybody who may use its API, and keeps it in its logs",
                f"set {name} where the cluster's nodes are started",
            )
    return {name: os.environ[name] for name in variables}


def _notes(config: RunConfig, working_dir: Path | None) -> Iterator[str]:
    if "://" not in config.storage.uri:
        yield f"the store is a folder: every machine of the cluster must share {config.storage.uri}"
    source = config.data.source
    if source != DIGITS and "://" not in source:
        yield f"the data is local: every machine of the cluster must share {source.rpartition(':')[2]}"
    if is_factory(config.model.name or "") and working_dir is None:
        yield f"the cluster must have {config.model.name} installed, or ship it with --working-dir DIR"
