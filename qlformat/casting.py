"""Elements of one dtype as another, at the speed of memory: the twin of `checkpoint.cast`, with the same bits."""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

from qlformat.checkpoint import NUMPY_DTYPES, AnyArray, cast

BLOCK_ELEMENTS = 1 << 15
"""Elements converted at a time, so that what is in between stays in the cache."""

_HALVES = ("float16", "bfloat16")


def cast_into(values: AnyArray, source: str, out: AnyArray, target: str) -> None:
    """Write elements of torch dtype `source` to `out` as `target`: nearest, ties to even, NaN stays NaN.

    Args:
        values: flat, NumPy dtype NUMPY_DTYPES[source].
        out: as many elements of NUMPY_DTYPES[target].
    """
    if source == target:
        out[...] = values
        return
    for first in range(0, values.size, BLOCK_ELEMENTS):
        part, into = values[first : first + BLOCK_ELEMENTS], out[first : first + BLOCK_ELEMENTS]
        if source in _HALVES:  # "clip" only spares a copy of `out`: every index is in the table
            np.take(_table(source, target), part.view(np.uint16), out=into, mode="clip")
        elif (source, target) == ("float32", "bfloat16"):
            _round_to_bfloat16(part.view(np.uint32), into.view(np.uint16))
        else:
            into[...] = cast(part, source, target)


@functools.cache
def _table(source: str, target: str) -> AnyArray:
    """All 65,536 values of a 16-bit dtype in another dtype."""
    return cast(np.arange(1 << 16, dtype=np.uint16).view(NUMPY_DTYPES[source]), source, target)


def _round_to_bfloat16(bits: npt.NDArray[np.uint32], out: npt.NDArray[np.uint16]) -> None:
    rounded = bits >> np.uint32(16)
    rounded &= np.uint32(1)
    rounded += np.uint32(0x7FFF)
    rounded += bits
    rounded >>= np.uint32(16)
    out[...] = rounded
    nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    if nan.any():
        out[nan] = 0x7FC0
