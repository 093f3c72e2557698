"""POST commit/REVISION: one line of JSON an operation, contents of small files in base64, all or nothing."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from qlformat.hub_server import card_metadata, names
from qlformat.hub_server.applying import Add, Delete
from qlformat.hub_server.asking import Ask, asked, guarded, pieces
from qlformat.hub_server.blobs import is_sha256
from qlformat.hub_server.changes import CARD, NewCommit
from qlformat.hub_server.git_ids import git_oid, pointer
from qlformat.hub_server.index import PULLS, Repo
from qlformat.hub_server.refusals import Refused, shown
from qlformat.hub_server.service import Hub

_MOST_TITLE, _MOST_MESSAGE = 1000, 100_000


class _Incoming:
    """The operations read so far. Contents wait in temporary files until the commit is whole."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self.header: dict[str, Any] | None = None
        self.operations: list[Add | Delete] = []
        self.files: list[tuple[Path, str]] = []

    def take(self, line: bytes) -> None:
        """Read one line.

        Raises:
            Refused: 400 for what is no operation, or not allowed.
        """
        if not line.strip():
            return
        key, value = _operation(line)
        if key == "header":
            if self.header is not None or self.operations:
                raise Refused(400, "a commit has one header, as its first line")
            self.header = value
            return
        if self.header is None:
            raise Refused(400, "a commit begins with its header")
        if len(self.operations) >= self._hub.limits.operations:
            raise Refused(413, f"a commit of more than {self._hub.limits.operations} operations; split it")
        self.operations.append(self._taken(key, value))

    def _taken(self, key: str, value: dict[str, Any]) -> Add | Delete:
        path = value.get("path")
        if not isinstance(path, str):
            raise Refused(400, f"the operation {shown(key)} has no path")
        if key in ("deletedFile", "deletedFolder"):
            return Delete(names.check_path(path.rstrip("/")), key == "deletedFolder")
        names.check_path(path)
        if key == "file":
            return self._file(path, value)
        if key == "lfsFile":
            return self._lfs_file(path, value)
        raise Refused(400, f"the operation {shown(key)} is not known here")

    def _file(self, path: str, value: dict[str, Any]) -> Add:
        text = value.get("content")
        try:
            if value.get("encoding", "utf-8") == "base64":
                content = base64.b64decode(str(text), validate=True)
            else:
                content = str(text).encode()
        except (binascii.Error, UnicodeEncodeError):
            raise Refused(400, f"the content of {shown(path)} is neither base64 nor text") from None
        if len(content) > self._hub.limits.regular:
            raise Refused(
                413,
                f"{shown(path)} has {len(content)} bytes, at most {self._hub.limits.regular} go into a commit; use LFS",
            )
        if path == CARD:
            try:
                card_metadata.parse(content)
            except card_metadata.BrokenCard as error:
                raise Refused(400, str(error)) from None
        sha256 = hashlib.sha256(content).hexdigest()
        file = self._hub.scratch.new()
        self.files.append((file, sha256))
        file.write_bytes(content)
        return Add(path, len(content), git_oid(content), sha256, lfs=False)

    def _lfs_file(self, path: str, value: dict[str, Any]) -> Add:
        sha256, size = value.get("oid"), value.get("size")
        if not isinstance(sha256, str) or not is_sha256(sha256) or value.get("algo", "sha256") != "sha256":
            raise Refused(400, f"{shown(path)} has no sha256")
        stored = self._hub.blobs.size(sha256)
        if size is None and stored is not None:
            size = stored  # a copy within the hub
        if type(size) is not int or size < 0:
            raise Refused(400, f"{shown(path)} has no size, and its content was not uploaded")
        return Add(path, size, git_oid(pointer(sha256, size)), sha256, lfs=True)

    def discard(self) -> None:
        """Remove the temporary files that are left."""
        for file, _ in self.files:
            file.unlink(missing_ok=True)


def _operation(line: bytes) -> tuple[str, dict[str, Any]]:
    try:
        item = json.loads(line)
    except (ValueError, RecursionError):
        item = None
    if not isinstance(item, dict) or not isinstance(item.get("key"), str) or not isinstance(item.get("value"), dict):
        raise Refused(400, 'a line of the commit is not JSON such as {"key": ..., "value": {...}}')
    return item["key"], item["value"]


async def commit(request: Request) -> Response:
    """The endpoint."""
    return await guarded(_commit(request))


async def _commit(request: Request) -> Response:
    ask = asked(request)
    repo = await run_in_threadpool(lambda: ask.repo(write=True))
    incoming = _Incoming(ask.hub)
    try:
        async for line in _lines(request, ask.hub):
            await run_in_threadpool(incoming.take, line)
        return await run_in_threadpool(_apply, ask, repo, incoming)
    finally:
        await run_in_threadpool(incoming.discard)


async def _lines(request: Request, hub: Hub) -> AsyncIterator[bytes]:
    """The lines of the body, each of a bounded length."""
    rest = bytearray()
    async for data in pieces(request, hub.limits.commit, "the commit"):
        for at, part in enumerate(data.split(b"\n")):
            if at:
                yield bytes(rest)
                rest = bytearray()
            rest += part
            if len(rest) > hub.limits.line:
                message = f"a line of the commit is longer than {hub.limits.line} bytes; send large files by LFS"
                raise Refused(413, message)
    yield bytes(rest)


def _apply(ask: Ask, repo: Repo, incoming: _Incoming) -> Response:
    """Keep the contents, then the commit: whoever sees the commit has the contents."""
    if incoming.header is None:
        raise Refused(400, "a commit begins with its header")
    hub, header = ask.hub, incoming.header
    parent = header.get("parentCommit")
    revision, number = ask.revision, None
    hub.require_space(
        sum(operation.size for operation in incoming.operations if isinstance(operation, Add) and not operation.lfs)
    )
    title = ask.text(header.get("summary"), "the title", _MOST_TITLE)
    message = ask.text(header.get("description") or "", "the description", _MOST_MESSAGE)
    if hub.xet is not None:
        added = [operation for operation in incoming.operations if isinstance(operation, Add) and operation.lfs]
        hub.xet.take_over(added, hub.blobs, hub.scratch)
    hub.blobs.put_many(incoming.files)
    if ask.query.get("create_pr") == "1":
        number = hub.changes.open_pull(repo, title, message, ask.identity.name, draft=False)
        revision = f"{PULLS}{number}"
    new = NewCommit(
        revision,
        title,
        message,
        ask.identity.name,
        tuple(incoming.operations),
        ask.text(parent, "the parent commit", 64) if parent else None,
    )
    try:
        id_ = hub.changes.commit(repo, new)
    except Refused:
        if number is not None:
            hub.changes.set_pull_status(repo, number, "closed")
        raise
    page = f"{ask.base}/{'' if repo.type == 'model' else repo.type + 's/'}{repo.name}"
    answer = {"success": True, "commitOid": id_, "commitUrl": f"{page}/commit/{id_}", "hookOutput": ""}
    if number is not None:
        answer["pullRequestUrl"] = f"{page}/discussions/{number}"
    return JSONResponse(answer)
