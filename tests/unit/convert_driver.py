"""Run a conversion in a process of its own that ends, or fails, at a chosen system call.

Usage: convert_driver.py SRC OUT {kill|enospc|none} CALL [option...]
The CALL-th call among those that write, flush, rename or delete is where SIGKILL or ENOSPC strikes.
Prints the number of such calls when it gets to the end, or the error's class and text.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from qlformat.converter import convert
from qlformat.errors import QlfError

WATCHED = ("pwrite", "write", "fsync", "rename", "unlink", "ftruncate", "mkdir")
COUNTED_FOR_DISK_FULL = ("pwrite", "write", "fsync", "ftruncate")


def strike(kind: str, call: int) -> list[int]:
    """Patch the os functions; returns the counter."""
    count = [0]
    lock = threading.Lock()

    def watched(function: Callable[..., Any], counts: bool) -> Callable[..., Any]:
        def replacement(*args: Any, **kwargs: Any) -> Any:
            if counts:
                with lock:
                    count[0] += 1
                    now = count[0]
                if now == call and kind == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                if now >= call and kind == "enospc":
                    raise OSError(errno.ENOSPC, "No space left on device")
            return function(*args, **kwargs)

        return replacement

    for name in WATCHED:
        setattr(os, name, watched(getattr(os, name), kind != "enospc" or name in COUNTED_FOR_DISK_FULL))
    return count


def main() -> int:
    """Convert, and say how it ended."""
    source, out, kind, call, *options = sys.argv[1:]
    count = strike(kind, int(call))
    try:
        convert(source, out, threads=2, shard_size=40_000, resume="resume" in options, overwrite="overwrite" in options)
    except QlfError as error:
        print(type(error).__name__, error)
        return 1
    print(count[0])
    return 0


if __name__ == "__main__":
    sys.exit(main())
