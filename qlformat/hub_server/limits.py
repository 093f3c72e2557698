"""How much a hub takes from a client."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Sizes are bytes.

    Attributes:
        header: the head of a request: its line and headers.
        json: a request's JSON body.
        commit: a commit's body, with its small files in base64.
        line: one line of it.
        operations: lines of it.
        files: files of one revision.
        regular: a file that is sent inside a commit.
        file: a file that is sent by LFS.
        part: one part of an upload in parts; a file of at most this size is sent as one.
        free: space left free on the disk, which the index needs.
        href_seconds: how long a signed address is valid.
        idle_seconds: how long a client may send nothing in the middle of a body.
    """

    header: int = 64 << 10
    json: int = 8 << 20
    commit: int = 256 << 20
    line: int = 64 << 20
    operations: int = 25_000
    files: int = 100_000
    regular: int = 10 << 20
    file: int = 1 << 40
    part: int = 1 << 30
    free: int = 64 << 20
    href_seconds: int = 12 * 3600
    idle_seconds: float = 120.0

    SMALL = 1 << 20
    """From this size on every file is sent by LFS."""

    PREUPLOAD_FILES = 1000
