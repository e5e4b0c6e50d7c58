"""A proxy in front of an S3 server that does to requests what networks and object stores do: `S3Proxy`, by a plan.

Point `AWS_ENDPOINT_URL` at `S3Proxy.url`. A plan is a function from a `Request` to the `Fault` it meets, or None; `seeded` makes one whose
choice depends on the seed and on what is asked for the how-manieth time, never on the order in which threads and workers come, and which
faults no request more often than `at_most` times in a row, so that a client with more attempts always gets through. `plan` may be set
anew while the proxy runs; `begin` also forgets what was asked before. `seen` lists what was asked, what it met and how many bytes of
bodies went each way. Host headers pass unchanged, so servers that check signatures accept what clients signed for the proxy. Not covered:
TLS.
"""

import contextlib
import http.client
import random
import re
import select
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Literal, Self, TypeAlias
from urllib.parse import parse_qs, unquote, urlsplit

Operation: TypeAlias = Literal["read", "range", "head", "list", "put", "put_if", "delete", "delete_if", "multipart", "other"]
OPERATIONS: tuple[Operation, ...] = ("read", "range", "head", "list", "put", "put_if", "delete", "delete_if", "multipart", "other")


class Fault(StrEnum):
    """What may happen to a request."""

    ERROR = "error"
    """500 InternalError; the server never saw the request."""
    SLOW_DOWN = "slow_down"
    """503 SlowDown; the server never saw it."""
    TIMEOUT = "timeout"
    """No answer until the client goes away; the server never saw it."""
    RESET = "reset"
    """The connection is reset; the server never saw it."""
    LOST = "lost"
    """The server carried it out, and the connection is reset before the answer."""
    HALF = "half"
    """The answer breaks off in the middle of its body."""
    STALE = "stale"
    """Of a listing: the answer that the same question got before, or an empty one; of anything else: nothing happens."""
    EXPIRED = "expired"
    """400 ExpiredToken; the server never saw it."""


@dataclass(frozen=True)
class Request:
    """What a client asks for: `turn` is how often it asked the very same before."""

    operation: Operation
    target: str
    """Path and query, and the range of a range read."""
    turn: int

    @property
    def key(self) -> str:
        """`bucket/key`."""
        return unquote(self.target.partition("?")[0].partition(" ")[0]).lstrip("/")


@dataclass(frozen=True)
class Seen:
    """One request, the fault it met, and the bytes of bodies that went to the server and came back to the client."""

    request: Request
    fault: Fault | None
    sent: int
    received: int


Plan: TypeAlias = Callable[[Request], Fault | None]


def seeded(seed: int, rates: Mapping[Fault, float], operations: Iterable[Operation] = OPERATIONS, *, at_most: int = 3) -> Plan:
    """Each fault strikes with its rate, requests of `operations` alone, and the same request at most `at_most` times in a row."""
    chosen = frozenset(operations)

    def drawn(request: Request, turn: int) -> Fault | None:
        draw = random.Random(f"{seed} {request.operation} {request.target} {turn}").random()
        for fault, rate in rates.items():
            draw -= rate
            if draw < 0:
                return fault
        return None

    def plan(request: Request) -> Fault | None:
        if request.operation not in chosen:
            return None
        run = (drawn(request, turn) is not None for turn in range(request.turn - 1, request.turn - 1 - at_most, -1))
        return None if request.turn >= at_most and all(run) else drawn(request, request.turn)

    return plan


def first(fault: Fault, times: int, operations: Iterable[Operation] = OPERATIONS, *, key: str = "") -> Plan:
    """`fault` strikes the first `times` requests of `operations` whose `bucket/key` contains `key`, counted together."""
    chosen, left, guard = frozenset(operations), [times], threading.Lock()

    def plan(request: Request) -> Fault | None:
        with guard:
            if request.operation not in chosen or key not in request.key or not left[0]:
                return None
            left[0] -= 1
            return fault

    return plan


def calm(request: Request) -> None:
    """The plan without faults."""


