"""Conversions and low-rank deltas on flat pieces of weights: the native kernels where they load, else NumPy.

The bits are the same. bfloat16 elements travel as uint16 bits.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qlformat import native, native_merge
from qlformat.casting import cast_into
from qlformat.checkpoint import AnyArray

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]


def convert(values: AnyArray, dtype: str, out: AnyArray, target: str) -> bool:
    """Write elements of `dtype` to `out` as `target`, nearest with ties to even; whether finite ones became infinite.

    Args:
        values: flat.
        out: as many.
    """
    if native.available():
        return native_merge.convert(values, dtype, out, target)
    with np.errstate(over="ignore"):
        cast_into(values, dtype, out, target)
    if target != "float16" or dtype == "float16":
        return False
    return bool((np.isinf(out) & np.isfinite(_as_float32(values, dtype))).any())


def add_low_rank(
    base: AnyArray, dtype: str, first: int, left: F32, right: F32, scale: float, out: AnyArray, target: str
) -> bool:
    """Write elements [first, first + n) of base + scale * (left @ right), in float32, to `out` as `target`.

    A product starts at 0 and takes its terms in order, by one fused multiply-add each, so that an element does not
    depend on the piece it is in, nor on the processor. Up to rank 4 that is what BLAS gives, too.

    Args:
        base: the n elements, flat.
        first: index of the first one in the matrix.
        left: [rows, rank] of the whole matrix, contiguous.
        right: [rank, columns], contiguous.
        out: n elements; `base` itself where the sizes agree.

    Returns:
        Whether finite values became infinite as float16.
    """
    if native.available():
        return native_merge.add_low_rank(base, dtype, first, left, right, scale, out, target)
    columns = right.shape[1]
    begin, end = first // columns, -(-(first + base.size) // columns)
    delta = product(left[begin:end], right, scale).reshape(-1)
    skipped = first - begin * columns
    merged = _as_float32(base, dtype) + delta[skipped : skipped + base.size]
    return convert(merged, "float32", out, target)


def product(left: F32, right: F32, scale: float) -> F32:
    """scale * (left @ right) as `add_low_rank` has it: [rows, columns]."""
    found = np.zeros((left.shape[0], right.shape[1]), dtype=np.float32)
    if native.available():
        if found.size:
            native_merge.add_low_rank(found, "float32", 0, left, right, scale, found, "float32")
        return found
    for column, row in zip(left.T, right, strict=True):
        found = _fused(column[:, None].astype(np.float64) * row, found)
    found *= np.float32(scale)
    return found


def _fused(exact: F64, addend: F32) -> F32:
    """exact + addend, rounded once; `exact` is a product of two float32, which a float64 holds.

    The sum is rounded to odd in float64: where it is inexact, to the neighbour whose last bit is 1. Rounding that to
    float32 gives what one rounding would.
    """
    wide = addend.astype(np.float64)
    total = exact + wide
    part = total - exact
    error = (exact - (total - part)) + (wide - part)
    bits = total.view(np.int64)
    even = np.isfinite(total) & (error != 0) & (bits & 1 == 0)
    bits[even] += np.where((error > 0) == (total > 0), 1, -1)[even]
    with np.errstate(over="ignore"):
        return total.astype(np.float32)


def _as_float32(values: AnyArray, dtype: str) -> F32:
    out = np.empty(values.size, dtype=np.float32)
    cast_into(values, dtype, out, "float32")
    return out
