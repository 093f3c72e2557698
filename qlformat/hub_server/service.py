"""One hub: its directory, its index, its contents, its tokens."""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass, field
from pathlib import Path

from qlformat.errors import QlfError
from qlformat.hub_server.blobs import Blobs, FileBlobs, Scratch
from qlformat.hub_server.changes import Changes
from qlformat.hub_server.database import Database
from qlformat.hub_server.index import Index
from qlformat.hub_server.limits import Limits
from qlformat.hub_server.refusals import disk_full
from qlformat.hub_server.tokens import Signer, Tokens
from qlformat.hub_server.xet import LocalStore, is_installed


@dataclass(frozen=True)
class Hub:
    """What the endpoints work with. Make one with `open_hub`."""

    root: Path
    limits: Limits
    blobs: Blobs
    scratch: Scratch
    index: Index
    changes: Changes
    tokens: Tokens
    signer: Signer
    xet: LocalStore | None
    database: Database = field(repr=False)
    uploads: dict[str, int] = field(default_factory=dict, repr=False)
    """Upload in parts -> how many of its parts are being received. Only the event loop's thread uses it."""

    def require_space(self, size: int) -> None:
        """Raise 507 unless so many bytes can be stored and some are left for the index."""
        if self.scratch.free() < size + self.limits.free:
            raise disk_full()


def open_hub(
    root: Path,
    *,
    token_file: Path | None = None,
    blobs: Blobs | None = None,
    limits: Limits | None = None,
    xet: bool = True,
) -> Hub:
    """Open the hub in a directory; made if it is missing.

    Args:
        root: holds index.sqlite, blobs/, tmp/, xet/ and the key of signed addresses.
        token_file: see qlformat.hub_server.tokens; without it, everyone who reaches the hub may do everything.
        blobs: where contents go; files below root by default.
        limits: what clients may send.
        xet: whether clients on this machine upload by the hf-xet package's local store below root. Downloads are
            plain HTTP, which is faster on one machine.

    Raises:
        QlfError: the directory cannot be used, or the file of tokens is wrong.
    """
    tokens = Tokens(token_file)
    limits = limits or Limits()
    try:
        root.mkdir(parents=True, exist_ok=True)
        root = root.resolve()
        os.chmod(root, 0o700)  # it holds private repositories
        scratch = Scratch(root / "tmp")
        signer = Signer(root / "key")
        store = blobs or FileBlobs(root / "blobs")
        database = Database(root / "index.sqlite")
    except OSError as error:
        raise _unusable(root, error) from None

    def read(sha256: str) -> bytes:
        return b"".join(store.chunks(sha256, 0, store.size(sha256) or 0))

    changes = Changes(database, store.size, read, limits.files)
    local = LocalStore(root / "xet") if xet and is_installed() else None
    return Hub(root, limits, store, scratch, Index(database), changes, tokens, signer, local, database)


def lock(root: Path) -> int:
    """Take the directory for this process; the lock is gone when the process is.

    Returns:
        The descriptor that holds it.

    Raises:
        QlfError: another server has it, or it cannot be made.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        handle = os.open(root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _unusable(root, error) from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise QlfError("another hub serves this directory; stop it or choose another --root", file=str(root)) from None
    return handle


def _unusable(root: Path, error: OSError) -> QlfError:
    reason = error.strerror or str(error)
    return QlfError(f"the hub's directory cannot be used: {reason}; choose another --root", file=str(root))
