"""POST preupload/REVISION: by which way each file should be sent, and what is here already."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Mapping
from typing import Any

from starlette.responses import JSONResponse, Response

from qlformat.hub_server import ignoring, names
from qlformat.hub_server.asking import Ask
from qlformat.hub_server.index import File
from qlformat.hub_server.refusals import Refused, shown

_ALWAYS_LFS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".gguf",
    ".onnx",
    ".npz",
    ".npy",
    ".h5",
    ".parquet",
    ".zip",
    ".model",
)


def preupload(ask: Ask) -> Response:
    """The endpoint."""
    repo, body = ask.repo(write=True), ask.json()
    files = body.get("files")
    if not isinstance(files, list) or len(files) > ask.hub.limits.PREUPLOAD_FILES:
        raise Refused(400, f"needed a list of at most {ask.hub.limits.PREUPLOAD_FILES} files")
    commit = ask.hub.index.commit(repo, ask.revision)
    present = {file.path: file for file in ask.hub.index.files(commit)}
    ignored = ignoring.matcher(_gitignore(ask, body, present))
    return JSONResponse({"files": [_way(ask, item, present, ignored) for item in files], "commitOid": commit.id})


def _gitignore(ask: Ask, body: dict[str, Any], present: Mapping[str, File]) -> str:
    """The .gitignore that is being uploaded, or the one that is there."""
    sent, here = body.get("gitIgnore"), present.get(".gitignore")
    if isinstance(sent, str):
        return sent
    if here is None:
        return ""
    content = b"".join(ask.hub.blobs.chunks(here.sha256, 0, min(here.size, ignoring.MAX_BYTES)))
    return content.decode(errors="replace")


def _way(ask: Ask, item: object, present: Mapping[str, File], ignored: Callable[[str], bool]) -> dict[str, Any]:
    if not isinstance(item, dict) or not isinstance(item.get("path"), str) or type(item.get("size")) is not int:
        raise Refused(400, 'needed files such as {"path": ..., "size": ..., "sample": ...}')
    path, size = names.check_path(item["path"]), item["size"]
    if size > ask.hub.limits.file:
        raise Refused(413, f"{shown(path)} has {size} bytes, this hub takes files of {ask.hub.limits.file} at most")
    lfs = size > 0 and (
        size >= ask.hub.limits.SMALL or path.lower().endswith(_ALWAYS_LFS) or _is_binary(item.get("sample"))
    )
    way = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": ignored(path)}
    here = present.get(path)
    if here is not None and here.lfs == lfs:
        way["oid"] = here.sha256 if lfs else here.oid
    return way


def _is_binary(sample: object) -> bool:
    """Whether the first bytes of a file, in base64, are no text."""
    try:
        content = base64.b64decode(str(sample or ""))
    except binascii.Error:
        return True
    if b"\0" in content:
        return True
    try:
        content.decode()
    except UnicodeDecodeError as error:
        return error.start < len(content) - 4  # the sample may end inside a character
    return False
