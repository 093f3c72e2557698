"""The native CPU kernels (kernels/include/qlf/qlf.h) through ctypes. Bit-equal to `reference`, and the GIL is released.

Arrays are checked here for dtype, size, contiguity and overlap, so no call can reach memory outside them; a misuse is a
one-line `NativeError`. Environment: QLF_ISA (scalar, avx2, avx512 or neon), and what `native_library` reads.
"""

from __future__ import annotations

import ctypes
import operator
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from qlformat.errors import NativeError, SourceError
from qlformat.native_arrays import (
    DTYPES,
    Array,
    checked,
    choice,
    disjoint,
    float32_cell,
    integer,
    isa_level,
    levels_of,
    raise_for,
    storage,
)
from qlformat.native_library import available, library, why_unavailable

__all__ = [
    "NonFiniteError",
    "available",
    "default_threads",
    "dequantize",
    "dequantize_nested",
    "double_dequantize",
    "double_quantize",
    "isa_levels",
    "quantize",
    "squared_error",
    "transpose",
    "why_unavailable",
]

MAX_THREADS = 256
NESTED_BLOCKSIZE = 256

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]

_NOT_FINITE = 2
_QUANT_TYPES = {"nf4": 0, "fp4": 1}
_BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_CACHE_LINE = 64


class NonFiniteError(SourceError):
    """A NaN or infinity in the values to encode (rule E1); `block` is the index of the first block that holds one."""

    def __init__(self, block: int, blocksize: int) -> None:
        first = block * blocksize
        found = f"found a NaN or infinity among elements {first} to {first + blocksize - 1}"
        super().__init__(f"{found}, needed finite values; repair or skip the tensor", rule="E1")
        self.block = block


def isa_levels() -> list[str]:
    """Names of the instruction sets that this library and processor can run; "scalar" is always among them."""
    return levels_of(library())


