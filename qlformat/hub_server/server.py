"""The process: a socket, uvicorn, and a bound on what comes before a request's body."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from qlformat.errors import QlfError
from qlformat.hub_server.blobs import Blobs
from qlformat.hub_server.limits import Limits
from qlformat.hub_server.pages import with_pages
from qlformat.hub_server.service import lock, open_hub


class BoundedHeads(HttpToolsProtocol):
    """uvicorn's protocol with a limit on a request's line and headers, which it reads without one."""

    limit = Limits.header
    seconds = 30.0
    _head = 0
    _in_head = True
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The first head must come in time; uvicorn itself bounds the wait for further ones."""
        super().connection_made(transport)
        self._timer = self.loop.call_later(self.seconds, transport.close)

    def data_received(self, data: bytes) -> None:
        """Count what comes before the body; too much is answered with 431 and the end of the connection."""
        self._head += len(data)
        if self._in_head and self._timer is None:
            self._timer = self.loop.call_later(self.seconds, self.transport.close)
        super().data_received(data)
        if self._in_head and self._head > self.limit and not self.transport.is_closing():
            self.transport.write(
                b"HTTP/1.1 431 Request Header Fields Too Large\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            )
            self.transport.close()

    def on_headers_complete(self) -> None:
        """The head is whole."""
        self._in_head = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """What comes next is a head again."""
        self._in_head, self._head = True, 0
        super().on_message_complete()


def bind(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        QlfError: the address is not this machine's, or the port is taken or not allowed.
    """
    try:
        info = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        bound = socket.socket(info[0], info[1])
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(info[4])
        bound.listen(512)
    except OSError as error:
        raise QlfError(
            f"cannot listen on {host} port {port}: {error.strerror or error}; choose another --host or --port"
        ) from None
    return bound


def serve(
    root: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    token_file: Path | None = None,
    xet: bool = True,
    limits: Limits | None = None,
    blobs: Blobs | None = None,
    started: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve the hub in a directory until SIGINT or SIGTERM.

    Args:
        root: its directory; made if it is missing.
        host: the address to listen on.
        port: 0 takes a free one.
        token_file: see qlformat.hub_server.tokens.
        xet: see qlformat.hub_server.service.open_hub.
        limits: what clients may send.
        blobs: where contents go; files below root by default.
        started: called with the hub's URL once it answers.

    Raises:
        QlfError: the directory, the address or the file of tokens cannot be used.
    """
    held = lock(root)
    try:
        hub = open_hub(root, token_file=token_file, xet=xet, limits=limits, blobs=blobs)
        hub.scratch.clean()
        if hub.xet is not None:
            hub.xet.clean()
        bound = bind(host, port)
        shown = f"[{host}]" if ":" in host else host
        config = uvicorn.Config(
            with_pages(hub),
            http=BoundedHeads,
            loop="uvloop",
            ws="none",
            lifespan="off",
            access_log=False,
            log_config=None,
            log_level=logging.WARNING,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=30,
            limit_concurrency=1000,
            timeout_graceful_shutdown=10,
        )
        _Server(config, lambda: started(f"http://{shown}:{bound.getsockname()[1]}")).run([bound])
    finally:
        os.close(held)


class _Server(uvicorn.Server):
    """uvicorn's server, which says when it answers."""

    def __init__(self, config: uvicorn.Config, started: Callable[[], None]) -> None:
        super().__init__(config)
        self._announce = started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, then tell."""
        await super().startup(sockets)
        if self.started:
            self._announce()

    def run(self, sockets: list[socket.socket] | None = None) -> Any:
        """Serve; an interrupt is a way to stop, not an error."""
        try:
            return super().run(sockets)
        except KeyboardInterrupt:
            return None
