"""Repositories on a hub by single requests, as a hostile client could send them: no client checks what is in them."""

from __future__ import annotations

import base64
import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPMessage

from tests.local_hub_fixture import LocalHub


@dataclass(frozen=True)
class Answer:
    status: int
    headers: HTTPMessage
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: object) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


def ask(hub: LocalHub, path: str, *, method: str = "GET", body: bytes | None = None, **headers: str) -> Answer:
    """One request; redirects are not followed. `X_Name="..."` is sent as the header X-Name."""
    sent = {key.replace("_", "-"): value for key, value in headers.items()}
    request = urllib.request.Request(hub.url + path, data=body, method=method, headers=sent)
    try:
        with _OPENER.open(request, timeout=30) as found:
            return Answer(found.status, found.headers, found.read())
    except urllib.error.HTTPError as error:
        return Answer(error.code, error.headers, error.read())


def create(hub: LocalHub, name: str, *, private: bool = False, type_: str = "model") -> None:
    namespace, _, short = name.partition("/")
    fields = {"name": short, "organization": namespace, "type": type_, "private": private}
    visibility = {"visibility": "private" if private else "public"}
    answer = _post(hub, "/api/repos/create", json.dumps(fields | visibility).encode())
    assert answer.status == 200, answer.text


def push(
    hub: LocalHub,
    name: str,
    files: Mapping[str, str | bytes | None],
    *,
    private: bool = False,
    type_: str = "model",
    title: str = "Add files",
) -> str:
    """Create the repository if it is not there, and commit small files; None deletes one. Returns the commit."""
    if ask(hub, f"/api/{type_}s/{name}", Authorization=f"Bearer {hub.token}").status == 404:
        create(hub, name, private=private, type_=type_)
    lines: list[dict[str, object]] = [{"key": "header", "value": {"summary": title, "description": ""}}]
    for path, content in files.items():
        if content is None:
            lines.append({"key": "deletedFile", "value": {"path": path}})
            continue
        data = base64.b64encode(content.encode() if isinstance(content, str) else content).decode()
        lines.append({"key": "file", "value": {"path": path, "content": data, "encoding": "base64"}})
    body = "".join(json.dumps(line) + "\n" for line in lines).encode()
    answer = _post(hub, f"/api/{type_}s/{name}/commit/main", body, "application/x-ndjson")
    assert answer.status == 200, answer.text
    return str(json.loads(answer.body)["commitOid"])


def _post(hub: LocalHub, path: str, body: bytes, kind: str = "application/json") -> Answer:
    return ask(hub, path, method="POST", body=body, Authorization=f"Bearer {hub.token}", Content_Type=kind)
