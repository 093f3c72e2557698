"""The operators on the CPU: the native kernels on the tensors' own memory, or plain torch where there are none."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from qlformat import native
from qlformat.backends import torch_ref
from qlformat.codebook import DYNAMIC8

KEY = "CPU"
"""Dispatch key."""

_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def _array(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """The memory of a tensor as a flat array, not copied when it is contiguous; bfloat16 as its uint16 bits."""
    flat = tensor.detach().contiguous().view(-1)
    if flat.dtype == torch.bfloat16:
        bits: npt.NDArray[Any] = flat.view(torch.int16).numpy().view(np.uint16)
        return bits
    array: npt.NDArray[Any] = flat.numpy()
    return array


def _threads() -> int:
    return min(int(torch.get_num_threads()), native.MAX_THREADS)


def _is_standard(nested_quant_map: torch.Tensor | None) -> bool:
    return nested_quant_map is None or np.array_equal(
        _array(nested_quant_map).view(np.uint32), DYNAMIC8.view(np.uint32)
    )


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
    """As torch_ref.dequantize."""
    if not native.available():
        return torch_ref.dequantize(
            packed, absmax, shape, dtype, quant_type, blocksize, nested_absmax, nested_quant_map, nested_offset
        )
    n = math.prod(shape)
    out = torch.empty(tuple(shape), dtype=dtype)
    how: dict[str, Any] = {"quant_type": quant_type, "blocksize": blocksize, "dtype": _DTYPES[dtype]}
    how |= {"out": _array(out), "threads": _threads()}
    if nested_absmax is None:
        native.dequantize(_array(packed), _array(absmax), n, **how)
    elif _is_standard(nested_quant_map):
        native.dequantize_nested(_array(packed), _array(absmax), _array(nested_absmax), nested_offset, n, **how)
    else:  # another table, in a plain repository: the kernels know the specified one only
        scales = torch_ref.decoded_absmax(absmax, nested_absmax, nested_quant_map, nested_offset)
        native.dequantize(_array(packed), _array(scales), n, **how)
    return out


def quantize(x: torch.Tensor, quant_type: str, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As torch_ref.quantize."""
    if not native.available():
        return torch_ref.quantize(x, quant_type, blocksize)
    n = x.numel()
    packed = torch.empty((-(-n // 2), 1), dtype=torch.uint8)
    absmax = torch.empty(-(-n // blocksize), dtype=torch.float32)
    native.quantize(
        _array(x), dtype=_DTYPES[x.dtype], quant_type=quant_type, blocksize=blocksize,
        packed=_array(packed), absmax=_array(absmax), threads=_threads(),
    )  # fmt: skip
    return packed, absmax


def double_quantize(absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As torch_ref.double_quantize."""
    if not native.available():
        return torch_ref.double_quantize(absmax)
    codes, nested, offset = native.double_quantize(_array(absmax), threads=_threads())
    return torch.from_numpy(codes), torch.from_numpy(nested), torch.tensor(offset)
