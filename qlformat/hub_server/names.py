"""Which names a hub accepts: repositories, files, branches and tags. Nothing here touches the disk.

Files are stored under their sha256, so that a path of a repository never becomes a path of the server's disk. It does
become one on the disks of those who download it, which is why it is checked here.
"""

from __future__ import annotations

import re
import unicodedata

from qlformat.hub_server.refusals import Refused, shown

MAX_PATH_BYTES = 1024
MAX_SEGMENT_BYTES = 255
MAX_DEPTH = 64

TYPES = {"models": "model", "datasets": "dataset", "spaces": "space"}
"""The plural in an URL -> the repository's type."""

_REPO_PART = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")
_RESERVED_NAMESPACES = {"api", "datasets", "spaces", "models", "lfs", "static"}
_REF = re.compile(r"[A-Za-z0-9_.+@-]+(?:/[A-Za-z0-9_.+@-]+)*")
_WINDOWS_DEVICE = re.compile(r"(?:con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³])(?:\..*)?", re.IGNORECASE)
_DRIVE = re.compile(r"[A-Za-z]:")
_CLIENT_FOLDERS = {".git", ".cache"}
_COMMIT = re.compile(r"[0-9a-f]{40}")


def check_repo(name: str) -> str:
    """NAMESPACE/NAME as huggingface_hub allows it.

    Raises:
        Refused: 400.
    """
    parts = name.split("/")
    if (
        len(parts) != 2
        or not all(_REPO_PART.fullmatch(part) for part in parts)
        or len(name) > 96
        or any(pair in name for pair in ("--", ".."))
        or name.endswith((".git", ".ipynb", ".lock"))
        or parts[0].lower() in _RESERVED_NAMESPACES
    ):
        raise Refused(
            400,
            f"{shown(name)} is not allowed as a repository's name; use NAMESPACE/NAME of letters, digits, '-', '_' and "
            "'.', at most 96 characters, without '--' or '..'",
        )
    return name


def check_path(path: str) -> str:
    """A file's path inside a repository: relative, with '/', and safe on the disk of whoever downloads it.

    Raises:
        Refused: 400, with the reason.
    """
    reason = _fault(path)
    if reason:
        raise Refused(
            400, f"the path {shown(path)} is not allowed: {reason}; use a relative path such as folder/file.json"
        )
    return path


def _fault(path: str) -> str | None:
    """Why the path is not allowed, or None."""
    try:
        size = len(path.encode())
    except UnicodeEncodeError:
        return "it is not valid Unicode"
    segments = path.split("/")
    if not path or size > MAX_PATH_BYTES or len(segments) > MAX_DEPTH:
        return f"it is empty, longer than {MAX_PATH_BYTES} bytes, or deeper than {MAX_DEPTH} folders"
    if path.startswith("/") or _DRIVE.match(path):
        return "it is absolute"
    if "\\" in path:
        return "it has a backslash"
    if any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in path):
        return "it has a control character"
    return next((fault for fault in map(_segment_fault, segments) if fault), None)


def _segment_fault(segment: str) -> str | None:
    if segment in ("", ".", ".."):
        return f"it has {shown(segment)} as a part"
    if len(segment.encode()) > MAX_SEGMENT_BYTES:
        return f"a part is longer than {MAX_SEGMENT_BYTES} bytes"
    if segment.casefold() in _CLIENT_FOLDERS:
        return f"{segment} is reserved for the tools of the one who downloads it"
    if _WINDOWS_DEVICE.fullmatch(segment):
        return f"{segment} is a device on Windows"
    return None


def check_ref(name: str, what: str) -> str:
    """A branch's or tag's name.

    Raises:
        Refused: 400.
    """
    if (
        not _REF.fullmatch(name)
        or len(name) > 200
        or ".." in name
        or "@{" in name
        or name.startswith(("refs/", "-"))
        or any(part.startswith(".") or part.endswith((".lock", ".")) for part in name.split("/"))
        or is_commit(name)
    ):
        raise Refused(
            400, f"{shown(name)} is not allowed as the name of a {what}; use letters, digits, '.', '_', '-' and '/'"
        )
    return name


def is_commit(name: str) -> bool:
    """Whether the name is a whole commit id."""
    return _COMMIT.fullmatch(name) is not None
