"""A real run with recognisable secrets in its environment, and everything that it left anywhere.

The commands run as processes of their own, on a real S3 server, stages as tasks of the local Ray that `train` starts;
Ray keeps its logs in a folder of the run's own. Entries: `Planted`, `command`.
"""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from process_sessions import members, running
from s3_servers import S3Server

from nf_pipeline.storage.store import open_store

TIMEOUT_S = 180
SMALL = (
    *("--memory-budget", "4MiB", "--device", "cpu", "--max-train-images", "200", "--epochs", "1"),
    *("--set", "train.unit_layers=2", "--set", "cluster.num_threads=1", "--stop", "never"),
)

# Of tools that have nothing to do with a run: no reason to ever read them, and Ray's processes inherit them.
BYSTANDERS = {
    "AWS_SESSION_TOKEN_OF_ANOTHER": "PLANTED+session/token==0123456789",
    "DATABASE_PASSWORD": "PLANTED-password-0123456789",
    "HF_TOKEN": "hf_PLANTEDtoken0123456789",
    "HTTPS_PROXY": "http://proxy-user:PLANTED-proxy-password@127.0.0.1:9",
    "SIGNED_URL": "https://bucket.example/x?X-Amz-Signature=PLANTEDsignature0123456789",
}
PASSWORD_OF_PROXY = "PLANTED-proxy-password"
SIGNATURE = "PLANTEDsignature0123456789"
PLANTED = (*(value for value in BYSTANDERS.values() if "://" not in value), PASSWORD_OF_PROXY, SIGNATURE)


@dataclass
class Planted:
    """What a run and the commands around it left.

    Attributes:
        environment: of all commands.
        secrets: what must be found nowhere.
        store_uri: with one finished run in it.
        ray_folder: what Ray wrote, its logs among it.
        outputs: what was printed, by command.
        listening: (program, address) of every listening socket of the running `train`.
        token_of_ray: the token that the local Ray demanded.
    """

    environment: dict[str, str]
    secrets: tuple[str, ...]
    store_uri: str
    ray_folder: Path
    outputs: dict[str, str] = field(default_factory=dict)
    listening: set[tuple[str, str]] = field(default_factory=set)
    token_of_ray: str = ""

    def objects(self) -> dict[str, bytes]:
        """Reads everything that is in the store."""
        store = open_store(self.store_uri)
        return {key: bytes(store.get(key)) for key, _ in store.list("")}


def environment_for(server: S3Server, folder: Path) -> dict[str, str]:
    """Returns the environment of a user who has secrets in it, some of them needed."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RAY_"))}
    direct = {"NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost"}
    ray = {"RAY_TMPDIR": str(folder), "OMP_NUM_THREADS": "1", "HOME": str(folder)}
    return own | server.environment | BYSTANDERS | direct | ray


def command(environment: Mapping[str, str], *arguments: str) -> tuple[int, str]:
    """Runs `nf-pipeline` and returns its exit code and all that it printed."""
    words = [sys.executable, "-m", "nf_pipeline", *arguments]
    done = subprocess.run(
        words,
        env=dict(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
    )
    return done.returncode, done.stdout


def watched_training(planted: Planted, log: Path, arguments: Sequence[str]) -> int:
    """Runs `train` and notes meanwhile which sockets its processes listen on; returns its exit code."""
    words = [sys.executable, "-m", "nf_pipeline", "train", *arguments]
    with running(words, planted.environment, log) as session:
        deadline = time.monotonic() + TIMEOUT_S
        while session.process.poll() is None and time.monotonic() < deadline:
            for process in _processes(session.process.pid):
                planted.listening |= set(_listening(process))
                planted.token_of_ray = planted.token_of_ray or _token_of(process)
            time.sleep(0.3)
        planted.outputs["train"] = session.text()
        assert session.process.returncode is not None, session.text()[-2000:]
        return session.process.returncode


def _processes(leader: int) -> Iterator[psutil.Process]:
    for pid in members(leader):
        with contextlib.suppress(psutil.Error):
            yield psutil.Process(pid)


def _listening(process: psutil.Process) -> Iterator[tuple[str, str]]:
    with contextlib.suppress(psutil.Error):
        name = process.name()
        for connection in process.net_connections(kind="inet"):
            if connection.status == psutil.CONN_LISTEN:
                yield name, connection.laddr.ip


def _token_of(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        if process.name() in ("raylet", "gcs_server"):
            return process.environ().get("RAY_AUTH_TOKEN", "")
    return ""
