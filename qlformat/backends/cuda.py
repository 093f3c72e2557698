"""The operators on CUDA devices: kernels/cuda, or, where these cannot be used, bitsandbytes' kernels or plain torch.

The reason is given once, as a warning, and by `why_unavailable`. All three give the same bits.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Sequence

import numpy as np
import torch

from qlformat.backends import cuda_launch, torch_ref
from qlformat.layout import NESTED_BLOCKSIZE
from qlformat.native import NonFiniteError

KEY = "CUDA"
"""Dispatch key."""

_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
_QUANT_TYPES = {"nf4": 0, "fp4": 1}
_DEQUANTIZE_TILE, _QUANTIZE_TILE = 8192, 4096  # elements that a thread block takes at a time
_NO_BLOCK = -1  # all bits set: what atomicMin lowers


def why_unavailable(device: torch.device | str = "cuda") -> str:
    """Why this library's CUDA kernels cannot be used on a device, in one line, or "". Compiles them on first use."""
    return cuda_launch.why_unavailable(torch.device(device))


def _unusable(device: torch.device) -> bool:
    """Whether the kernels cannot be used; if so, says why, once for each reason."""
    reason = cuda_launch.why_unavailable(device)
    if reason:
        _warn(reason)
    return bool(reason)


@functools.cache
def _warn(reason: str) -> None:
    warnings.warn(f"qlformat's CUDA kernels are not used: {reason}", RuntimeWarning, stacklevel=2)


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else int(tensor.data_ptr())


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
    """As torch_ref.dequantize; both levels in one launch, on the current stream, without waiting for it."""
    if _unusable(packed.device):
        return _without_kernels(
            packed, absmax, shape, dtype, quant_type, blocksize, nested_absmax, nested_quant_map, nested_offset
        )
    n = math.prod(shape)
    out = torch.empty(tuple(shape), dtype=dtype, device=packed.device)
    inputs = [
        None if tensor is None else tensor.detach().contiguous()
        for tensor in (packed, absmax, nested_absmax, nested_quant_map)
    ]
    cuda_launch.launch(
        packed.device,
        f"qlf_dequantize_{'' if nested_absmax is None else 'nested_'}{_DTYPES[dtype]}",
        -(-n // _DEQUANTIZE_TILE),
        (*map(_address, inputs), np.float32(nested_offset), n, blocksize.bit_length() - 1, _QUANT_TYPES[quant_type],
         _address(out)),
    )  # fmt: skip
    return out


def quantize(x: torch.Tensor, quant_type: str, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As torch_ref.quantize. Waits for the result, since a NaN or infinity is an error."""
    if _unusable(x.device):
        return torch_ref.quantize(x, quant_type, blocksize)
    x, n = x.detach().contiguous(), x.numel()
    packed = torch.empty((-(-n // 2), 1), dtype=torch.uint8, device=x.device)
    absmax = torch.empty(-(-n // blocksize), dtype=torch.float32, device=x.device)
    bad_block = torch.full((1,), _NO_BLOCK, dtype=torch.int64, device=x.device)
    cuda_launch.launch(
        x.device,
        f"qlf_quantize_{_DTYPES[x.dtype]}",
        -(-n // _QUANTIZE_TILE),
        (_address(x), n, blocksize.bit_length() - 1, _QUANT_TYPES[quant_type], _address(packed), _address(absmax),
         _address(bad_block)),
    )  # fmt: skip
    _refuse_non_finite(bad_block, blocksize)
    return packed, absmax


def double_quantize(absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As torch_ref.double_quantize. Waits for the result."""
    device = absmax.device
    if _unusable(device):
        return torch_ref.double_quantize(absmax)
    absmax, blocks = absmax.detach().contiguous(), absmax.numel()
    nested = -(-blocks // NESTED_BLOCKSIZE)
    codes = torch.empty(blocks, dtype=torch.uint8, device=device)
    nested_absmax = torch.empty(nested, dtype=torch.float32, device=device)
    offset = torch.empty((), dtype=torch.float32, device=device)
    sums = torch.empty(nested, dtype=torch.float64, device=device)
    bad = torch.full((1,), _NO_BLOCK, dtype=torch.int64, device=device)
    each_thread_one = -(-nested // cuda_launch.THREADS)
    cuda_launch.launch(
        device, "qlf_absmax_sums", each_thread_one, (_address(absmax), blocks, _address(sums), _address(bad))
    )
    cuda_launch.launch(device, "qlf_absmax_mean", 1, (_address(sums), blocks, _address(offset)))
    cuda_launch.launch(
        device,
        "qlf_quantize_absmax",
        nested,
        (_address(absmax), blocks, _address(offset), _address(codes), _address(nested_absmax)),
    )
    _refuse_non_finite(bad, 1)
    return codes, nested_absmax, offset


def _refuse_non_finite(bad_block: torch.Tensor, blocksize: int) -> None:
    block = int(bad_block.item())
    if block != _NO_BLOCK:
        raise NonFiniteError(block, blocksize)


def _without_kernels(
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
    """bitsandbytes' dequantization where its bits are the specified ones, else plain torch.

    bitsandbytes is compiled with fast math, which flushes subnormals to zero, and its fp4 decoder has constants of its
    own. So it gets nf4 only, and scales that are zero or far enough from zero that no product is subnormal; they are
    decoded here, with both roundings. Quantization never goes there: see "differences from bitsandbytes" in the spec.
    """
    scales = absmax.detach().flatten()
    if nested_absmax is not None:
        scales = torch_ref.decoded_absmax(absmax, nested_absmax, nested_quant_map, nested_offset)
    if quant_type == "nf4" and blocksize >= 64 and math.prod(shape) % 2 == 0 and _bitsandbytes_works():
        magnitude = scales.abs()
        if bool(((magnitude == 0) | ((magnitude > 2.0**-120) & torch.isfinite(magnitude))).all()):
            return _bitsandbytes_dequantize(packed.detach().contiguous().view(-1, 1), scales, blocksize, shape, dtype)
    return torch_ref.dequantize(packed, scales, shape, dtype, quant_type, blocksize, None, None, 0.0)


def _bitsandbytes_dequantize(
    packed: torch.Tensor, absmax: torch.Tensor, blocksize: int, shape: Sequence[int], dtype: torch.dtype
) -> torch.Tensor:
    dense = torch.ops.bitsandbytes.dequantize_4bit.default(packed, absmax, blocksize, "nf4", list(shape), dtype)
    return dense.reshape(tuple(shape))


@functools.cache
def _bitsandbytes_works() -> bool:
    try:
        import bitsandbytes.cextension
    except Exception:  # it fails in many ways where its library does not fit the CUDA of torch
        return False
    return bool(getattr(bitsandbytes.cextension.lib, "compiled_with_cuda", False))
