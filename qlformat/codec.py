"""Quantize and dequantize arrays: the native kernels where they load, else the reference. The bits are the same.

bfloat16 elements travel as uint16 bits, since NumPy has no such type; float16 and float32 as themselves.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from qlformat import native, reference
from qlformat.codebook import DYNAMIC8
from qlformat.native import NonFiniteError

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
Array = npt.NDArray[Any]


def quantize(
    source: Array,
    *,
    dtype: str,
    quant_type: str,
    blocksize: int,
    packed: U8 | None = None,
    absmax: F32 | None = None,
    moments: F32 | None = None,
    threads: int = 1,
) -> tuple[U8, F32]:
    """Encode a flat array of weights.

    Args:
        source: [n] uint16 (bfloat16 bits), float16 or float32, C-contiguous.
        dtype: "bfloat16", "float16" or "float32".
        quant_type, blocksize: of the recipe.
        packed, absmax: outputs uint8 [ceil(n/2)] and float32 [ceil(n/blocksize)], allocated when None.
        moments: output float32 [blocks, 3] for the error figures (reference.block_moments), or None.
        threads: most threads to use; the result does not depend on it.

    Raises:
        NonFiniteError: rule E1; its `block` is the first one that holds NaN or infinity.
    """
    if native.available():
        return native.quantize(
            source, dtype=dtype, quant_type=quant_type, blocksize=blocksize,
            packed=packed, absmax=absmax, moments=moments, threads=threads,
        )  # fmt: skip
    values = reference.to_float32(source, dtype)
    finite = np.isfinite(values)
    if not finite.all():
        raise NonFiniteError(int(np.argmin(finite)) // blocksize, blocksize)
    codes, scales = reference.quantize(values, quant_type, blocksize)
    if moments is not None:
        moments[...] = reference.block_moments(values, codes, quant_type, blocksize)
    return codes if packed is None else _filled(packed, codes), scales if absmax is None else _filled(absmax, scales)


def dequantize(
    packed: U8,
    absmax: F32,
    n: int,
    *,
    quant_type: str,
    blocksize: int,
    dtype: str,
    out: Array | None = None,
    threads: int = 1,
) -> Array:
    """Decode n elements from packed codes and float32 absmax; returns [n] of `dtype`, in `out` when it is given."""
    if native.available():
        return native.dequantize(
            packed, absmax, n, quant_type=quant_type, blocksize=blocksize, dtype=dtype, out=out, threads=threads
        )
    decoded: Array = reference.from_float32(reference.dequantize(packed, absmax, n, quant_type, blocksize), dtype)
    return decoded if out is None else _filled(out, decoded)


def dequantize_nested(
    packed: U8,
    codes: U8,
    nested_absmax: F32,
    nested_offset: float,
    n: int,
    *,
    quant_type: str,
    blocksize: int,
    dtype: str,
    out: Array | None = None,
    first_block: int = 0,
    threads: int = 1,
) -> Array:
    """Decode both levels of a double-quantized tensor, or of a run of its blocks.

    Args:
        packed: codes of the n elements wanted, which begin with a block.
        codes: uint8, 8-bit absmax codes of the blocks wanted.
        nested_absmax: float32, of the whole tensor.
        nested_offset: of the quant_state.
        n: element count wanted.
        first_block: index in the whole tensor of the first block wanted.
    """
    if native.available():
        return native.dequantize_nested(
            packed, codes, nested_absmax, np.float32(nested_offset), n, quant_type=quant_type, blocksize=blocksize,
            dtype=dtype, out=out, first_block=first_block, threads=threads,
        )  # fmt: skip
    blocks = reference.block_count(n, blocksize)
    groups = (first_block + np.arange(blocks)) // reference.NESTED_BLOCKSIZE
    absmax = DYNAMIC8[codes[:blocks]] * nested_absmax[groups] + np.float32(nested_offset)
    decoded: Array = reference.from_float32(reference.dequantize(packed, absmax, n, quant_type, blocksize), dtype)
    return decoded if out is None else _filled(out, decoded)


def double_quantize(absmax: F32) -> tuple[U8, F32, np.float32]:
    """8-bit codes, nested_absmax and nested_offset of the absmax of a whole tensor."""
    return native.double_quantize(absmax) if native.available() else reference.double_quantize(absmax)


def double_dequantize(codes: U8, nested_absmax: F32, nested_offset: np.float32) -> F32:
    """float32 absmax of a whole tensor from its double-quantized form."""
    if native.available():
        return native.double_dequantize(codes, nested_absmax, nested_offset)
    return reference.double_dequantize(codes, nested_absmax, nested_offset)


def squared_error(absmax: F32, moments: F32, start: tuple[float, float] = (0.0, 0.0)) -> tuple[float, float]:
    """Squared error and squared norm of a tensor, added to those of the blocks before (reference.squared_error)."""
    if native.available():
        return native.squared_error(absmax, moments, start)
    return reference.squared_error(absmax, moments, start)


def transpose(matrix: Array) -> Array:
    """A contiguous copy of the transposed matrix."""
    return native.transpose(matrix) if native.available() else np.ascontiguousarray(matrix.T)


def _filled(out: Array, values: Array) -> Array:
    out[...] = values
    return out
