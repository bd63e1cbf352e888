"""An S3 server behind TLS: verified, with the user's own authority too, and nothing turns that off."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme
from s3_servers import S3Server, moto_server

from nf_pipeline.errors import ConfigError, StorageError
from nf_pipeline.storage import s3
from nf_pipeline.storage.store import open_store

pytestmark = pytest.mark.s3


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with an authority of our own (ca.pem) and what it has signed for 127.0.0.1 (chain.pem)."""
    folder = tmp_path_factory.mktemp("authority")
    own = trustme.CA()
    certificate = own.issue_cert("127.0.0.1")
    own.cert_pem.write_to_path(folder / "ca.pem")
    certificate.private_key_and_cert_chain_pem.write_to_path(folder / "chain.pem")
    return folder


@pytest.fixture(scope="module")
def server(authority: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with moto_server(tmp_path_factory.mktemp("tls"), certificate=authority / "chain.pem") as running:
        yield running


@pytest.fixture
def uri(server: S3Server, authority: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A bucket on the server; the environment leads there and trusts nobody in particular."""
    monkeypatch.setattr(s3, "MAX_ATTEMPTS", 1)
    for name in [name for name in os.environ if name.startswith(("AWS_", "FSSPEC_")) or "CA_BUNDLE" in name]:
        monkeypatch.delenv(name)
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_CA_BUNDLE", str(authority / "ca.pem"))
    bucket = server.make_bucket()
    monkeypatch.delenv("AWS_CA_BUNDLE")
    return f"s3://{bucket}/prefix"


def test_server_of_an_unknown_authority_is_refused_with_the_way_to_trust_it(uri: str) -> None:
    with pytest.raises(StorageError, match="certificate is not trusted") as caught:
        open_store(uri).put("a", b"1")
    assert "AWS_CA_BUNDLE" in caught.value.fix


def test_server_of_the_given_authority_is_accepted(
    uri: str, authority: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_CA_BUNDLE", str(authority / "ca.pem"))
    store = open_store(uri)
    store.put("a", b"1")
    assert bytes(store.get("a")) == b"1"


def test_certificate_for_another_name_is_refused(
    uri: str, server: S3Server, authority: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_CA_BUNDLE", str(authority / "ca.pem"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint.replace("127.0.0.1", "localhost"))
    with pytest.raises(StorageError, match="certificate is not trusted"):
        open_store(uri).put("a", b"1")


def test_configuration_of_fsspec_cannot_turn_verification_off(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec.config

    # What ~/.config/fsspec/*.json and FSSPEC_S3 set; they are read when fsspec is imported.
    monkeypatch.setitem(fsspec.config.conf, "s3", {"client_kwargs": {"verify": False}})
    with pytest.raises(StorageError, match="certificate is not trusted"):
        open_store(uri).put("a", b"1")


@pytest.mark.parametrize("name", ["AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE"])
def test_authority_that_is_no_file_is_named(uri: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "/absent/ca.pem")
    with pytest.raises(ConfigError, match=f"{name} is '/absent/ca.pem'"):
        open_store(uri)
