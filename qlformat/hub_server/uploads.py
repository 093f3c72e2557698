"""Contents coming in by LFS: as one body or in parts, checked against their sha256 before they are kept."""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
import time
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from qlformat.hub_server.asking import Ask, guarded, pieces, whole_body
from qlformat.hub_server.blobs import is_sha256
from qlformat.hub_server.refusals import Refused
from qlformat.hub_server.service import Hub

MEDIA_TYPE = "application/vnd.git-lfs+json"
_BATCH = 4 << 20
"""Bytes that are hashed and written at a time."""
_MOST_OBJECTS = 1000
_MOST_PARTS = 10_000
_CLOSED = -1


def batch(ask: Ask) -> Response:
    """POST REPO.git/info/lfs/objects/batch: where to send contents, or that they are here already."""
    asked = ask.json()
    upload = asked.get("operation") == "upload"
    repo = ask.repo(write=upload)
    objects = asked.get("objects")
    if not isinstance(objects, list) or len(objects) > _MOST_OBJECTS:
        raise Refused(400, f"needed a list of at most {_MOST_OBJECTS} objects")
    if not upload:
        raise Refused(400, "downloads are by /resolve/; git-lfs clients are not served")
    hub, answers, missing = ask.hub, [], 0
    for item in objects:
        oid, size = _object(hub, item)
        answer: dict[str, Any] = {"oid": oid, "size": size}
        stored = hub.blobs.size(oid)
        if stored is None:
            missing += size
            answer |= {"authenticated": True, "actions": {"upload": _action(ask, repo.key, oid, size)}}
        else:
            hub.blobs.touch(oid)
            if stored != size:
                message = f"the content with this sha256 has {stored} bytes, not {size}"
                answer["error"] = {"code": 422, "message": message}
        answers.append(answer)
    hub.require_space(missing)
    return JSONResponse({"transfer": "basic", "hash_algo": "sha256", "objects": answers}, media_type=MEDIA_TYPE)


def _object(hub: Hub, item: object) -> tuple[str, int]:
    oid, size = (item.get("oid"), item.get("size")) if isinstance(item, dict) else (None, None)
    if not isinstance(oid, str) or not is_sha256(oid) or type(size) is not int or size < 0:
        raise Refused(400, 'needed objects such as {"oid": SHA256, "size": BYTES}')
    if size > hub.limits.file:
        raise Refused(413, f"a file of {size} bytes is larger than the {hub.limits.file} that this hub takes")
    return oid, size


