"""GET and HEAD of REPO/resolve/REVISION/PATH: a file, or a range of it."""

from __future__ import annotations

import mimetypes
import re
from collections.abc import AsyncIterator, Iterator
from email.utils import formatdate
from urllib.parse import quote

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response, StreamingResponse

from qlformat.hub_server.asking import Ask, asked, guarded, refusal
from qlformat.hub_server.index import Commit, File, Repo
from qlformat.hub_server.refusals import Refused

_RANGE = re.compile(r"bytes=(\d*)-(\d*)")
_SAFE_TYPES = frozenset({"application/json", "text/plain", "text/markdown", "image/png", "image/jpeg"})


async def resolve(request: Request) -> Response:
    """The endpoint."""
    return await guarded(_resolve(request))


async def _resolve(request: Request) -> Response:
    ask = asked(request)
    answer, chunks = await run_in_threadpool(_answer, ask, request)
    if chunks is None or request.method == "HEAD":
        return answer
    return StreamingResponse(_ahead(chunks), answer.status_code, dict(answer.headers))


async def _ahead(chunks: Iterator[bytes]) -> AsyncIterator[bytes]:
    """The chunks, each read in a thread."""
    while True:
        chunk = await run_in_threadpool(next, chunks, None)
        if chunk is None:
            return
        yield chunk


def _answer(ask: Ask, request: Request) -> tuple[Response, Iterator[bytes] | None]:
    """The head of the answer, and the bytes that follow if there are any."""
    repo = ask.repo()
    commit = ask.hub.index.commit(repo, ask.revision)
    try:
        file = ask.hub.index.file(commit, ask.params["path"])
    except Refused as refused:
        answer = refusal(refused)
        answer.headers["X-Repo-Commit"] = commit.id  # the client remembers that this commit has no such file
        return answer, None
    headers = _headers(ask, repo, commit, file)
    if request.headers.get("if-none-match") in (headers["ETag"], "*"):
        return Response(status_code=304, headers=headers), None
    address = ask.hub.blobs.url(file.sha256)
    if address is not None:
        moved = RedirectResponse(address, 302, headers)
        return moved, None
    asked_range = request.headers.get("range")
    if request.headers.get("if-range") not in (None, headers["ETag"]):
        asked_range = None
    span = _span(asked_range, file.size)
    if span is None:
        message = f"the file has {file.size} bytes, asked for was {asked_range}"
        answer = refusal(Refused(416, message))
        answer.headers["Content-Range"] = f"bytes */{file.size}"
        return answer, None
    start, stop, partial = span
    headers["Content-Length"] = str(stop - start)
    if partial:
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{file.size}"
    return Response(status_code=206 if partial else 200, headers=headers), ask.hub.blobs.chunks(
        file.sha256, start, stop
    )


def _headers(ask: Ask, repo: Repo, commit: Commit, file: File) -> dict[str, str]:
    guessed = mimetypes.guess_type(file.path)[0] or "application/octet-stream"
    name = quote(file.path.rpartition("/")[2])
    return {
        "X-Repo-Commit": commit.id,
        "ETag": f'"{file.sha256 if file.lfs else file.oid}"',
        "X-Linked-Size": str(file.size),
        "Accept-Ranges": "bytes",
        "Content-Type": guessed if guessed in _SAFE_TYPES else "application/octet-stream",
        # A file of a stranger is never a page of this server.
        "Content-Disposition": f"attachment; filename*=UTF-8''{name}; filename=\"{name}\";",
        "Content-Security-Policy": "default-src 'none'; sandbox",
        "X-Content-Type-Options": "nosniff",
        "Last-Modified": formatdate(commit.created, usegmt=True),
        "Cache-Control": "private, no-cache" if repo.private else "no-cache",
    }


def _span(text: str | None, size: int) -> tuple[int, int, bool] | None:
    """(start, stop, whether it is a part) of a Range header; None if nothing of the file is in it.

    Several ranges, or what is no range, get the whole file, as the standard allows (RFC 9110, 14.2).
    """
    match = _RANGE.fullmatch(text.strip()) if text else None
    if match is None or match.groups() == ("", ""):
        return 0, size, False
    first, last = match.groups()
    if first:
        start, stop = int(first), min(int(last) + 1, size) if last else size
        if last and int(last) < int(first):
            return 0, size, False
    else:
        start, stop = max(0, size - int(last)), size
    return (start, stop, True) if start < stop else None
