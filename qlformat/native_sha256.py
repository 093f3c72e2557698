"""sha256 of a file and of its parts in one pass, through ctypes; see kernels/cpu/sha256.cpp."""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from bisect import bisect_right
from collections.abc import Sequence

from qlformat.native_arrays import raise_for
from qlformat.native_library import library, load
from qlformat.workers import Stopped

_STATE_BYTES = 112
_DIGEST_BYTES = 32
_READ_FAILED = 4
_CALL_BYTES = 64 << 20
"""Hashed in one call, without Python's lock: whoever wants to stop waits for it."""


@functools.cache
def supported() -> bool:
    """Whether the library loads and the processor has the instructions."""
    found, _ = load()
    return found is not None and bool(found.qlf_sha256_supported())


def hash_parts(fd: int, ends: Sequence[int], stop: threading.Event) -> tuple[str, list[str]] | None:
    """Hash a file, and its parts.

    Args:
        fd: open for reading.
        ends: where each part ends, ascending; the first begins at 0, and the file ends with the last.
        stop: set it in another thread to give up.

    Returns:
        Hexadecimal sha256 of the file, and of each part; None when the file ends before its last part does.

    Raises:
        OSError: it cannot be read.
        Stopped: `stop` was set.
        NativeError: not `supported`.
    """
    kernels = library()
    whole, part = (ctypes.create_string_buffer(_STATE_BYTES) for _ in range(2))
    for state in (whole, part):
        raise_for(kernels, kernels.qlf_sha256_begin(state))
    places = (ctypes.c_uint64 * len(ends))(*ends)
    digests = ctypes.create_string_buffer(_DIGEST_BYTES * len(ends))
    size, done = ends[-1] if ends else 0, ctypes.c_uint64()
    position = ended = 0
    while ended < len(ends):
        if stop.is_set():
            raise Stopped
        limit = min(position + _CALL_BYTES, size)
        status = kernels.qlf_sha256_parts(
            whole, part, fd, position, limit, ctypes.byref(places, ended * 8), len(ends) - ended,
            ctypes.byref(digests, ended * _DIGEST_BYTES), ctypes.byref(done),
        )  # fmt: skip
        if status == _READ_FAILED:
            os.pread(fd, 1, position + done.value)  # for the system's words
            raise OSError("the file cannot be read")
        raise_for(kernels, status)
        if done.value < limit - position:
            return None
        position, ended = limit, bisect_right(ends, limit)
    last = ctypes.create_string_buffer(_DIGEST_BYTES)
    raise_for(kernels, kernels.qlf_sha256_end(whole, last))
    found = digests.raw.hex()
    return last.raw.hex(), [found[at : at + 64] for at in range(0, len(found), 64)]
