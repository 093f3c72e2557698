"""From HTTP to plain functions: a request as a value, and refusals as answers."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import json
import sqlite3
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, unquote

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import QueryParams
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from qlformat.hub_server import names
from qlformat.hub_server.index import Repo
from qlformat.hub_server.refusals import Refused, disk_full, no_repo
from qlformat.hub_server.service import Hub
from qlformat.hub_server.tokens import Identity


@dataclass(frozen=True)
class Ask:
    """A request, with its body where one is expected.

    Attributes:
        params: the parts of the address, decoded.
        base: the address of this hub as the client wrote it, without a slash at the end.
        local: whether the client is on this machine.
    """

    hub: Hub
    identity: Identity
    params: dict[str, str]
    query: QueryParams
    base: str
    local: bool
    body: bytes = b""

    @property
    def type(self) -> str:
        """model, dataset or space."""
        return names.TYPES.get(self.params.get("types", "models"), "model")

    @property
    def name(self) -> str:
        """NAMESPACE/NAME as asked for."""
        return f"{self.params['namespace']}/{self.params['name']}"

    @property
    def revision(self) -> str:
        """The revision in the address; main if there is none."""
        return self.params.get("revision", "main")

    def repo(self, *, write: bool = False) -> Repo:
        """The repository in the address.

        Raises:
            Refused: 404 if it is not there or may not be seen; 401 or 403 if it may not be written to.
        """
        try:
            found = self.hub.index.repo(self.type, self.name)
            self.identity.require_read(found)
        except Refused:
            if write and not self.identity.write:
                self.identity.require_write(self.name)
            raise no_repo(self.name) from None
        if write:
            self.identity.require_write(found.name)
        return found

    def json(self) -> dict[str, Any]:
        """The body as a JSON object.

        Raises:
            Refused: 400.
        """
        try:
            value = json.loads(self.body or b"{}")
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise Refused(400, "the body is not a JSON object")
        return value

    def form(self) -> dict[str, list[str]]:
        """The body as a form, or as a JSON object of texts and lists.

        Raises:
            Refused: 400.
        """
        if self.body.lstrip().startswith(b"{"):
            return {k: [str(x) for x in v] if isinstance(v, list) else [str(v)] for k, v in self.json().items()}
        try:
            return parse_qs(self.body.decode(), keep_blank_values=True, max_num_fields=5000)
        except ValueError:
            raise Refused(400, "the body is not a form, or has more than 5000 fields") from None

    def text(self, value: object, what: str, most: int = 10_000) -> str:
        """A text of the body.

        Raises:
            Refused: 400 if it is none or too long.
        """
        if not isinstance(value, str) or len(value) > most:
            raise Refused(400, f"{what} is not a text of at most {most} characters")
        return value


def asked(request: Request, body: bytes = b"") -> Ask:
    """The request as a value; who asks is checked."""
    hub: Hub = request.app.state.hub
    return Ask(
        hub=hub,
        identity=hub.tokens.identify(request.headers.get("authorization")),
        params={key: decoded(value) for key, value in request.path_params.items()},
        query=request.query_params,
        base=str(request.base_url).rstrip("/"),
        local=is_local(request),
        body=body,
    )


def decoded(part: str) -> str:
    """A part of an address without its percent signs.

    Raises:
        Refused: 400 if it is not UTF-8.
    """
    try:
        return unquote(part, errors="strict")
    except UnicodeDecodeError:
        raise Refused(400, "the address is not UTF-8") from None


def is_local(request: Request) -> bool:
    """Whether the client is on this machine, so that it has the same files."""
    if request.client is None or request.headers.get("x-forwarded-for") or request.headers.get("forwarded"):
        return False
    return is_loopback(request.client.host)


def is_loopback(host: str) -> bool:
    """Whether an address of this name is reached from this machine only."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def endpoint(handler: Callable[[Ask], Response]) -> Callable[[Request], Any]:
    """A function of an Ask as an endpoint: the body is read up to the limit, the function runs in a thread."""

    async def run(request: Request) -> Response:
        return await guarded(_run(request, handler))

    return run


async def _run(request: Request, handler: Callable[[Ask], Response]) -> Response:
    hub: Hub = request.app.state.hub
    body = await whole_body(request, hub.limits.json) if request.method in ("POST", "PUT", "DELETE") else b""
    return await run_in_threadpool(lambda: handler(asked(request, body)))


async def guarded(answer: Any) -> Response:
    """Await an answer; a refusal or a full disk becomes one too."""
    try:
        response: Response = await answer
    except Refused as refused:
        return refusal(refused)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return refusal(disk_full())
        raise
    except sqlite3.OperationalError as error:
        if "full" in str(error):
            return refusal(disk_full())
        raise
    except ClientDisconnect:
        return Response(status_code=499)  # nobody reads it
    return response


def refusal(refused: Refused) -> Response:
    """The answer for a refusal: its line as JSON and, as the Hub's clients expect, in headers."""
    headers = {"X-Error-Message": refused.message.encode("ascii", "backslashreplace").decode()}
    if refused.code:
        headers["X-Error-Code"] = refused.code
    if refused.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse({"error": refused.message, **refused.fields}, refused.status, headers)


async def pieces(request: Request, most: int, what: str = "the body") -> AsyncIterator[bytes]:
    """The body as it arrives.

    Raises:
        Refused: 413 if it is longer than `most`, 408 if the client falls silent.
    """
    limits = request.app.state.hub.limits
    too_long = Refused(413, f"{what} is longer than the {most} bytes that this hub takes; send less at a time")
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > most:
        raise too_long
    received = 0
    while True:
        try:
            async with asyncio.timeout(limits.idle_seconds):
                message = await request.receive()
        except TimeoutError:
            raise Refused(408, f"nothing came for {limits.idle_seconds:g} seconds; try again") from None
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        data = message.get("body", b"")
        received += len(data)
        if received > most:
            raise too_long
        if data:
            yield data
        if not message.get("more_body"):
            return


async def whole_body(request: Request, most: int) -> bytes:
    """All of a short body."""
    return b"".join([data async for data in pieces(request, most)])
