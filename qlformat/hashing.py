"""sha256 of files that are read, or written, at the same time by other threads."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path
from typing import Protocol

CHUNK_BYTES = 256 << 10
"""Small enough to stay in a CPU cache between the read and the hash."""


class Digest(Protocol):
    """What is used of hashlib's objects."""

    def update(self, data: memoryview, /) -> None:
        """Take further bytes."""

    def hexdigest(self) -> str:
        """Of all bytes so far, in hexadecimal."""


class FileHasher:
    """sha256 of one file, advanced piece by piece behind the threads that use its bytes.

    The pieces are hashed while they are still in the page cache, so a file larger than memory is read from the disk
    once. One thread hashes at a time; others do not wait for it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = path.stat().st_size
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._digest = hashlib.sha256()
        self._position = 0
        self._frontier = 0
        self._buffer = memoryview(bytearray(CHUNK_BYTES))  # one for all reads: fresh memory costs page faults
        self._busy = threading.Lock()

    def advance(self, frontier: int) -> None:
        """Say that bytes before `frontier` have been used, and hash up to there unless another thread is at it."""
        self._frontier = max(self._frontier, min(frontier, self.size))
        if self._busy.acquire(blocking=False):
            try:
                while self._position < self._frontier:
                    self._step()
            finally:
                self._busy.release()

    def finish(self, stop: threading.Event | None = None) -> str:
        """Hash the rest and return the hexadecimal digest; of no use once `stop` is set."""
        with self._busy:
            while self._position < self.size and not (stop and stop.is_set()):
                self._step()
            return self._digest.hexdigest()

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _step(self) -> None:
        count = os.preadv(self._fd, [self._buffer[: self.size - self._position]], self._position)
        if not count:
            raise OSError(f"{self.path.name} became shorter while it was read")
        self._digest.update(self._buffer[:count])
        self._position += count


def hash_file(path: Path, stop: threading.Event | None = None) -> tuple[int, str]:
    """(size in bytes, hexadecimal sha256) of a file; the hash is of no use once `stop` is set."""
    hasher = FileHasher(path)
    try:
        return hasher.size, hasher.finish(stop)
    finally:
        hasher.close()
