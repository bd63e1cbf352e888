"""A proxy in front of an S3 server that breaks what passes through it, by rule; runs in a thread of the tests.

It speaks enough HTTP/1.1 to see single requests and changes none of them: S3's signatures cover the Host header,
which names the proxy because the clients' endpoint is the proxy's. Only "100 Continue" comes from the proxy itself.
Requests and answers are held in memory whole. Knows nothing of the product. Entry: `running_proxy`.
"""

import asyncio
import contextlib
import re
import socket
import struct
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum

import psutil

START_TIMEOUT_S = 10.0
CHUNK_BYTES = 16 * 1024
MAX_HEAD_BYTES = 256 * 1024


class At(Enum):
    """When a fault strikes, as the request passes."""

    REQUEST = "request"
    """The client has sent everything, the server knows of nothing."""
    HALF_REQUEST = "half the request"
    """The server has half of the body."""
    ANSWER = "answer"
    """The server has done what was asked, the client does not know."""
    HALF_ANSWER = "half the answer"
    """The client has half of the answer's body."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A request that is passing.

    Attributes:
        method: "PUT", ...
        path: decoded, without the query.
        port, to_port: of the client's connection, at its own end and at the proxy's.
    """

    method: str
    path: str
    port: int
    to_port: int

    @property
    def pid(self) -> int:
        """Process that sends it.

        Raises:
            LookupError: it is gone already.
        """
        for connection in psutil.net_connections(kind="tcp4"):
            ports = [end.port for end in (connection.laddr, connection.raddr) if end]
            if ports == [self.port, self.to_port] and connection.pid:
                return connection.pid
        raise LookupError(f"no process has port {self.port}")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The server's place is taken by an error."""

    status: int


@dataclass(frozen=True, kw_only=True)
class Reset:
    """The connection is reset, on both sides."""


@dataclass(frozen=True, kw_only=True)
class Hang:
    """Nothing moves any more until the client gives up."""


@dataclass(frozen=True, kw_only=True)
class Throttle:
    """Bodies pass slowly, in both directions together."""

    bytes_per_s: float


@dataclass(frozen=True, kw_only=True)
class Call:
    """Something else happens first, in a thread of its own.

    Attributes:
        function: called with the request; may take its time.
        then_reset: whether the connection ends then; else the request goes on.
    """

    function: Callable[[Request], object]
    then_reset: bool = False


Fault = Answer | Reset | Hang | Throttle | Call


@dataclass(eq=False, kw_only=True)
class Rule:
    """Which requests a fault hits.

    Attributes:
        fault: what happens to them.
        at: when it happens; means nothing to `Throttle`.
        method: "" is any.
        path: regular expression, searched in the decoded path.
        skip: matching requests that pass before the first that is hit.
        times: requests that are hit; None is all.
        for_s: seconds after the first hit in which others are hit.
    """

    fault: Fault
    at: At = At.REQUEST
    method: str = ""
    path: str = ""
    skip: int = 0
    times: int | None = 1
    for_s: float = float("inf")
    hits: list[float] = field(default_factory=list)
    _seen: int = 0

    def takes(self, request: Request) -> bool:
        """Decides about a request, and counts it."""
        if self.method not in ("", request.method) or not re.search(self.path, request.path):
            return False
        self._seen += 1
        now = time.monotonic()
        is_over = self.times is not None and len(self.hits) >= self.times
        if self._seen <= self.skip or is_over or (self.hits and now - self.hits[0] > self.for_s):
            return False
        self.hits.append(now)
        return True


