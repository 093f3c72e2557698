"""The hf-xet package's store in a local directory: uploads of clients on this machine in deduplicated chunks.

The clients write into the directory themselves. What they commit is taken out of it again, checked against its sha256,
and kept like every other content; the store is only what later uploads are compared with.

One process at a time can have such a store open. So every upload gets a directory of its own, a view: the chunks
(xorbs) are shared by all views, and a new view knows the chunks that the others have (their shard caches).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import importlib.util
import os
import secrets
import shutil
import struct
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from qlformat.hub_server.applying import Add
from qlformat.hub_server.blobs import Blobs, Scratch
from qlformat.hub_server.refusals import Refused, shown

_MAGIC = b"HFRepoMetaData\0"
_HEADER = struct.Struct("<32sQQ")
_FILE = struct.Struct("<32sII8x")
_RECORD = 48
_WITH_VERIFICATION, _WITH_SHA256 = 1 << 31, 1 << 30
_END = b"\xff" * 32
_DATABASE = Path("xet", "xorbs", "global_dedup_lookup.redb")
_SHARDS = Path("xet", "xorbs", "shards")
_ATTEMPTS = 4


def is_installed() -> bool:
    """Whether the hf-xet package is there."""
    return importlib.util.find_spec("hf_xet") is not None


class LocalStore:
    """The store in a directory.

    Args:
        directory: made if it is missing.
    """

    KEEP_SECONDS = 24 * 3600.0

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._hashes: dict[str, tuple[str, Path]] = {}
        self._read: set[Path] = set()
        self._lock = threading.Lock()
        self._session: Any = None
        self._prepare()

    def clean(self, keep_seconds: float = KEEP_SECONDS) -> None:
        """Remove the views that are older and not open; once there are none, the chunks too."""
        for view in self._views.iterdir():
            if view.stat().st_mtime <= time.time() - keep_seconds and not _is_open(view):
                shutil.rmtree(view, ignore_errors=True)
        if not any(self._views.iterdir()):
            shutil.rmtree(self._directory, ignore_errors=True)
            self._prepare()

    def _prepare(self) -> None:
        self._views = self._directory / "views"
        self._chunks = self._directory / "xorbs"
        for folder in (self._views, self._chunks):
            folder.mkdir(parents=True, exist_ok=True)

    def new_view(self) -> str:
        """The address of a view for one upload."""
        with self._lock:
            self._prepare()
            view = self._views / secrets.token_hex(8)
            self._lay_out(view)
            (view / _SHARDS).mkdir()
            for shard in self._views.glob("*/xet/shard-cache/*.mdb"):
                with contextlib.suppress(FileExistsError, FileNotFoundError):
                    os.link(shard, view / "xet" / "shard-cache" / shard.name)
        return f"local://{view}"

    def _lay_out(self, view: Path) -> None:
        (view / "xet" / "shard-cache").mkdir(parents=True)
        (view / "xet" / "xorbs").mkdir()
        (view / "xet" / "xorbs" / "xorbs").symlink_to(self._chunks)

    def take_over(self, files: Sequence[Add], blobs: Blobs, scratch: Scratch) -> None:
        """Keep the contents that are in this store and nowhere else yet.

        Raises:
            Refused: 503 if a content cannot be read back as it was announced. The store is emptied then, so that the
                next upload does not build on what is broken.
        """
        for file in files:
            if blobs.size(file.sha256) is None and (found := self._find(file.sha256)) is not None:
                target = scratch.new()
                try:
                    if not self._copied(*found, file, target):
                        self._forget()
                        raise Refused(
                            503, f"{shown(file.path)} cannot be read back from the local xet store; upload it again"
                        )
                    blobs.put(target, file.sha256)
                finally:
                    target.unlink(missing_ok=True)

    def _find(self, sha256: str) -> tuple[str, Path] | None:
        """The store's own hash of a content, and the view that has it."""
        with self._lock:
            if sha256 not in self._hashes:
                for shard in sorted(self._views.glob("*/xet/xorbs/shards/*.mdb")):
                    if shard not in self._read:
                        self._read.add(shard)
                        self._hashes.update({sha: (hash_, shard.parents[3]) for sha, hash_ in contents_of(shard)})
            return self._hashes.get(sha256)

    def _copied(self, hash_: str, view: Path, file: Add, target: Path) -> bool:
        """Write a content to a file; returns whether it is what was announced."""
        import hf_xet

        with self._lock:
            self._session = self._session or hf_xet.XetSession()
        for attempt in range(_ATTEMPTS):
            reading = Path(tempfile.mkdtemp(dir=self._directory))
            digest = hashlib.sha256()
            try:
                self._lay_out(reading)
                (reading / _SHARDS).symlink_to(view / _SHARDS)
                # The client has its database open; a copy made during a write does not open, or lacks the file.
                shutil.copy(view / _DATABASE, reading / _DATABASE)
                group = self._session.new_download_stream_group(endpoint=f"local://{reading}")
                with target.open("wb") as out:
                    for chunk in group.download_stream(hf_xet.XetFileInfo(hash_, file.size)):
                        digest.update(chunk)
                        out.write(chunk)
            except (OSError, RuntimeError) as error:
                if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                    raise
                digest = hashlib.sha256(b"unreadable")
            finally:
                shutil.rmtree(reading, ignore_errors=True)
            if digest.hexdigest() == file.sha256:
                return True
            time.sleep(0.1 * attempt)
        return False

    def _forget(self) -> None:
        with self._lock:
            shutil.rmtree(self._views, ignore_errors=True)
            self._hashes.clear()
            self._read.clear()
            self._prepare()


def _is_open(view: Path) -> bool:
    """Whether a client has the view's database open."""
    try:
        with (view / _DATABASE).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


def contents_of(shard: Path) -> Iterator[tuple[str, str]]:
    """(sha256, hash) of the files that a shard of metadata describes; nothing for what is no shard.

    The layout is hf-xet's "MDB shard", version 2: a header, then for every file a record with its hash, flags and the
    number of its segments, the segments, their verification, and the sha256.
    """
    with shard.open("rb") as file:
        head = file.read(_HEADER.size)
        if len(head) < _HEADER.size or not head.startswith(_MAGIC) or _HEADER.unpack(head)[1] != 2:
            return
        yield from _records(file)


def _records(file: BinaryIO) -> Iterator[tuple[str, str]]:
    while len(record := file.read(_RECORD)) == _RECORD:
        hash_, flags, segments = _FILE.unpack(record)
        if hash_ == _END:
            return
        file.seek(segments * _RECORD * (2 if flags & _WITH_VERIFICATION else 1), 1)
        if flags & _WITH_SHA256:
            yield _hex(file.read(_RECORD)[:32]), _hex(hash_)


def _hex(hash_: bytes) -> str:
    """The store writes hashes as four little-endian numbers, and shows each as hexadecimal."""
    return b"".join(hash_[at : at + 8][::-1] for at in range(0, 32, 8)).hex()
