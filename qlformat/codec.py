"""Quantize and dequantize arrays: the native kernels where they load, else the reference. The bits are the same.

bfloat16 elements travel as uint16 bits, since NumPy has no such type; float16 and float32 as themselves.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from qlformat import native, reference
from qlformat.codebook import DYNAMIC8
from qlformat.errors import SourceError

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
AnyArray = npt.NDArray[np.generic]


class NonFiniteError(SourceError):
    """A weight holds NaN or infinity (rule E1); `block` is the first block of the array that does."""

    def __init__(self, block: int) -> None:
        super().__init__(
            "found NaN or infinity, needed finite values; repair the source or skip this tensor", rule="E1"
        )
        self.block = block


def quantize(
    source: AnyArray,
    *,
    dtype: str,
    quant_type: str,
    blocksize: int,
    packed: U8 | None = None,
    absmax: F32 | None = None,
    moments: F32 | Literal[False] = False,
    threads: int = 1,
) -> tuple[U8, F32]:
    """Encode a flat array of weights.

    Args:
        source: [n] uint16 (bfloat16 bits), float16 or float32, C-contiguous.
        dtype: "bfloat16", "float16" or "float32".
        quant_type, blocksize: of the recipe.
        packed, absmax: outputs uint8 [ceil(n/2)] and float32 [ceil(n/blocksize)], allocated when None.
        moments: output float32 [blocks, 3] for the error figures, or False to leave them out.
        threads: most threads to use; the result does not depend on it.

    Raises:
        NonFiniteError: rule E1.
    """
    if native.available():
        try:
            return native.quantize(
                source, dtype=dtype, quant_type=quant_type, blocksize=blocksize,
                packed=packed, absmax=absmax, moments=moments, threads=threads,
            )  # fmt: skip
        except native.NonFiniteBlock as error:
            raise NonFiniteError(error.block) from None
    values = reference.to_float32(source, dtype)
    finite = np.isfinite(values)
    if not finite.all():
        raise NonFiniteError(int(np.argmin(finite)) // blocksize)
    codes, scales = reference.quantize(values, quant_type, blocksize)
    if moments is not False:
        moments[...] = reference.block_moments(values, codes, quant_type, blocksize)
    return _into(packed, codes), _into(absmax, scales)


def dequantize(
    packed: U8,
    absmax: F32,
    n: int,
    *,
    quant_type: str,
    blocksize: int,
    dtype: str,
    out: AnyArray | None = None,
    threads: int = 1,
) -> AnyArray:
    """Decode n elements from packed codes and float32 absmax; returns [n] of `dtype`, in `out` when it is given."""
    if native.available():
        return native.dequantize(
            packed, absmax, n, quant_type=quant_type, blocksize=blocksize, dtype=dtype, out=out, threads=threads
        )
    return _into(out, reference.from_float32(reference.dequantize(packed, absmax, n, quant_type, blocksize), dtype))


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
    out: AnyArray | None = None,
    first_block: int = 0,
    threads: int = 1,
) -> AnyArray:
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
    return _into(out, reference.from_float32(reference.dequantize(packed, absmax, n, quant_type, blocksize), dtype))


def double_quantize(absmax: F32) -> tuple[U8, F32, np.float32]:
    """8-bit codes, nested_absmax and nested_offset of the absmax of a whole tensor."""
    return native.double_quantize(absmax) if native.available() else reference.double_quantize(absmax)


def double_dequantize(codes: U8, nested_absmax: F32, nested_offset: np.float32) -> F32:
    """float32 absmax of a whole tensor from its double-quantized form."""
    if native.available():
        return native.double_dequantize(codes, nested_absmax, nested_offset)
    return reference.double_dequantize(codes, nested_absmax, nested_offset)


def squared_error(absmax: F32, moments: F32) -> tuple[float, float]:
    """Squared error and squared norm of a tensor (reference.squared_error)."""
    return native.squared_error(absmax, moments) if native.available() else reference.squared_error(absmax, moments)


def transpose(matrix: AnyArray) -> AnyArray:
    """A contiguous copy of the transposed matrix."""
    return native.transpose(matrix) if native.available() else np.ascontiguousarray(matrix.T)


def _into(out: Any, values: Any) -> Any:
    if out is None:
        return values
    out[...] = values
    return out
