"""Requests to the hub's application in this process, without a socket."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message

from qlformat.hub_server.app import application
from qlformat.hub_server.limits import Limits
from qlformat.hub_server.service import Hub, open_hub
from tests.local_hub_fixture import WRITE_TOKEN


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        return str(self.json["error"])


class Client:
    """Asks one hub.

    Attributes:
        hub: what is behind the application.
        token: sent with every request unless a request says otherwise.
    """

    def __init__(
        self, root: Path, *, token_file: Path | None = None, limits: Limits | None = None, xet: bool = False
    ) -> None:
        self.hub: Hub = open_hub(root, token_file=token_file, limits=limits, xet=xet)
        self._app: ASGIApp = application(self.hub)
        self.token: str | None = WRITE_TOKEN if token_file else None
        self.address = "127.0.0.1"

    def ask(
        self,
        method: str,
        url: str,
        *,
        body: bytes | Iterable[bytes] = b"",
        json_body: object = None,
        headers: dict[str, str] | None = None,
        token: str | None = "",
    ) -> Answer:
        """One request. `token` "" is the client's own, None is none."""
        if json_body is not None:
            body = json.dumps(json_body).encode()
        sent = {"host": "127.0.0.1:80", **(headers or {})}
        token = self.token if token == "" else token
        if token is not None:
            sent["authorization"] = f"Bearer {token}"
        return asyncio.run(self._ask(method, url, [body] if isinstance(body, bytes) else list(body), sent))

    async def _ask(self, method: str, url: str, body: list[bytes], headers: dict[str, str]) -> Answer:
        parts = urlsplit(url)
        scope = {
            "type": "http",
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": parts.path,
            "raw_path": parts.path.encode(),
            "root_path": "",
            "query_string": parts.query.encode(),
            "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
            "client": (self.address, 4000),
            "server": ("127.0.0.1", 80),
        }
        waiting = [{"type": "http.request", "body": part, "more_body": True} for part in body]
        waiting.append({"type": "http.request", "body": b"", "more_body": False})
        sent: list[Message] = []

        async def receive() -> Message:
            if not waiting:
                await asyncio.Event().wait()  # the client stays
            return waiting.pop(0)

        async def send(message: Message) -> None:
            sent.append(message)

        await self._app(scope, receive, send)
        found = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
        return Answer(sent[0]["status"], found, b"".join(message.get("body", b"") for message in sent[1:]))

    def create(self, name: str, **fields: object) -> None:
        namespace, _, short = name.partition("/")
        answer = self.ask("POST", "/api/repos/create", json_body={"name": short, "organization": namespace, **fields})
        assert answer.status == 200, answer.body

    def commit(
        self, repo: str, *operations: tuple[str, dict[str, object]], revision: str = "main", **header: object
    ) -> Answer:
        lines = [{"key": "header", "value": {"summary": "change", "description": "", **header}}]
        lines += [{"key": key, "value": value} for key, value in operations]
        body = b"\n".join(json.dumps(line).encode() for line in lines) + b"\n"
        return self.ask("POST", f"/api/models/{repo}/commit/{revision}", body=body)

    def head(self, repo: str, revision: str = "main") -> str:
        return str(self.ask("GET", f"/api/models/{repo}/revision/{revision}").json["sha"])

    def files(self, repo: str, revision: str = "main") -> list[str]:
        return [item["path"] for item in self.ask("GET", f"/api/models/{repo}/tree/{revision}?recursive=true").json]

    def href(self, repo: str, content: bytes) -> dict[str, Any] | None:
        """The LFS action for a content; None if it is stored."""
        item = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content)}
        answer = self.ask(
            "POST", f"/{repo}.git/info/lfs/objects/batch", json_body={"operation": "upload", "objects": [item]}
        )
        assert answer.status == 200, answer.body
        actions = answer.json["objects"][0].get("actions")
        return actions["upload"] if actions else None

    def upload(self, repo: str, content: bytes) -> None:
        action = self.href(repo, content)
        if action is not None:
            assert self.ask("PUT", action["href"], body=content, token=None).status == 200


def small(path: str, content: bytes) -> tuple[str, dict[str, object]]:
    """A file inside a commit."""
    return "file", {"path": path, "content": base64.b64encode(content).decode(), "encoding": "base64"}


def large(path: str, content: bytes) -> tuple[str, dict[str, object]]:
    """A file by LFS."""
    return "lfsFile", {"path": path, "algo": "sha256", "oid": hashlib.sha256(content).hexdigest(), "size": len(content)}
