"""The proxy itself: what it lets pass is whole, what it breaks is broken as it says."""

import errno
import os
import threading
import time
from collections.abc import Iterator

import pytest
from fault_proxy import Answer, At, Call, FaultProxy, Hang, Request, Reset, Rule, Throttle, running_proxy
from fault_scene import lead_to
from s3_servers import S3Server

from nf_pipeline.errors import StorageError, StoreUnreachable
from nf_pipeline.storage import s3
from nf_pipeline.storage.store import Store, open_store

pytestmark = pytest.mark.s3

MIB = 2**20


@pytest.fixture(params=["minio_server", "moto_server"])
def server(request: pytest.FixtureRequest) -> S3Server:
    """One server that checks signatures, and one that honours conditional writes."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def proxy(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A proxy in front of the server; the environment leads to it, and no request is repeated."""
    monkeypatch.setattr(s3, "MAX_ATTEMPTS", 1)
    monkeypatch.setattr(s3, "OUTAGE_TIMEOUT_S", 0.0)
    with running_proxy(server.endpoint) as proxy:
        lead_to(monkeypatch, server, proxy)
        yield proxy


@pytest.fixture
def store(proxy: FaultProxy, server: S3Server) -> Store:
    """A fresh bucket behind the proxy; a request is sent twice at most, by s3fs."""
    opened = open_store(f"s3://{server.make_bucket()}/prefix")
    opened._files.retries = 1
    return opened


def test_everything_passes_unchanged_and_is_noted(store: Store, proxy: FaultProxy) -> None:
    data = os.urandom(3 * MIB)
    store.put("a b/ü+%.bin", data)
    store.create("a b/once", b"1")
    assert bytes(store.get("a b/ü+%.bin")) == data
    assert dict(store.list("")) == {"a b/ü+%.bin": len(data), "a b/once": 1}
    store.delete(["a b/once"])
    assert store.size("a b/once") is None
    puts = [path.partition("prefix/")[2] for method, path in proxy.passed if method == "PUT"]
    assert [path for path in puts if not path.startswith(".nf-probe")] == ["a b/ü+%.bin", "a b/once"]


@pytest.mark.parametrize("status", [500, 503])
def test_answer_takes_the_place_of_the_servers(store: Store, proxy: FaultProxy, status: int) -> None:
    store.put("a", b"1")
    with proxy.breaking(Rule(fault=Answer(status=status), method="PUT", times=None)):
        with pytest.raises(StoreUnreachable, match=r"InternalError|SlowDown"):
            store.put("a", b"2")
        assert bytes(store.get("a")) == b"1"
    store.put("a", b"2")
    assert bytes(store.get("a")) == b"2"


@pytest.mark.parametrize(
    ("moment", "is_stored"),
    [(At.REQUEST, False), (At.HALF_REQUEST, False), (At.ANSWER, True)],
)
def test_reset_write_is_an_error_whether_it_was_stored_or_not(
    store: Store, proxy: FaultProxy, moment: At, is_stored: bool
) -> None:
    with (
        proxy.breaking(Rule(fault=Reset(), at=moment, method="PUT", times=None)),
        pytest.raises(StoreUnreachable, match="cannot write a"),
    ):
        store.put("a", os.urandom(MIB))
    assert store.size("a") == (MIB if is_stored else None)


def test_answer_that_breaks_off_is_an_error(store: Store, proxy: FaultProxy) -> None:
    store.put("a", os.urandom(MIB))
    rule = Rule(fault=Reset(), at=At.HALF_ANSWER, method="GET", path="/a$", times=None)
    with proxy.breaking(rule), pytest.raises(StoreUnreachable):
        store.get("a")
    assert rule.hits


def test_hanging_server_is_given_up_after_the_read_timeout(
    proxy: FaultProxy, server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "READ_TIMEOUT_S", 1)
    store = open_store(f"s3://{server.make_bucket()}/prefix")
    store._files.retries = 1
    store.put("a", b"1")
    with proxy.breaking(Rule(fault=Hang(), times=None)), pytest.raises(StoreUnreachable):
        store.get("a")
    assert bytes(store.get("a")) == b"1"


def test_throttle_keeps_to_its_rate(store: Store, proxy: FaultProxy) -> None:
    data = os.urandom(MIB // 2)
    with proxy.breaking(Rule(fault=Throttle(bytes_per_s=MIB), times=None)):
        began = time.monotonic()
        store.put("a", data)
        assert bytes(store.get("a")) == data
        took_s = time.monotonic() - began
    assert took_s >= 2 * len(data) / MIB


def test_call_comes_before_the_request_and_names_the_process_that_sends_it(store: Store, proxy: FaultProxy) -> None:
    calls: list[tuple[int, int | None]] = []
    direct = open_store(store.uri)

    def look(request: Request) -> None:
        calls.append((request.pid, direct.size("a")))

    with proxy.breaking(Rule(fault=Call(function=look), method="PUT", path="/a$")):
        store.put("a", b"1")
    assert calls == [(os.getpid(), None)]
    assert store.size("a") == 1


def test_held_request_is_forwarded_later_and_others_pass_meanwhile(store: Store, proxy: FaultProxy) -> None:
    release = threading.Event()
    with proxy.breaking(Rule(fault=Call(function=lambda _: release.wait(30)), method="PUT", path="/held$")) as _:
        late = threading.Thread(target=store.put, args=("held", b"1"))
        late.start()
        open_store(store.uri).put("other", b"1")
        assert store.size("held") is None
        release.set()
        late.join(30)
    assert store.size("held") == 1


def test_rule_hits_the_requests_that_it_counts() -> None:
    def request(path: str) -> Request:
        return Request(method="PUT", path=path, port=1, to_port=2)

    rule = Rule(fault=Reset(), method="PUT", path=r"train-0000\d", skip=1, times=2)
    paths = ["x", "train-00000", "train-00001", "train-00002", "train-00003"]
    assert [rule.takes(request(path)) for path in paths] == [False, False, True, True, False]
    over = Rule(fault=Reset(), times=None, for_s=0.0)
    assert over.takes(request("a"))
    time.sleep(0.01)
    assert not over.takes(request("a"))


def test_server_that_is_away_resets_the_client(store: Store, proxy: FaultProxy) -> None:
    proxy.upstream = ("127.0.0.1", 1)
    with pytest.raises(StorageError) as caught:
        store.put("a", b"1")
    assert os.strerror(errno.EACCES) not in str(caught.value)
