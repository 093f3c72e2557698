"""float32 to float16 in whole-array integer steps: NumPy's own conversion takes one element at a time."""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt

BLOCK_ELEMENTS = 1 << 15
"""Elements at a time, so that the steps in between stay in the cache."""

_SIGNLESS = np.uint32(0x7FFFFFFF)
_TOO_LARGE = np.uint32(0x477FF000)  # 65520: it and all above round to infinity
_NORMAL = np.uint32(0x38800000)  # 2^-14, the least normal float16
_HALF = np.uint32(0x3F000000)  # 0.5, whose unit in the last place is that of a subnormal float16
_REBIAS = np.uint32(0xC8000FFF)  # the other exponent bias, and just less than half a unit

_local = threading.local()


def to_float16(values: npt.NDArray[np.float32], out: npt.NDArray[np.float16]) -> bool:
    """Write `values` to `out`, nearest with ties to even, as `astype` does; returns whether finite ones overflowed.

    Args:
        values: flat.
        out: as many.
    """
    overflowed = False
    for first in range(0, values.size, BLOCK_ELEMENTS):
        part, into = values[first : first + BLOCK_ELEMENTS], out[first : first + BLOCK_ELEMENTS]
        if not _block(part, into.view(np.uint16)):
            with np.errstate(over="ignore"):
                into[...] = part
            overflowed |= bool((np.isinf(into) & np.isfinite(part)).any())
    return overflowed


def _block(values: npt.NDArray[np.float32], out: npt.NDArray[np.uint16]) -> bool:
    """False, and nothing written, when one is too large, infinite or NaN."""
    if not hasattr(_local, "words"):
        _local.words = np.empty((3, BLOCK_ELEMENTS), dtype=np.uint32)
        _local.mask = np.empty(BLOCK_ELEMENTS, dtype=np.bool_)
    bits, mask = values.view(np.uint32), _local.mask[: values.size]
    size, small, normal = (row[: values.size] for row in _local.words)
    np.bitwise_and(bits, _SIGNLESS, out=size)
    if size.max() >= _TOO_LARGE:
        return False
    np.add(size.view(np.float32), np.float32(0.5), out=small.view(np.float32))  # rounds to the units of a subnormal
    small -= _HALF
    np.right_shift(size, 13, out=normal)  # ties to even: half a unit less one, plus the last bit that stays
    normal &= np.uint32(1)
    normal += size
    normal += _REBIAS
    normal >>= np.uint32(13)
    np.less(size, _NORMAL, out=mask)
    np.copyto(normal, small, where=mask)
    np.right_shift(bits, 16, out=size)
    size &= np.uint32(0x8000)
    normal |= size
    np.copyto(out, normal, casting="unsafe")
    return True