class S3Proxy:
    """A context manager: serves on a free port of 127.0.0.1, in threads of this process, until the block ends."""

    def __init__(self, upstream: str, plan: Plan = calm) -> None:
        self.upstream = urlsplit(upstream).netloc
        self.plan = plan
        self.seen: list[Seen] = []
        self.closed = threading.Event()
        self._turns: Counter[tuple[Operation, str]] = Counter()
        self._listings: dict[str, tuple[list[tuple[str, str]], bytes]] = {}
        self._guard = threading.Lock()
        self._server = _Server(self)
        self._thread = threading.Thread(target=self._server.serve_forever, name="s3 proxy", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.closed.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def begin(self, plan: Plan) -> None:
        """Forget everything seen and asked, and go on by another plan."""
        with self._guard:
            self.seen.clear()
            self._turns.clear()
            self._listings.clear()
            self.plan = plan

    @property
    def url(self) -> str:
        """The endpoint for clients."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def received(self) -> int:
        """Bytes of bodies that clients got."""
        return sum(seen.received for seen in list(self.seen))

    def count(self, fault: Fault | None = None, operation: Operation | None = None) -> int:
        """How many requests met `fault` (None: any fault), of `operation` (None: any)."""
        found = [seen for seen in list(self.seen) if seen.fault is not None]
        return sum(fault in (None, seen.fault) and operation in (None, seen.request.operation) for seen in found)

    def request(self, operation: Operation, target: str) -> Request:
        """Number a request among its like."""
        with self._guard:
            turn = self._turns[operation, target]
            self._turns[operation, target] += 1
        return Request(operation, target, turn)

    def note(self, seen: Seen) -> None:
        with self._guard:
            self.seen.append(seen)

    def listing(self, target: str, answer: tuple[list[tuple[str, str]], bytes]) -> tuple[list[tuple[str, str]], bytes]:
        """Keep the answer to a listing; returns the one before, or an empty one."""
        with self._guard:
            before = self._listings.get(target, (answer[0], _without_entries(answer[1])))
            self._listings[target] = answer
        return before


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, proxy: S3Proxy) -> None:
        self.proxy = proxy
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is what this is for."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.upstream = http.client.HTTPConnection(self.server.proxy.upstream, timeout=60)

    def finish(self) -> None:
        self.upstream.close()
        with contextlib.suppress(OSError):
            super().finish()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: `seen` is the log."""

    def _serve(self) -> None:
        operation = _operation(self.command, self.path, self.headers)
        span = self.headers.get("Range", "") if operation == "range" else ""
        request = self.server.proxy.request(operation, f"{self.path} {span}".rstrip())
        fault = self.server.proxy.plan(request)
        body = self._body()
        try:
            self._meet(request, fault, body)
        except (OSError, http.client.HTTPException):
            self.close_connection = True

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _serve

    def _body(self) -> bytes:
        if self.headers.get("Expect", "").lower() == "100-continue":
            self.send_response_only(100)
            self.end_headers()
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _meet(self, request: Request, fault: Fault | None, body: bytes) -> None:
        """Let the request meet its fault. It is noted before the client can know the outcome."""
        if fault in _REFUSALS:
            self._note(request, fault, 0, 0)
            self._refuse(*_REFUSALS[fault])
        elif fault in (Fault.TIMEOUT, Fault.RESET):
            self._note(request, fault, 0, 0)
            if fault is Fault.TIMEOUT:
                self._hold()
            self._reset()
        else:
            self._carry_out(request, fault, body)

    def _carry_out(self, request: Request, fault: Fault | None, body: bytes) -> None:
        status, headers, content = self._forward(body)
        if fault is Fault.LOST:
            self._note(request, fault, len(body), 0)
            self._reset()
            return
        if request.operation == "list" and status == 200:
            before = self.server.proxy.listing(request.target, (headers, content))
            headers, content = before if fault is Fault.STALE else (headers, content)
        half = fault is Fault.HALF and len(content) > 1
        given = content[: len(content) // 2] if half else content
        self._note(request, fault, len(body), len(given))
        self._answer(status, headers, given, len(content))
        if half:
            self._reset()

    def _note(self, request: Request, fault: Fault | None, sent: int, received: int) -> None:
        self.server.proxy.note(Seen(request, fault, sent, received))

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _OF_ONE_HOP}
        headers["Content-Length"] = str(len(body))
        for last in (False, True):
            try:
                self.upstream.request(self.command, self.path, body, headers)
                answer = self.upstream.getresponse()
                content = answer.read()
                break
            except (http.client.RemoteDisconnected, BrokenPipeError):
                # A server may close a connection that was idle.
                self.upstream.close()
                if last:
                    raise
        kept = [(name, value) for name, value in answer.getheaders() if name.lower() not in _OF_ONE_HOP]
        if self.command == "HEAD":
            kept.append(("Content-Length", answer.getheader("Content-Length", "0")))
        return answer.status, kept, content

    def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes, length: int) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(content)

    def _refuse(self, status: int, code: str) -> None:
        text = f"<?xml version='1.0' encoding='UTF-8'?><Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
        content = b"" if self.command == "HEAD" else text
        self._answer(status, [("Content-Type", "application/xml")], content, len(content))

    def _hold(self) -> None:
        """Say nothing until the client, or the proxy, is gone."""
        while not self.server.proxy.closed.is_set():
            readable, _, _ = select.select([self.connection], [], [], 0.1)
            if readable and not self.connection.recv(1, socket.MSG_PEEK):
                return

    def _reset(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()


_REFUSALS: dict[Fault | None, tuple[int, str]] = {
    Fault.ERROR: (500, "InternalError"),
    Fault.SLOW_DOWN: (503, "SlowDown"),
    Fault.EXPIRED: (400, "ExpiredToken"),
}
_OF_ONE_HOP = {"connection", "transfer-encoding", "content-length", "expect", "keep-alive"}


def _operation(method: str, path: str, headers: Mapping[str, str]) -> Operation:
    parts = urlsplit(path)
    query = parse_qs(parts.query, keep_blank_values=True)
    whole_bucket = "/" not in parts.path.strip("/")
    conditional = "If-Match" in headers or "If-None-Match" in headers
    if query.keys() & {"uploads", "uploadId"}:
        return "multipart"
    if method == "GET":
        return "list" if whole_bucket else "range" if "Range" in headers else "read"
    if method == "PUT" and not whole_bucket:
        return "put_if" if conditional else "put"
    if method == "DELETE" or "delete" in query:
        return "delete_if" if conditional else "delete"
    return "head" if method == "HEAD" else "other"


def _without_entries(listing: bytes) -> bytes:
    """An answer to the same question with nothing in it."""
    emptied = re.sub(rb"<(Contents|CommonPrefixes)>.*?</\1>", b"", listing, flags=re.DOTALL)
    emptied = re.sub(rb"<KeyCount>\d+</KeyCount>", b"<KeyCount>0</KeyCount>", emptied)
    emptied = re.sub(rb"<NextContinuationToken>.*?</NextContinuationToken>", b"", emptied, flags=re.DOTALL)
    return emptied.replace(b"<IsTruncated>true</IsTruncated>", b"<IsTruncated>false</IsTruncated>")