class FaultProxy:
    """Listens on a loopback port of its own; rules can come and go at any time, from any thread.

    Attributes:
        endpoint: http://127.0.0.1:PORT.
        upstream: (host, port) that requests go to; may be changed.
        passed: (method, path) of all requests since the last `clear`.
    """

    def __init__(self, upstream: tuple[str, int]) -> None:
        self.endpoint = ""
        self.upstream = upstream
        self.passed: list[tuple[str, str]] = []
        self._rules: list[Rule] = []
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()

    def add(self, rule: Rule) -> Rule:
        """Puts a rule into force, after those that are."""
        self._rules = [*self._rules, rule]
        return rule

    def clear(self) -> None:
        """Lets everything pass again; what hangs stays so."""
        self._rules, self.passed = [], []

    @contextlib.contextmanager
    def breaking(self, *rules: Rule) -> Iterator[None]:
        """Has rules in force inside the context."""
        self._rules = [*self._rules, *rules]
        try:
            yield
        finally:
            self._rules = [rule for rule in self._rules if rule not in rules]

    def serve(self, started: threading.Event) -> None:
        """Runs until `stop`; for a thread of its own."""
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(
            asyncio.start_server(self._accept, "127.0.0.1", 0, limit=MAX_HEAD_BYTES)
        )
        self.endpoint = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        started.set()
        self._loop.run_forever()
        server.close()
        for task in self._tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*self._tasks, return_exceptions=True))
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()

    def stop(self) -> None:
        """Ends `serve`."""
        self._loop.call_soon_threadsafe(self._loop.stop)

    def faults_of(self, request: Request) -> list[tuple[At, Fault]]:
        """Notes a request and returns what is to happen to it."""
        self.passed.append((request.method, request.path))
        return [(rule.at, rule.fault) for rule in self._rules if rule.takes(request)]

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        client = _Side(reader, writer)
        try:
            await _Connection(self, client).serve()
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            client.reset()
        finally:
            writer.close()
            self._tasks.discard(task)


@contextlib.contextmanager
def running_proxy(upstream: str) -> Iterator[FaultProxy]:
    """Runs a proxy in front of http://HOST:PORT until the context ends."""
    parts = urllib.parse.urlsplit(upstream)
    assert parts.hostname and parts.port
    proxy, started = FaultProxy((parts.hostname, parts.port)), threading.Event()
    thread = threading.Thread(target=proxy.serve, args=(started,), name="fault-proxy", daemon=True)
    thread.start()
    assert started.wait(START_TIMEOUT_S)
    try:
        yield proxy
    finally:
        proxy.stop()
        thread.join(START_TIMEOUT_S)


