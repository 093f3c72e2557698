"""A proxy before a hub: it counts what passes, and fails where a test says so."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import socketserver
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length"}


@dataclass
class Request:
    """What a client asked: method, path with query, headers and body."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    def is_commit(self) -> bool:
        return self.method == "POST" and "/commit/" in self.path


@dataclass
class Answer:
    """What it gets."""

    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


class Lost(Exception):
    """Raised by `before` or `after`: the connection breaks without an answer."""


class FaultyHub:
    """The proxy.

    Attributes:
        url: where it answers.
        before: may answer in the hub's place, or raise Lost so that the hub never hears of the request.
        after: may change the hub's answer, or raise Lost so that the client never hears of it.
        requests: all that came, without their bodies.
        received: bytes of the requests' bodies.
        sent: bytes of the answers' bodies.
    """

    def __init__(self, target: str) -> None:
        self.target = target
        self.url = ""
        self.before: Callable[[Request], Answer | None] = lambda request: None
        self.after: Callable[[Request, Answer], Answer] = lambda request, answer: answer
        self.clear()

    def clear(self) -> None:
        """Count from zero."""
        self.requests: list[tuple[str, str]] = []
        self.received = self.sent = 0

    def puts(self) -> list[str]:
        """The paths of the uploads."""
        return [path for method, path in self.requests if method == "PUT"]

    def commits(self) -> int:
        """How many commits were asked for."""
        return sum(Request(method, path, {}, b"").is_commit() for method, path in self.requests)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FaultyHub

    def do_GET(self) -> None:
        hub = self.hub
        request = Request(self.command, self.path, dict(self.headers), self._body())
        hub.requests.append((request.method, request.path))
        hub.received += len(request.body)
        try:
            answer = hub.before(request) or self._forwarded(request)
            answer = hub.after(request, answer)
        except Lost:
            self.close_connection = True
            return
        self._reply(answer)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _forwarded(self, request: Request) -> Answer:
        to = urlsplit(self.hub.target)
        connection = http.client.HTTPConnection(to.hostname or "", to.port, timeout=60)
        headers = {key: value for key, value in request.headers.items() if key.lower() not in _HOP}
        try:
            connection.request(request.method, request.path, body=request.body or None, headers=headers)
            response = connection.getresponse()
            kept = {key: value for key, value in response.getheaders() if key.lower() not in _HOP}
            if request.method == "HEAD":
                kept["Content-Length"] = response.getheader("Content-Length") or "0"
            return Answer(response.status, response.read(), kept)
        except (OSError, http.client.HTTPException):
            raise Lost from None
        finally:
            connection.close()

    def _reply(self, answer: Answer) -> None:
        self.send_response(answer.status)
        if "Content-Length" not in answer.headers:
            self.send_header("Content-Length", str(len(answer.body)))
        for key, value in answer.headers.items():
            self.send_header(key, value)
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            self.wfile.write(answer.body)
            self.hub.sent += len(answer.body)
        if self.command != "HEAD" and int(answer.headers.get("Content-Length", len(answer.body))) != len(answer.body):
            self.close_connection = True  # a body that ends early

    def log_message(self, *args: object) -> None:
        """Nothing: pytest shows what matters."""


class _Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True


@contextlib.contextmanager
def faulty(target: str) -> Iterator[FaultyHub]:
    """A proxy before the hub at `target`, until the block is left."""
    hub = FaultyHub(target)
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
