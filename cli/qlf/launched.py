"""One run in several processes, started by torchrun or accelerate: who speaks, and nobody is left waiting."""

from __future__ import annotations

import os
import threading
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import TCPStore

_GRACE = 5.0
"""Seconds that a process has to end by itself after another one failed."""


def alone() -> bool:
    """Whether the run has no other process."""
    return int(os.environ.get("WORLD_SIZE", "1")) < 2


def main_process() -> bool:
    """Whether this process prints: it is alone, or the first."""
    return int(os.environ.get("RANK", "0")) == 0


def _store() -> TCPStore | None:
    """The launcher's own key-value store, which outlives the processes; None without a launcher that has one."""
    if alone() or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    from torch.distributed import TCPStore

    try:
        return TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
            timeout=timedelta(seconds=_GRACE), wait_for_workers=False,
        )  # fmt: skip
    except (KeyError, ValueError, RuntimeError):
        return None


def _key() -> str:
    return f"qlf/ended/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def first_to_end() -> bool:
    """Whether no other process of the run ended with an error before: its line is the one that says why.

    The lines of the others would only say that the connection was lost.
    """
    store = _store()
    try:
        return store is None or store.add(_key(), 1) == 1
    except RuntimeError:
        return True


def another_ended() -> bool:
    """Whether a process of the run ended with an error."""
    store = _store()
    try:
        return store is not None and store.check([_key()])
    except RuntimeError:
        return True  # the launcher is gone


def end_with_the_others() -> None:
    """End this process when another one has failed: it may wait for that one in a collective operation forever."""
    store = _store()
    if store is not None:
        threading.Thread(target=_watch, args=(store,), daemon=True).start()


def _watch(store: TCPStore) -> None:
    try:
        store.wait([_key()], timedelta(days=365))
    except RuntimeError:
        return
    threading.Event().wait(_GRACE)
    os._exit(1)
