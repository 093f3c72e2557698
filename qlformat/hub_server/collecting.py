"""Garbage collection: contents that no commit of any repository has."""

from __future__ import annotations

import time
from dataclasses import dataclass

from qlformat.hub_server.service import Hub

_BATCH = 100


@dataclass(frozen=True)
class Collected:
    """What was removed, in contents and bytes, and what is left."""

    removed: int
    removed_bytes: int
    kept: int
    kept_bytes: int


def collect(hub: Hub, *, older_than: float = 24 * 3600.0, dry_run: bool = False) -> Collected:
    """Remove the contents that no commit has. A running server is not disturbed.

    Args:
        hub: the hub.
        older_than: seconds; what came in or was asked for since then stays, since a commit may be about to name it.
        dry_run: remove nothing.
    """
    before = time.time() - older_than
    stored = list(hub.blobs.stored())
    old = [(sha256, size) for sha256, size, when in stored if when <= before]
    removed = removed_bytes = 0
    for start in range(0, len(old), _BATCH):
        # A commit looks whether its contents are there in a transaction as well: the two never overlap.
        with hub.database.transaction() as db:
            for sha256, size in old[start : start + _BATCH]:
                if db.execute("SELECT 1 FROM entries WHERE sha256 = ? LIMIT 1", (sha256,)).fetchone():
                    continue
                if not dry_run:
                    hub.blobs.delete(sha256)
                removed, removed_bytes = removed + 1, removed_bytes + size
    if hub.xet is not None and not dry_run:
        hub.xet.clean(older_than)
    kept_bytes = sum(size for _, size, _ in stored) - removed_bytes
    return Collected(removed, removed_bytes, len(stored) - removed, kept_bytes)
