"""Where the contents of files are: each under its sha256, written once, never changed."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

CHUNK = 1 << 20
"""Bytes read at a time."""

_SHA256 = re.compile(r"[0-9a-f]{64}")


def is_sha256(text: str) -> bool:
    """Whether the text is a sha256 in lower-case hexadecimal."""
    return _SHA256.fullmatch(text) is not None


class Blobs(Protocol):
    """A store of finished contents. All methods block and may be called from any thread."""

    def put(self, file: Path, sha256: str) -> None:
        """Move a finished file, whose content has this sha256, into the store. It is durable on return."""

    def put_many(self, files: list[tuple[Path, str]]) -> None:
        """`put` for many small files at once."""

    def size(self, sha256: str) -> int | None:
        """Bytes of a content, or None if the store does not have it."""

    def chunks(self, sha256: str, start: int, stop: int) -> Iterator[bytes]:
        """The bytes start..stop-1 in pieces.

        Raises:
            OSError: the content is gone or shorter.
        """

    def delete(self, sha256: str) -> None:
        """Remove a content; nothing happens if it is not there."""

    def stored(self) -> Iterator[tuple[str, int, float]]:
        """sha256, size, and the Unix time of its last `put` or `touch`, of every content."""

    def touch(self, sha256: str) -> None:
        """Say that the content is about to be used, which keeps garbage collection off it for a while."""

    def url(self, sha256: str) -> str | None:
        """An address where a client gets the content without this server, or None."""


class FileBlobs:
    """Contents as files of a directory: `ab/abcd...`.

    Args:
        directory: the store; created. Temporary files must be on the same file system.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        for first in range(256):  # all now, so that no upload depends on a folder that is not on the disk yet
            (directory / f"{first:02x}").mkdir(parents=True, exist_ok=True)
        sync(directory)

    def path(self, sha256: str) -> Path:
        """Where the content is or would be.

        Raises:
            ValueError: not a sha256.
        """
        if not is_sha256(sha256):
            raise ValueError(f"{sha256!r} is not a sha256")
        return self._directory / sha256[:2] / sha256

    def put(self, file: Path, sha256: str) -> None:
        """See Blobs."""
        self.put_many([(file, sha256)])

    def put_many(self, files: list[tuple[Path, str]]) -> None:
        """See Blobs. Contents are on the disk before they get their names, and the names before it returns."""
        folders: set[Path] = set()
        for file, sha256 in files:
            target = self.path(sha256)
            sync(file)
            os.replace(file, target)
            folders.add(target.parent)
        for folder in folders:
            sync(folder)

    def size(self, sha256: str) -> int | None:
        """See Blobs."""
        try:
            return self.path(sha256).stat().st_size
        except FileNotFoundError:
            return None

    def chunks(self, sha256: str, start: int, stop: int) -> Iterator[bytes]:
        """See Blobs."""
        with self.path(sha256).open("rb", buffering=0) as file:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), start, stop - start, os.POSIX_FADV_SEQUENTIAL)
            while start < stop:
                data = os.pread(file.fileno(), min(CHUNK, stop - start), start)
                if not data:
                    raise OSError(f"the stored content {sha256} ends at byte {start}, needed {stop}")
                start += len(data)
                yield data

    def delete(self, sha256: str) -> None:
        """See Blobs."""
        self.path(sha256).unlink(missing_ok=True)

    def stored(self) -> Iterator[tuple[str, int, float]]:
        """See Blobs."""
        for file in self._directory.glob("??/*"):
            if is_sha256(file.name):
                with contextlib.suppress(FileNotFoundError):
                    status = file.stat()
                    yield file.name, status.st_size, status.st_mtime

    def touch(self, sha256: str) -> None:
        """See Blobs."""
        with contextlib.suppress(FileNotFoundError):
            os.utime(self.path(sha256))

    def url(self, sha256: str) -> str | None:
        """See Blobs: files are sent by this server."""
        return None


class Scratch:
    """The directory of files that are still being received.

    Args:
        directory: created if it is missing.
    """

    KEEP_SECONDS = 24 * 3600.0

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def clean(self) -> None:
        """Remove what a server that is gone has left. Parts of an upload in parts outlive a restart, for a day."""
        for file in self.directory.iterdir():
            if not file.name.startswith("parts-") or file.stat().st_mtime < time.time() - self.KEEP_SECONDS:
                file.unlink()

    def new(self) -> Path:
        """An empty file."""
        handle, name = tempfile.mkstemp(dir=self.directory, prefix="incoming-")
        os.close(handle)
        return Path(name)

    def parts(self, upload: str) -> Path:
        """The file that the parts of one upload are written into."""
        return self.directory / f"parts-{upload}"

    def free(self) -> int:
        """Bytes free on the disk."""
        return shutil.disk_usage(self.directory).free


def sync(path: Path) -> None:
    """Wait until a file, or a directory's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
