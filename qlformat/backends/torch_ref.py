"""The operators in plain torch, for every device: the default, and what the others must equal bit by bit.

Eager torch rounds every step, as spec/format.md asks for: one float32 operation a kernel, nothing fused. The operators
are opaque to torch.compile, which therefore cannot fuse them either.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from qlformat.codebook import CODEBOOKS, DYNAMIC8, DYNAMIC8_THRESHOLDS
from qlformat.layout import NESTED_BLOCKSIZE
from qlformat.native import NonFiniteError
from qlformat.reference import SMALLEST_DIVISOR

KEY = "CompositeExplicitAutograd"
"""Dispatch key: used where a device has no kernels of its own."""

_ARRAYS: dict[str, npt.NDArray[Any]] = {"dynamic8": DYNAMIC8, "dynamic8 thresholds": DYNAMIC8_THRESHOLDS}
_ARRAYS |= {name: book.values for name, book in CODEBOOKS.items()}
_ARRAYS |= {f"{name} thresholds": book.thresholds for name, book in CODEBOOKS.items()}
_ARRAYS |= {f"{name} order": book.order for name, book in CODEBOOKS.items()}


@functools.lru_cache(maxsize=64)
def _table(name: str, device: torch.device) -> torch.Tensor:
    """A code table on a device; copied, since the library's own are read-only."""
    return torch.from_numpy(np.array(_ARRAYS[name])).to(device)


def _padded(flat: torch.Tensor, size: int) -> torch.Tensor:
    """The elements, then zeros up to `size`."""
    return torch.nn.functional.pad(flat, (0, size - flat.numel()))


def decoded_absmax(
    codes: torch.Tensor, nested_absmax: torch.Tensor, nested_quant_map: torch.Tensor | None, nested_offset: float
) -> torch.Tensor:
    """float32 [blocks] from uint8 codes [blocks]: a product, then a sum, each rounded (spec, "Decoding")."""
    table = _table("dynamic8", codes.device) if nested_quant_map is None else nested_quant_map.flatten()
    factors = nested_absmax.flatten().repeat_interleave(NESTED_BLOCKSIZE)[: codes.numel()]
    return table[codes.flatten().int()] * factors + nested_offset


def dequantize(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    quant_type: str,
    blocksize: int,
    nested_absmax: torch.Tensor | None,
    nested_quant_map: torch.Tensor | None,
    nested_offset: float,
) -> torch.Tensor:
    """A weight of `shape` and `dtype` from its packed codes (spec, "Decoding")."""
    n = math.prod(shape)
    scales = absmax.flatten()
    if nested_absmax is not None:
        scales = decoded_absmax(absmax, nested_absmax, nested_quant_map, nested_offset)
    flat = packed.flatten()
    codes = torch.stack((flat >> 4, flat & 15), dim=1).flatten()[:n]
    values = _padded(_table(quant_type, packed.device)[codes.int()], scales.numel() * blocksize)
    values = values.view(-1, blocksize) * scales[:, None]
    return values.flatten()[:n].to(dtype).reshape(tuple(shape)).clone(memory_format=torch.contiguous_format)


def quantize(x: torch.Tensor, quant_type: str, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    """packed uint8 [ceil(n/2), 1] and absmax float32 [blocks] of a weight (spec, "Encoding").

    Raises:
        NonFiniteError: rule E1.
    """
    flat = x.detach().flatten().float()
    n, ragged = flat.numel(), flat.numel() % blocksize
    blocks = _padded(flat, -(-n // blocksize) * blocksize).view(-1, blocksize)
    absmax = blocks.abs().amax(dim=1)
    if not bool(torch.isfinite(absmax).all()):
        raise NonFiniteError(int(torch.isfinite(absmax).int().argmin()), blocksize)
    above_zero = absmax.clamp(min=float(SMALLEST_DIVISOR))
    scaled = blocks * torch.div(torch.ones_like(above_zero), above_zero)[:, None]
    if ragged:  # the ragged block divides, and stores the divisor
        absmax[-1] = above_zero[-1]
        scaled[-1] = blocks[-1] / above_zero[-1]
    rank = torch.bucketize(scaled.flatten(), _table(f"{quant_type} thresholds", x.device), out_int32=True)
    # The blocks are of an even size, so where n is odd a zero lies behind it: the pad nibble.
    codes = _table(f"{quant_type} order", x.device)[rank][: n + n % 2]
    return ((codes[0::2] << 4) | codes[1::2])[:, None], absmax


def double_quantize(absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """8-bit codes [blocks], nested_absmax [ceil(blocks/256)] and nested_offset [] (spec, "Double quantization").

    Raises:
        NonFiniteError: absmax holds NaN or infinity.
    """
    flat = absmax.detach().flatten()
    count = flat.numel()
    if not bool(torch.isfinite(flat).all()):
        raise NonFiniteError(int(torch.isfinite(flat).int().argmin()), 1)
    rows = _padded(flat, -(-count // NESTED_BLOCKSIZE) * NESTED_BLOCKSIZE).view(-1, NESTED_BLOCKSIZE)
    sums = torch.zeros(rows.shape[0], dtype=torch.float64, device=flat.device)
    for column in rows.unbind(dim=1):  # index order on every device, which cumsum does not promise
        sums = sums + column
    mean = np.float32(np.cumsum(sums.cpu().numpy())[-1] / np.float64(count))
    offset = torch.tensor(mean, device=flat.device)
    residual = _padded(flat - offset, rows.numel()).view_as(rows)
    nested = residual.abs().amax(dim=1)
    reciprocal = torch.div(torch.ones_like(nested), nested.clamp(min=float(SMALLEST_DIVISOR)))
    rank = torch.bucketize(
        residual * reciprocal[:, None], _table("dynamic8 thresholds", flat.device), out_int32=True
    ).where(nested[:, None] != 0, 0)
    return rank.to(torch.uint8).flatten()[:count].clone(), nested, offset