def _action(ask: Ask, repo: int, oid: str, size: int) -> dict[str, Any]:
    """Where the client sends the content: one address, or one a part and one to finish."""
    part = ask.hub.limits.part
    if size <= part:
        return {"href": _href(ask, oid, size, repo, "", 0)}
    count = -(-size // part)
    if count > _MOST_PARTS:
        raise Refused(413, f"a file of {size} bytes would take {count} parts, at most {_MOST_PARTS} are possible")
    upload = secrets.token_hex(16)
    header = {str(number): _href(ask, oid, size, repo, upload, number) for number in range(1, count + 1)}
    return {"href": _href(ask, oid, size, repo, upload, 0), "header": {"chunk_size": str(part), **header}}


def _href(ask: Ask, oid: str, size: int, repo: int, upload: str, part: int) -> str:
    expires = int(time.time()) + ask.hub.limits.href_seconds
    signature = ask.hub.signer.sign(expires, oid, size, repo, upload, part, ask.hub.limits.part)
    return (
        f"{ask.base}/lfs/{oid}?size={size}&repo={repo}&upload={upload}&part={part}&chunk={ask.hub.limits.part}"
        f"&expires={expires}&signature={signature}"
    )


class _Signed:
    """What a signed address says. The signature is the right to send this content, and no other."""

    def __init__(self, request: Request) -> None:
        hub: Hub = request.app.state.hub
        query = request.query_params
        try:
            size, repo, part, chunk, expires = (int(query[key]) for key in ("size", "repo", "part", "chunk", "expires"))
        except (KeyError, ValueError):
            raise Refused(403, "the address is not signed by this hub; ask for a new one") from None
        self.hub, self.oid, self.size, self.part, self.chunk = hub, request.path_params["oid"], size, part, chunk
        self.upload = query.get("upload", "")
        hub.signer.check(query.get("signature", ""), expires, self.oid, size, repo, self.upload, part, chunk)


async def put(request: Request) -> Response:
    """PUT /lfs/SHA256: a content or one part of it."""
    return await guarded(_put(request))


async def _put(request: Request) -> Response:
    signed = _Signed(request)
    if signed.part:
        return await _put_part(request, signed)
    hub, size = signed.hub, signed.size
    if await run_in_threadpool(hub.blobs.size, signed.oid) == size:
        return await _drained(request, size)
    hub.require_space(size)
    file = await run_in_threadpool(hub.scratch.new)
    try:
        digest = await _receive(request, file, 0, size)
        if digest != signed.oid:
            raise Refused(
                422, f"the content received has sha256 {digest}, announced was {signed.oid}; nothing was kept"
            )
        await run_in_threadpool(hub.blobs.put, file, signed.oid)
    finally:
        file.unlink(missing_ok=True)
    return Response(headers={"ETag": f'"{signed.oid}"'})


async def _drained(request: Request, size: int) -> Response:
    """The content came in by another request meanwhile: read this one to its end, and be done."""
    async for _ in pieces(request, size):
        pass
    return Response()


async def _put_part(request: Request, signed: _Signed) -> Response:
    start = (signed.part - 1) * signed.chunk
    length = min(signed.chunk, signed.size - start)
    signed.hub.require_space(length)
    running = signed.hub.uploads
    if running.get(signed.upload) == _CLOSED:
        raise Refused(409, "this upload is being finished or is over; start it again")
    running[signed.upload] = running.get(signed.upload, 0) + 1
    try:
        digest = await _receive(request, signed.hub.scratch.parts(signed.upload), start, length)
    finally:
        running[signed.upload] -= 1
    return Response(headers={"ETag": f'"{digest}"'})


async def _receive(request: Request, file: Path, start: int, length: int) -> str:
    """Write a body of exactly `length` bytes at an offset of a file; returns its sha256.

    While one batch is hashed and written in a thread, the next one is received.
    """
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    hasher, offset, waiting = hashlib.sha256(), start, bytearray()
    writing: asyncio.Future[None] | None = None

    def write(data: bytearray, at: int) -> None:
        hasher.update(data)
        view = memoryview(data)
        while view:
            done = os.pwrite(handle, view, at)
            view, at = view[done:], at + done

    try:
        async for data in pieces(request, length, "the file"):
            waiting += data
            if len(waiting) >= _BATCH:
                if writing:
                    await writing
                writing = asyncio.ensure_future(run_in_threadpool(write, waiting, offset))
                offset, waiting = offset + len(waiting), bytearray()
        if writing:
            await writing
            writing = None
        await run_in_threadpool(write, waiting, offset)
    finally:
        if writing:
            await asyncio.wait([writing])  # the thread uses the file
        os.close(handle)
    received = offset + len(waiting) - start
    if received != length:
        raise Refused(400, f"received {received} bytes, announced were {length}; send it again")
    return hasher.hexdigest()


async def complete(request: Request) -> Response:
    """POST /lfs/SHA256: all parts are sent."""
    return await guarded(_complete(request))


async def _complete(request: Request) -> Response:
    signed = _Signed(request)
    await whole_body(request, signed.hub.limits.json)  # etags: the whole is checked by its sha256
    # No part may be written between the check of the sha256 and the content's getting its name, nor after.
    running = signed.hub.uploads
    if running.get(signed.upload, 0) != 0:
        raise Refused(409, "a part of this upload is still being received, or it is being finished; try again")
    running[signed.upload] = _CLOSED
    try:
        await run_in_threadpool(_finish, signed)
    except BaseException:
        running.pop(signed.upload, None)
        raise
    return JSONResponse({"oid": signed.oid, "size": signed.size})


def _finish(signed: _Signed) -> None:
    if signed.hub.blobs.size(signed.oid) == signed.size:
        signed.hub.scratch.parts(signed.upload).unlink(missing_ok=True)
        return
    file = signed.hub.scratch.parts(signed.upload)
    try:
        with file.open("rb") as content:
            size = os.fstat(content.fileno()).st_size
            digest = hashlib.file_digest(content, "sha256").hexdigest()
    except FileNotFoundError:
        raise Refused(400, "no part of this upload was received; start it again") from None
    if (digest, size) != (signed.oid, signed.size):
        file.unlink()
        raise Refused(
            422,
            f"the parts received are {size} bytes with sha256 {digest}, announced was {signed.oid}; nothing was kept",
        )
    signed.hub.blobs.put(file, signed.oid)
