"""Make fresh memory present before it is written: many page faults in one system call, and huge pages where they pay.

The first write to a page of fresh memory enters the kernel, which finds a page and clears it. For large outputs that
costs more than decoding does. Nothing here changes what memory holds.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
import threading
import time
from collections.abc import Callable

_MADV_HUGEPAGE, _MADV_NOHUGEPAGE, _MADV_POPULATE_WRITE = 14, 15, 23

SLOW_SECONDS_PER_BYTE = 1e-9
"""Huge pages that take longer than this are given up: 2 MiB of present memory is cleared in 0.1 to 0.7 ms.

Where a virtual machine gives free memory back to its host (free page reporting), free huge pages are the first to go,
and each of their 512 parts is fetched again on its own: 3 to 6 ms, many times what ordinary pages cost.
"""


class FirstTouch:
    """Whether huge pages are fast here, found out while memory is populated; shared by the threads of one load."""

    def __init__(self, huge: bool = True) -> None:
        self.huge = huge

    def output(self, address: int, size: int) -> Output:
        """Get ready to populate `size` bytes of fresh, writable memory from `address` on."""
        return Output(self, address, size)


class Output:
    """A stretch of memory that threads populate piece by piece. On systems without the calls, it does nothing."""

    def __init__(self, policy: FirstTouch, address: int, size: int) -> None:
        self._policy = policy
        self._begin = address + -address % mmap.PAGESIZE  # only whole pages: others share theirs with a neighbour
        self._end = (address + size) // mmap.PAGESIZE * mmap.PAGESIZE
        self._huge: bool | None = None
        self._lock = threading.Lock()

    def populate(self, address: int, size: int) -> None:
        """Make the whole pages among `size` bytes from `address` on present; a failure is passed over."""
        advise = _madvise()
        first = max(self._begin, address // mmap.PAGESIZE * mmap.PAGESIZE)
        last = min(self._end, address + size + -(address + size) % mmap.PAGESIZE)
        if advise is None or first >= last:
            return
        huge = self._policy.huge
        with self._lock:
            if self._huge != huge:
                advise(self._begin, self._end - self._begin, _MADV_HUGEPAGE if huge else _MADV_NOHUGEPAGE)
                self._huge = huge
        started = time.perf_counter()
        advise(first, last - first, _MADV_POPULATE_WRITE)
        if huge and time.perf_counter() - started > (last - first) * SLOW_SECONDS_PER_BYTE:
            self._policy.huge = False


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """madvise(2) without the interpreter lock, which mmap.madvise keeps; None where its constants are others."""
    if sys.platform != "linux":
        return None
    call = ctypes.CDLL(None).madvise
    call.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    call.restype = ctypes.c_int

    def advise(address: int, size: int, advice: int) -> int:
        return int(call(address, size, advice))

    return advise