class _Side:
    """One of a connection's two streams."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def address(self, end: str) -> tuple[str, int]:
        """Returns host and port of the "peername" or the "sockname"."""
        return self.writer.get_extra_info(end)

    async def send(self, data: bytes, bytes_per_s: float = float("inf")) -> None:
        for start in range(0, len(data), CHUNK_BYTES):
            self.writer.write(data[start : start + CHUNK_BYTES])
            await self.writer.drain()
            await asyncio.sleep(CHUNK_BYTES / bytes_per_s)

    async def read_body(self, head: "_Head", bytes_per_s: float) -> bytes:
        """Returns the body as it stands on the wire."""
        if head.is_chunked:
            return await self._read_chunks()
        if head.length is None:
            return b"" if head.is_request else await self.reader.read(-1)
        body = bytearray()
        while len(body) < head.length:
            body += await self.reader.readexactly(min(CHUNK_BYTES, head.length - len(body)))
            await asyncio.sleep(CHUNK_BYTES / bytes_per_s)
        return bytes(body)

    async def _read_chunks(self) -> bytes:
        body = bytearray()
        while True:
            line = await self.reader.readuntil(b"\r\n")
            size = int(line.split(b";")[0], 16)
            body += line
            if size == 0:
                break
            body += await self.reader.readexactly(size + 2)
        while (line := await self.reader.readuntil(b"\r\n")) != b"\r\n":
            body += line
        return bytes(body + line)

    def reset(self) -> None:
        """Ends the stream with RST in place of FIN."""
        sock = self.writer.get_extra_info("socket")
        if sock is not None and not self.writer.is_closing():
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.close()


@dataclass(frozen=True, kw_only=True)
class _Head:
    """Start line and headers, as they came."""

    data: bytes

    @classmethod
    async def read(cls, side: _Side) -> "_Head":
        return cls(data=await side.reader.readuntil(b"\r\n\r\n"))

    @property
    def is_request(self) -> bool:
        return not self.data.startswith(b"HTTP/")

    @property
    def start(self) -> list[str]:
        return self.data.split(b"\r\n", 1)[0].decode("latin1").split(" ", 2)

    @property
    def is_chunked(self) -> bool:
        return "chunked" in self.header("transfer-encoding").lower()

    @property
    def length(self) -> int | None:
        value = self.header("content-length")
        return int(value) if value else None

    @property
    def closes(self) -> bool:
        has_no_end = not self.is_request and self.length is None and not self.is_chunked
        return has_no_end or self.header("connection").lower() == "close"

    def header(self, name: str) -> str:
        match = re.search(rb"\r\n" + name.encode() + rb":[ \t]*([^\r\n]*)", self.data, re.IGNORECASE)
        return match.group(1).decode("latin1").strip() if match else ""


class _Ended(ConnectionError):
    """A fault ends the connection."""


class _Connection:
    """Everything that comes from one client, request by request, each on a connection of its own to the server."""

    def __init__(self, proxy: FaultProxy, client: _Side) -> None:
        self.proxy = proxy
        self.client = client

    async def serve(self) -> None:
        while True:
            head = await _Head.read(self.client)
            method, target, _ = head.start
            path = urllib.parse.unquote(target.partition("?")[0])
            port, to_port = (self.client.address(end)[1] for end in ("peername", "sockname"))
            request = Request(method=method, path=path, port=port, to_port=to_port)
            if not await self._pass(head, request, self.proxy.faults_of(request)):
                return

    async def _pass(self, head: _Head, request: Request, faults: list[tuple[At, Fault]]) -> bool:
        """Brings one request through; False if the connection ends with it."""
        rates = [fault.bytes_per_s for _, fault in faults if isinstance(fault, Throttle)]
        rate = min(rates, default=float("inf"))
        if head.header("expect").lower() == "100-continue":
            await self.client.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await self.client.read_body(head, rate)
        for fault in [fault for at, fault in faults if at is At.REQUEST]:
            if await self._strike(fault, request):
                return True
        server = _Side(*await asyncio.open_connection(*self.proxy.upstream, limit=MAX_HEAD_BYTES))
        try:
            return await self._exchange(server, head, body, request, faults, rate)
        finally:
            server.reset()

    async def _exchange(
        self, server: _Side, head: _Head, body: bytes, request: Request, faults: list[tuple[At, Fault]], rate: float
    ) -> bool:
        def striking(at: At) -> list[Fault]:
            return [fault for when, fault in faults if when is at]

        await server.send(head.data)
        first, rest = _halves(body)
        with contextlib.suppress(ConnectionError):  # a server may refuse before it has read everything
            await server.send(first)
        for fault in striking(At.HALF_REQUEST):
            await self._strike(fault, request)
        with contextlib.suppress(ConnectionError):
            await server.send(rest)
        answer = await _Head.read(server)
        while answer.start[1].startswith("1"):
            answer = await _Head.read(server)
        has_body = request.method != "HEAD" and answer.start[1] not in ("204", "304")
        content = await server.read_body(answer, float("inf")) if has_body else b""
        for fault in striking(At.ANSWER):
            await self._strike(fault, request)
        first, rest = _halves(content)
        await self.client.send(answer.data + first, rate)
        for fault in striking(At.HALF_ANSWER):
            await self._strike(fault, request)
        await self.client.send(rest, rate)
        return not (answer.closes and has_body) and not head.closes

    async def _strike(self, fault: Fault, request: Request) -> bool:
        """Lets a fault happen; True if it has answered the request."""
        if isinstance(fault, Answer):
            await self.client.send(_error(fault.status, request))
            return True
        if isinstance(fault, Call):
            await asyncio.to_thread(fault.function, request)
        if isinstance(fault, Hang):
            await self.client.reader.read(1)  # ends when the client gives up
        if isinstance(fault, Reset | Hang) or (isinstance(fault, Call) and fault.then_reset):
            raise _Ended
        return False


def _halves(data: bytes) -> tuple[bytes, bytes]:
    return data[: len(data) // 2], data[len(data) // 2 :]


def _error(status: int, request: Request) -> bytes:
    """Makes an answer as S3 servers give it when they cannot."""
    code = {403: "AccessDenied", 500: "InternalError", 503: "SlowDown"}[status]
    text = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>not now</Message></Error>'
    head = f"HTTP/1.1 {status} {code}\r\nContent-Type: application/xml\r\nContent-Length: {len(text)}\r\n\r\n"
    return (head + ("" if request.method == "HEAD" else text)).encode()