def default_threads() -> int:
    """Processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return min(len(os.sched_getaffinity(0)), MAX_THREADS)
    return min(os.cpu_count() or 1, MAX_THREADS)


def _checked_blocksize(blocksize: Any) -> int:
    if integer("blocksize", blocksize, _BLOCKSIZES[0], _BLOCKSIZES[-1]) not in _BLOCKSIZES:
        raise NativeError(f"blocksize: found {blocksize!r}, needed one of {', '.join(map(str, _BLOCKSIZES))}")
    return operator.index(blocksize)


def _aligned(size: int, dtype: npt.DTypeLike) -> Array:
    """Uninitialized array on a cache-line boundary, where the kernels may use streaming stores."""
    nbytes = size * np.dtype(dtype).itemsize
    raw = np.empty(nbytes + _CACHE_LINE, dtype=np.uint8)
    start = -raw.__array_interface__["data"][0] % _CACHE_LINE
    return raw[start : start + nbytes].view(dtype)


def _blocks(n: int, blocksize: int) -> int:
    return -(-n // blocksize)


def quantize(
    src: Array,
    *,
    dtype: str,
    quant_type: str = "nf4",
    blocksize: int = 64,
    packed: U8 | None = None,
    absmax: F32 | None = None,
    moments: F32 | None = None,
    threads: int = 1,
    isa: str | None = None,
) -> tuple[U8, F32]:
    """Encode all n elements of `src` (spec section "Encoding").

    A tensor may be encoded in pieces that start at multiples of blocksize; the bytes are the same.

    Args:
        src: float32, float16, or uint16 holding the bits of `dtype`; any shape, C-contiguous.
        dtype: "float32", "float16" or "bfloat16".
        packed, absmax: uint8 [ceil(n/2)] and float32 [nb] to fill, nb = ceil(n/blocksize); allocated when None.
        moments: float32 [nb, 3] to fill with the sums of `reference.block_moments`, or None.
        threads: 1 to 256. The result does not depend on it.
        isa: "scalar", "avx2", "avx512", "neon"; None: QLF_ISA, or the best available.

    Returns:
        packed and absmax.

    Raises:
        NonFiniteError: a NaN or infinity (rule E1). The output arrays then hold anything.
        NativeError: unusable arguments, or no library.
    """
    kernels = library()
    blocksize = _checked_blocksize(blocksize)
    source = checked("src", src, storage(dtype), getattr(src, "size", 0))
    nb = _blocks(src.size, blocksize)
    packed = np.empty(_blocks(src.size, 2), dtype=np.uint8) if packed is None else packed
    absmax = np.empty(nb, dtype=np.float32) if absmax is None else absmax
    targets = [
        checked("packed", packed, (np.uint8,), _blocks(src.size, 2), writable=True),
        checked("absmax", absmax, (np.float32,), nb, writable=True),
        None if moments is None else checked("moments", moments, (np.float32,), 3 * nb, writable=True),
    ]
    disjoint([packed, absmax, *([] if moments is None else [moments])], [src])
    bad_block = ctypes.c_uint64()
    status = kernels.qlf_quantize(
        source,
        DTYPES[dtype],
        src.size,
        choice("quant_type", quant_type, _QUANT_TYPES),
        blocksize,
        *targets,
        ctypes.byref(bad_block),
        integer("threads", threads, 1, MAX_THREADS),
        isa_level(isa),
    )
    if status == _NOT_FINITE:
        raise NonFiniteError(bad_block.value, blocksize)
    raise_for(kernels, status)
    return packed, absmax


def _decode_target(n: int, dtype: str, out: Array | None, inputs: Sequence[Array]) -> tuple[Array, int]:
    out = _aligned(n, storage(dtype)[0]) if out is None else out
    address = checked("out", out, storage(dtype), n, writable=True)
    disjoint([out], inputs)
    return out, address


def dequantize(
    packed: U8,
    absmax: F32,
    n: int,
    *,
    quant_type: str = "nf4",
    blocksize: int = 64,
    dtype: str = "float32",
    out: Array | None = None,
    threads: int = 1,
    isa: str | None = None,
) -> Array:
    """Decode n elements (spec section "Decoding") from uint8 [ceil(n/2)] and float32 [ceil(n/blocksize)].

    To decode a piece that starts at a multiple of blocksize, pass that part of both arrays.

    Returns:
        `out`, or a new array [n]: float32, float16, or uint16 with the bits of bfloat16; rounded to nearest even.

    Raises:
        NativeError: unusable arguments, or no library.
    """
    kernels = library()
    n, blocksize = integer("n", n, 0), _checked_blocksize(blocksize)
    codes = checked("packed", packed, (np.uint8,), _blocks(n, 2))
    scales = checked("absmax", absmax, (np.float32,), _blocks(n, blocksize))
    out, target = _decode_target(n, dtype, out, [packed, absmax])
    status = kernels.qlf_dequantize(
        codes,
        scales,
        n,
        choice("quant_type", quant_type, _QUANT_TYPES),
        blocksize,
        DTYPES[dtype],
        target,
        integer("threads", threads, 1, MAX_THREADS),
        isa_level(isa),
    )
    raise_for(kernels, status)
    return out


def dequantize_nested(
    packed: U8,
    absmax: U8,
    nested_absmax: F32,
    nested_offset: float | np.float32,
    n: int,
    *,
    quant_type: str = "nf4",
    blocksize: int = 64,
    dtype: str = "float32",
    out: Array | None = None,
    first_block: int = 0,
    threads: int = 1,
    isa: str | None = None,
) -> Array:
    """Decode n elements whose absmax is double-quantized, both levels in one pass.

    Args:
        packed, absmax: uint8 [ceil(n/2)] and uint8 [nb], the piece to decode.
        nested_absmax: float32, the whole tensor's: at least ceil((first_block + nb) / 256).
        first_block: number of the piece's first block in the tensor.

    Returns, raises: as `dequantize`.
    """
    kernels = library()
    n, blocksize = integer("n", n, 0), _checked_blocksize(blocksize)
    first_block, nb = integer("first_block", first_block, 0), _blocks(n, blocksize)
    nested_size, needed = getattr(nested_absmax, "size", 0), _blocks(first_block + nb, NESTED_BLOCKSIZE)
    if nb and nested_size < needed:
        raise NativeError(f"nested_absmax: found {nested_size} elements, needed {needed} for first_block {first_block}")
    addresses = [
        checked("packed", packed, (np.uint8,), _blocks(n, 2)),
        checked("absmax", absmax, (np.uint8,), nb),
        checked("nested_absmax", nested_absmax, (np.float32,), nested_size),
    ]
    out, target = _decode_target(n, dtype, out, [packed, absmax, nested_absmax])
    offset = float32_cell("nested_offset", nested_offset)
    status = kernels.qlf_dequantize_nested(
        *addresses,
        offset.ctypes.data,
        first_block,
        n,
        choice("quant_type", quant_type, _QUANT_TYPES),
        blocksize,
        DTYPES[dtype],
        target,
        integer("threads", threads, 1, MAX_THREADS),
        isa_level(isa),
    )
    raise_for(kernels, status)
    return out


def double_quantize(absmax: F32, *, threads: int = 1) -> tuple[U8, F32, np.float32]:
    """Quantize absmax float32 [nb], nb >= 1, to uint8 codes [nb], nested_absmax float32 [ceil(nb/256)] and an offset.

    Raises:
        NonFiniteError: a NaN or infinity in absmax.
        NativeError: unusable arguments, or no library.
    """
    kernels = library()
    source = checked("absmax", absmax, (np.float32,), max(getattr(absmax, "size", 0), 1))
    codes = np.empty(absmax.size, dtype=np.uint8)
    nested = np.empty(_blocks(absmax.size, NESTED_BLOCKSIZE), dtype=np.float32)
    offset, bad = np.empty(1, dtype=np.float32), ctypes.c_uint64()
    status = kernels.qlf_double_quantize(
        source,
        absmax.size,
        codes.ctypes.data,
        nested.ctypes.data,
        offset.ctypes.data,
        ctypes.byref(bad),
        integer("threads", threads, 1, MAX_THREADS),
    )
    if status == _NOT_FINITE:
        raise NonFiniteError(bad.value, 1)
    raise_for(kernels, status)
    return codes, nested, offset[0]


def double_dequantize(codes: U8, nested_absmax: F32, offset: float | np.float32) -> F32:
    """Decode absmax float32 [nb] from uint8 codes [nb] and nested_absmax float32 [ceil(nb/256)].

    Raises:
        NativeError: unusable arguments, or no library.
    """
    kernels = library()
    source = checked("codes", codes, (np.uint8,), getattr(codes, "size", 0))
    nested = checked("nested_absmax", nested_absmax, (np.float32,), _blocks(codes.size, NESTED_BLOCKSIZE))
    absmax = np.empty(codes.size, dtype=np.float32)
    cell = float32_cell("offset", offset)
    raise_for(kernels, kernels.qlf_double_dequantize(source, nested, cell.ctypes.data, codes.size, absmax.ctypes.data))
    return absmax


def squared_error(absmax: F32, moments: F32, start: tuple[float, float] = (0.0, 0.0)) -> tuple[float, float]:
    """Squared error and squared norm of nb blocks, decoded absmax [nb] and moments [nb, 3], added in order to `start`.

    Raises:
        NativeError: unusable arguments, or no library.
    """
    kernels = library()
    scales = checked("absmax", absmax, (np.float32,), getattr(absmax, "size", 0))
    sums = checked("moments", moments, (np.float32,), 3 * absmax.size)
    error, signal = ctypes.c_double(start[0]), ctypes.c_double(start[1])
    raise_for(kernels, kernels.qlf_squared_error(scales, sums, absmax.size, ctypes.byref(error), ctypes.byref(signal)))
    return error.value, signal.value


def transpose(src: Array, *, out: Array | None = None, threads: int = 1) -> Array:
    """Transpose a C-contiguous [rows, cols] array of 2- or 4-byte elements into a new array (or `out`) [cols, rows].

    Raises:
        NativeError: unusable arguments, or no library.
    """
    kernels = library()
    if not isinstance(src, np.ndarray) or src.ndim != 2 or src.itemsize not in (2, 4):
        raise NativeError("src: needed a two-dimensional array of 2- or 4-byte elements")
    rows, cols = src.shape
    target = np.empty((cols, rows), dtype=src.dtype) if out is None else out
    source = checked("src", src, (src.dtype,), src.size)
    address = checked("out", target, (src.dtype,), src.size, writable=True)
    if target.shape != (cols, rows):
        raise NativeError(f"out: found shape {target.shape}, needed {(cols, rows)}")
    disjoint([target], [src])
    raise_for(
        kernels,
        kernels.qlf_transpose(source, rows, cols, src.itemsize, address, integer("threads", threads, 1, MAX_THREADS)),
    )
    return target
