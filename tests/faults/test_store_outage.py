"""How long the S3 store waits for a server that is away: as documented, and only for one that has answered before."""

import threading
import time
from collections.abc import Iterator

import pytest
from fault_proxy import Answer, At, FaultProxy, Reset, Rule, running_proxy
from fault_scene import lead_to
from s3_servers import S3Server

from nf_pipeline.errors import AlreadyExists, ObjectMissing, StorageError, StoreUnreachable
from nf_pipeline.storage import s3
from nf_pipeline.storage.store import Store, open_store

pytestmark = pytest.mark.s3


@pytest.fixture
def proxy(moto_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A proxy that the environment leads to; requests are repeated by the store alone."""
    monkeypatch.setattr(s3, "MAX_ATTEMPTS", 1)
    monkeypatch.setattr(s3, "_OUTAGE_WAITS_S", (0.1, 0.2))
    with running_proxy(moto_server.endpoint) as proxy:
        lead_to(monkeypatch, moto_server, proxy)
        yield proxy


@pytest.fixture
def store(proxy: FaultProxy, moto_server: S3Server) -> Store:
    """A fresh bucket behind the proxy, of which nobody has asked anything yet."""
    return open_store(f"s3://{moto_server.make_bucket()}/prefix")


OPERATIONS = {
    "get": lambda store: store.get("a"),
    "put": lambda store: store.put("b", b"2"),
    "create": lambda store: store.create("c", b"3"),
    "size": lambda store: store.size("a"),
    "delete": lambda store: store.delete(["a"]),
    "list": lambda store: store.list(""),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_operation_waits_for_a_server_that_has_answered_before(
    operation: str, store: Store, proxy: FaultProxy
) -> None:
    store.put("a", b"1")
    away = Rule(fault=Answer(status=503), times=None, for_s=1.0)
    with proxy.breaking(away):
        OPERATIONS[operation](store)
    assert len(away.hits) > 2, "repeated by s3fs alone"


def test_server_that_has_never_answered_is_not_waited_for(store: Store, proxy: FaultProxy) -> None:
    away = Rule(fault=Answer(status=503), times=None)
    with proxy.breaking(away), pytest.raises(StoreUnreachable):
        store.list("")
    assert len(away.hits) <= 4


def test_outage_longer_than_the_limit_is_an_error_and_the_next_operation_fails_at_once(
    store: Store, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "OUTAGE_TIMEOUT_S", 1.0)
    store.put("a", b"1")
    with proxy.breaking(Rule(fault=Reset(), times=None)):
        began = time.monotonic()
        with pytest.raises(StoreUnreachable, match="cannot write a") as caught:
            store.put("a", b"2")
        assert time.monotonic() - began > 0.5
        assert "server runs, then resume" in caught.value.fix
        again = Rule(fault=Answer(status=500), times=None)
        with proxy.breaking(again), pytest.raises(StoreUnreachable):
            store.size("a")
    assert bytes(store.get("a")) == b"1"
    with proxy.breaking(Rule(fault=Answer(status=500), times=None, for_s=0.5)):
        store.put("a", b"3")  # the server has answered in between: it is waited for again


def test_write_that_never_passes_ends_though_reads_do(
    store: Store, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "OUTAGE_TIMEOUT_S", 1.0)
    store.put("a", b"1")
    ended = threading.Event()

    def read() -> None:
        while not ended.wait(0.05):
            store.get("a")

    reader = threading.Thread(target=read)
    reader.start()
    try:
        with (
            proxy.breaking(Rule(fault=Answer(status=503), method="PUT", times=None)),
            pytest.raises(StoreUnreachable),
        ):
            store.put("a", b"2")
    finally:
        ended.set()
        reader.join()


def test_missing_object_counts_as_an_answer(store: Store, proxy: FaultProxy) -> None:
    with pytest.raises(ObjectMissing):
        store.get("nothing")
    with proxy.breaking(Rule(fault=Answer(status=503), times=None, for_s=0.5)):
        assert store.list("") == []


def test_refusal_is_final(store: Store, proxy: FaultProxy) -> None:
    store.put("a", b"1")
    refusing = Rule(fault=Answer(status=403), times=None)
    with proxy.breaking(refusing), pytest.raises(StorageError) as caught:
        store.put("a", b"2")
    assert not isinstance(caught.value, StoreUnreachable)
    assert len(refusing.hits) <= 2


def test_creation_whose_answers_were_lost_for_a_while_is_its_own(store: Store, proxy: FaultProxy) -> None:
    store.put("a", b"1")
    lost = Rule(fault=Reset(), at=At.ANSWER, method="PUT", path="/m.json$", times=None, for_s=1.0)
    with proxy.breaking(lost):
        store.create("m.json", b"mine")
    assert len(lost.hits) > 2
    assert bytes(store.get("m.json")) == b"mine"
    with pytest.raises(AlreadyExists):
        store.create("m.json", b"theirs")
