"""The native kernels that convert between dtypes and add low-rank deltas, through ctypes; see `native`."""

from __future__ import annotations

import ctypes

import numpy as np

from qlformat.errors import NativeError
from qlformat.native_arrays import (
    DTYPES,
    F32,
    Array,
    checked,
    choice,
    disjoint,
    float32_cell,
    integer,
    isa_level,
    raise_for,
    storage,
)
from qlformat.native_library import library


def convert(values: Array, dtype: str, out: Array, target: str, *, isa: str | None = None) -> bool:
    """Write elements of `dtype` to `out` as `target`: nearest, ties to even, a NaN stays one.

    Args:
        values: C-contiguous float32, float16, or uint16 holding the bits of `dtype`.
        out: as many elements for `target`. It may be `values` itself where the sizes agree.

    Returns:
        Whether finite values became infinite as float16.

    Raises:
        NativeError: unusable arguments, or no library.
    """
    kernels = library()
    size = getattr(values, "size", 0)
    source = checked("values", values, storage(dtype), size)
    address = checked("out", out, storage(target), size, writable=True)
    _same_or_disjoint(out, values)
    overflowed = ctypes.c_int32()
    status = kernels.qlf_convert(
        source, DTYPES[dtype], size, address, choice("target", target, DTYPES), ctypes.byref(overflowed), isa_level(isa)
    )
    raise_for(kernels, status)
    return bool(overflowed.value)


def add_low_rank(
    base: Array,
    dtype: str,
    first: int,
    left: F32,
    right: F32,
    scale: float | np.float32,
    out: Array,
    target: str,
    *,
    isa: str | None = None,
) -> bool:
    """Write elements [first, first + n) of base + scale * (left @ right), taken in float32, to `out` as `target`.

    Each product starts at 0 and takes its terms in order, by one fused multiply-add each, so an element does not depend
    on the piece it is in.

    Args:
        base: the n elements, C-contiguous float32, float16, or uint16 holding the bits of `dtype`.
        first: index of the first one in the matrix.
        left: [rows, rank], of the whole matrix.
        right: [rank, columns].
        out: n elements for `target`. It may be `base` itself where the sizes agree.

    Returns:
        Whether finite values became infinite as float16.

    Raises:
        NativeError: unusable arguments, or no library.
    """
    kernels = library()
    if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0] or not right.size:
        raise NativeError(f"found shapes {left.shape} and {right.shape}, needed [rows, rank] and [rank, columns]")
    (rows, rank), columns = left.shape, right.shape[1]
    size = getattr(base, "size", 0)
    first = integer("first", first, 0, rows * columns - size)
    addresses = [
        checked("base", base, storage(dtype), size),
        checked("left", left, (np.float32,), left.size),
        checked("right", right, (np.float32,), right.size),
        checked("out", out, storage(target), size, writable=True),
    ]
    _same_or_disjoint(out, base)
    disjoint([out], [left, right])
    factor, overflowed = float32_cell("scale", scale), ctypes.c_int32()
    status = kernels.qlf_add_low_rank(
        addresses[0],
        DTYPES[dtype],
        columns,
        first,
        size,
        addresses[1],
        addresses[2],
        rank,
        factor.ctypes.data,
        addresses[3],
        choice("target", target, DTYPES),
        ctypes.byref(overflowed),
        isa_level(isa),
    )
    raise_for(kernels, status)
    return bool(overflowed.value)


def _same_or_disjoint(out: Array, values: Array) -> None:
    same = out.__array_interface__["data"][0] == values.__array_interface__["data"][0]
    if not (same and out.itemsize == values.itemsize):
        disjoint([out], [values])
