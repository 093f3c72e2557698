"""The slow, obvious encoder and decoder. It reads like spec/format.md; every fast path must give the same bits.

All arithmetic is float32, one rounding per step, as the numbered steps of the spec say. Nothing is flushed to zero.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qlformat.codebook import CODEBOOKS, DYNAMIC8, DYNAMIC8_THRESHOLDS

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]

NESTED_BLOCKSIZE = 256
SMALLEST_DIVISOR = np.float32(1e-38)
"""Reciprocals are taken of at least this: 1 / 1e-38 is finite, 1 / 0 is not."""
LANES = 16
ONE = np.float32(1)


def to_float32(values: npt.NDArray[np.generic], dtype: str) -> F32:
    """Widen source elements exactly. bfloat16 comes as uint16 bits; the others as their NumPy dtype."""
    if dtype == "bfloat16":
        wide: F32 = (values.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
        return wide
    return values.astype(np.float32)


def from_float32(values: F32, dtype: str) -> npt.NDArray[np.generic]:
    """Narrow float32 to the nearest value, ties to even. bfloat16 is returned as uint16 bits."""
    if dtype == "bfloat16":
        bits = values.view(np.uint32).astype(np.uint64)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    with np.errstate(over="ignore"):  # beyond float16's range the nearest value is infinity
        return values.astype(np.dtype(dtype))


def block_count(n: int, blocksize: int) -> int:
    """Blocks of `blocksize` that cover n elements; the last one may be ragged."""
    return -(-n // blocksize)


def quantize(x: F32, quant_type: str, blocksize: int) -> tuple[U8, F32]:
    """Encode one tensor (spec section "Encoding").

    Args:
        x: float32 [n], finite, the weight flattened row-major.
        quant_type: "nf4" or "fp4".
        blocksize: elements that share one absmax.

    Returns:
        packed uint8 [ceil(n/2)] and absmax float32 [ceil(n/blocksize)].
    """
    book = CODEBOOKS[quant_type]
    codes = np.empty(x.size + x.size % 2, dtype=np.uint8)
    absmax = np.empty(block_count(x.size, blocksize), dtype=np.float32)
    for block in range(absmax.size):
        values = x[block * blocksize : (block + 1) * blocksize]
        largest = np.abs(values).max()
        if values.size == blocksize:
            scaled = values * (ONE / max(largest, SMALLEST_DIVISOR))
        else:  # the ragged tail divides, and stores the divisor: what bitsandbytes' CPU path does
            largest = max(largest, SMALLEST_DIVISOR)
            scaled = values / largest
        absmax[block] = largest
        rank = np.searchsorted(book.thresholds, np.clip(scaled, -ONE, ONE), side="left")
        codes[block * blocksize : block * blocksize + values.size] = book.order[rank]
    if x.size % 2:
        codes[-1] = book.zero_code
    return (codes[0::2] << np.uint8(4)) | codes[1::2], absmax


def unpack(packed: U8, n: int) -> U8:
    """The n codes of a packed tensor: the high nibble comes first."""
    codes = np.empty(packed.size * 2, dtype=np.uint8)
    codes[0::2] = packed >> 4
    codes[1::2] = packed & 0xF
    return codes[:n]


def dequantize(packed: U8, absmax: F32, n: int, quant_type: str, blocksize: int) -> F32:
    """Decode n elements to float32: one multiplication, rounded once (spec section "Decoding")."""
    values = CODEBOOKS[quant_type].values[unpack(packed, n)]
    return values * np.repeat(absmax, blocksize)[:n]


def nested_offset(absmax: F32) -> np.float32:
    """Mean of absmax: float64 sums of 256 in index order, those summed in index order, rounded once to float32."""
    partial = [
        np.cumsum(absmax[i : i + NESTED_BLOCKSIZE], dtype=np.float64)[-1]
        for i in range(0, absmax.size, NESTED_BLOCKSIZE)
    ]
    return np.float32(np.cumsum(partial)[-1] / np.float64(absmax.size))


def double_quantize(absmax: F32) -> tuple[U8, F32, np.float32]:
    """Quantize the absmax of a tensor to 8 bits in blocks of 256 (paper section 3, "Double Quantization").

    Args:
        absmax: float32 [blocks], at least one.

    Returns:
        codes uint8 [blocks], nested_absmax float32 [ceil(blocks/256)] and nested_offset.
    """
    offset = nested_offset(absmax)
    residual = absmax - offset
    codes = np.zeros(absmax.size, dtype=np.uint8)
    nested = np.empty(block_count(absmax.size, NESTED_BLOCKSIZE), dtype=np.float32)
    for block in range(nested.size):
        span = slice(block * NESTED_BLOCKSIZE, (block + 1) * NESTED_BLOCKSIZE)
        nested[block] = np.abs(residual[span]).max()
        if nested[block] != 0:
            scaled = residual[span] * (ONE / max(nested[block], SMALLEST_DIVISOR))
            codes[span] = np.searchsorted(DYNAMIC8_THRESHOLDS, np.clip(scaled, -ONE, ONE), side="left")
    return codes, nested, offset


def double_dequantize(codes: U8, nested_absmax: F32, offset: np.float32) -> F32:
    """Decode absmax: a rounded multiplication, then a rounded addition (never fused)."""
    scaled = DYNAMIC8[codes] * np.repeat(nested_absmax, NESTED_BLOCKSIZE)[: codes.size]
    return scaled + offset


def block_moments(x: F32, packed: U8, quant_type: str, blocksize: int) -> F32:
    """Sums behind the error figures of the manifest, float32 [blocks, 3]: x*x, x*c and c*c with c the code's value.

    Sixteen lanes, each adding every sixteenth element of the block in order; the lanes are folded in halves. A SIMD
    kernel of any width up to sixteen can follow that order, so the figures are the same bits everywhere.
    """
    blocks = block_count(x.size, blocksize)
    padded = np.zeros((2, blocks * blocksize), dtype=np.float32)
    padded[0, : x.size] = x
    padded[1, : x.size] = CODEBOOKS[quant_type].values[unpack(packed, x.size)]
    value, code = padded.reshape(2, blocks, blocksize // LANES, LANES)
    moments = np.empty((blocks, 3), dtype=np.float32)
    for column, product in enumerate((value * value, value * code, code * code)):
        lanes = np.zeros((blocks, LANES), dtype=np.float32)
        for step in range(blocksize // LANES):
            lanes = lanes + product[:, step]
        for half in (8, 4, 2, 1):
            lanes = lanes[:, :half] + lanes[:, half : 2 * half]
        moments[:, column] = lanes[:, 0]
    return moments


def squared_error(absmax: F32, moments: F32, start: tuple[float, float] = (0.0, 0.0)) -> tuple[float, float]:
    """Squared error and squared norm of a tensor, from its decoded absmax and block moments, summed in float64.

    The blocks are added in order to `start`, so a tensor may be summed in pieces with the same result.
    """
    scale = absmax.astype(np.float64)
    square, cross, norm = moments.astype(np.float64).T
    error = square - 2.0 * scale * cross + scale * scale * norm
    sums = [
        np.cumsum(np.concatenate(([first], terms)))[-1] for first, terms in zip(start, (error, square), strict=True)
    ]
    return float(sums[0]), float(sums[1])
