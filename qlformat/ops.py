"""torch operators: quantize and dequantize tensors on any device, with the same bits on each (spec/format.md).

    packed, absmax = torch.ops.qlformat.quantize_nf4(x)                      # or ops.quantize_weight(x)
    codes, nested_absmax, nested_offset = torch.ops.qlformat.double_quantize(absmax)
    w = torch.ops.qlformat.dequantize_nf4(packed, codes, x.shape, x.dtype, nested_absmax=nested_absmax,
                                          nested_offset=nested_offset.item())   # or ops.dequantize_weight(...)

Here are their schemas, their fakes and every check of their arguments; `qlformat.backends` has the kernels.
torch.compile takes the operators as they are. They have no derivatives. The names say nf4, the usual case; quant_type
"fp4" works too. Quantization is two operators, one for each level, and each can be used alone. nested_offset is a plain
number when dequantizing, since that is how a checkpoint stores it; taking one from the device costs a wait.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from qlformat.backends import cpu, cuda, torch_ref
from qlformat.errors import QlfError, shown
from qlformat.layout import BLOCKSIZES, MAX_ELEMENTS, NESTED_BLOCKSIZE, QUANT_TYPES, QuantState, Recipe

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

_SCHEMAS = {
    "dequantize_nf4": (
        "(Tensor packed, Tensor absmax, SymInt[] shape, ScalarType dtype, Tensor? nested_absmax=None, "
        "Tensor? nested_quant_map=None, float nested_offset=0.0, *, str quant_type='nf4', int blocksize=64) -> Tensor"
    ),
    "quantize_nf4": "(Tensor x, *, str quant_type='nf4', int blocksize=64) -> (Tensor packed, Tensor absmax)",
    "double_quantize": "(Tensor absmax) -> (Tensor codes, Tensor nested_absmax, Tensor nested_offset)",
}


def _check_recipe(quant_type: str, blocksize: int) -> None:
    if quant_type not in QUANT_TYPES:
        raise QlfError(f"found quant_type {shown(quant_type)}, needed one of {', '.join(QUANT_TYPES)}")
    if blocksize not in BLOCKSIZES:
        raise QlfError(f"found blocksize {shown(blocksize)}, needed one of {', '.join(map(str, BLOCKSIZES))}")


def _check_tensor(name: str, tensor: torch.Tensor, dtype: torch.dtype, elements: int, device: torch.device) -> None:
    if tensor.dtype != dtype:
        raise QlfError(f"{name}: found dtype {tensor.dtype}, needed {dtype}")
    if tensor.numel() != elements:
        raise QlfError(f"{name}: found {tensor.numel()} elements, needed {elements} for this shape and blocksize")
    if tensor.device != device:
        raise QlfError(f"{name}: found device {tensor.device}, needed {device}, where packed is; move one of them")


def _check_dequantize(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    quant_type: str,
    blocksize: int,
    nested_absmax: torch.Tensor | None,
    nested_quant_map: torch.Tensor | None,
) -> None:
    _check_recipe(quant_type, blocksize)
    if dtype not in _DTYPES.values():
        raise QlfError(f"found dtype {dtype}, needed torch.bfloat16, torch.float16 or torch.float32")
    n = math.prod(shape)
    if not len(shape) or any(dim < 1 for dim in shape) or n >= MAX_ELEMENTS:
        raise QlfError(
            f"found shape {shown(tuple(shape))}, needed one or more positive dimensions and fewer than 2**48 elements"
        )
    blocks, device = -(-n // blocksize), packed.device
    _check_tensor("packed", packed, torch.uint8, -(-n // 2), device)
    _check_tensor("absmax", absmax, torch.float32 if nested_absmax is None else torch.uint8, blocks, device)
    if nested_absmax is not None:
        _check_tensor("nested_absmax", nested_absmax, torch.float32, -(-blocks // NESTED_BLOCKSIZE), device)
    if nested_quant_map is not None:
        if nested_absmax is None:
            raise QlfError("found a nested_quant_map without nested_absmax, needed both or neither")
        _check_tensor("nested_quant_map", nested_quant_map, torch.float32, 256, device)


def _check_offset(nested_offset: float) -> None:
    rounded = torch.tensor(nested_offset, dtype=torch.float32).item()
    if not math.isfinite(nested_offset) or rounded != nested_offset:
        raise QlfError(f"found nested_offset {nested_offset!r}, needed a finite number that float32 holds exactly")


def _check_quantize(x: torch.Tensor, quant_type: str, blocksize: int) -> None:
    _check_recipe(quant_type, blocksize)
    if x.dtype not in _DTYPES.values():
        raise QlfError(f"found a tensor of {x.dtype}, needed torch.bfloat16, torch.float16 or torch.float32", rule="E3")
    if not 0 < x.numel() < MAX_ELEMENTS:
        raise QlfError(f"found {x.numel()} elements, needed at least one and fewer than 2**48")


def _check_double_quantize(absmax: torch.Tensor) -> None:
    if absmax.dtype != torch.float32:
        raise QlfError(f"absmax: found dtype {absmax.dtype}, needed torch.float32")
    if not absmax.numel():
        raise QlfError("absmax: found no elements, needed at least one")


def _dequantize_with(kernel: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def checked(
        packed: torch.Tensor,
        absmax: torch.Tensor,
        shape: Sequence[int],
        dtype: torch.dtype,
        nested_absmax: torch.Tensor | None = None,
        nested_quant_map: torch.Tensor | None = None,
        nested_offset: float = 0.0,
        *,
        quant_type: str = "nf4",
        blocksize: int = 64,
    ) -> torch.Tensor:
        nested = nested_absmax, nested_quant_map
        _check_dequantize(packed, absmax, shape, dtype, quant_type, blocksize, *nested)
        _check_offset(nested_offset)
        return kernel(packed, absmax, shape, dtype, quant_type, blocksize, *nested, nested_offset)

    return checked


def _quantize_with(kernel: Callable[..., Any]) -> Callable[..., Any]:
    def checked(x: torch.Tensor, *, quant_type: str = "nf4", blocksize: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
        _check_quantize(x, quant_type, blocksize)
        packed, absmax = kernel(x, quant_type, blocksize)
        return packed, absmax

    return checked


def _double_quantize_with(kernel: Callable[..., Any]) -> Callable[..., Any]:
    def checked(absmax: torch.Tensor) -> Any:
        _check_double_quantize(absmax)
        return kernel(absmax)

    return checked


def _fake_dequantize(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    nested_absmax: torch.Tensor | None = None,
    nested_quant_map: torch.Tensor | None = None,
    nested_offset: float = 0.0,
    *,
    quant_type: str = "nf4",
    blocksize: int = 64,
) -> torch.Tensor:
    _check_dequantize(packed, absmax, shape, dtype, quant_type, blocksize, nested_absmax, nested_quant_map)
    return packed.new_empty(tuple(shape), dtype=dtype)


def _fake_quantize(
    x: torch.Tensor, *, quant_type: str = "nf4", blocksize: int = 64
) -> tuple[torch.Tensor, torch.Tensor]:
    _check_quantize(x, quant_type, blocksize)
    n = x.numel()
    packed = x.new_empty((-(-n // 2), 1), dtype=torch.uint8)
    return packed, x.new_empty((-(-n // blocksize),), dtype=torch.float32)


def _fake_double_quantize(absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _check_double_quantize(absmax)
    blocks = absmax.numel()
    codes = absmax.new_empty((blocks,), dtype=torch.uint8)
    return codes, absmax.new_empty((-(-blocks // NESTED_BLOCKSIZE),)), absmax.new_empty(())


def _no_derivative(name: str, *_: Any) -> None:
    raise QlfError(f"qlformat::{name} has no derivative; detach its inputs")


_LIBRARY = torch.library.Library("qlformat", "DEF")
_WITH = {"dequantize_nf4": _dequantize_with, "quantize_nf4": _quantize_with, "double_quantize": _double_quantize_with}
_FAKES = {"dequantize_nf4": _fake_dequantize, "quantize_nf4": _fake_quantize, "double_quantize": _fake_double_quantize}

for _name, _schema in _SCHEMAS.items():
    _LIBRARY.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    for _backend in (torch_ref, cpu, cuda):
        _LIBRARY.impl(_name, _WITH[_name](getattr(_backend, _name.removesuffix("_nf4"))), _backend.KEY)
    torch.library.register_fake(f"qlformat::{_name}", _FAKES[_name], lib=_LIBRARY)
    torch.library.register_autograd(f"qlformat::{_name}", functools.partial(_no_derivative, _name), lib=_LIBRARY)


def dequantize_weight(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    state: QuantState,
    nested_absmax: torch.Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    *,
    nested_quant_map: torch.Tensor | None = None,
) -> torch.Tensor:
    """Decode a weight from the tensors of a checkpoint, on the device where they are.

    Args:
        packed: uint8, ceil(n/2) elements.
        absmax: uint8 [blocks] with double quantization, float32 [blocks] without.
        state: the weight's quant_state. Its own `dtype` does not matter here.
        nested_absmax: float32 [ceil(blocks/256)] with double quantization, None without.
        dtype: torch.bfloat16, torch.float16 or torch.float32.
        nested_quant_map: float32 [256] of a plain repository, or None for the specified table.

    Returns:
        A new tensor of state.shape (spec, "Decoding"). On CUDA it is ready in the order of the current stream.

    Raises:
        QlfError: tensors that do not fit the state or each other; nothing has been read then.
    """
    if state.nested != (nested_absmax is not None):
        found, needed = ("no nested_absmax", "one") if state.nested else ("a nested_absmax", "none")
        raise QlfError(f"found {found}, needed {needed}: the quant_state says double quantization {state.nested}")
    with torch.no_grad():
        return torch.ops.qlformat.dequantize_nf4(
            packed, absmax, state.shape, dtype, quant_type=state.quant_type, blocksize=state.blocksize,
            nested_absmax=nested_absmax, nested_quant_map=nested_quant_map, nested_offset=state.nested_offset or 0.0,
        )  # fmt: skip


def quantize_weight(
    weight: torch.Tensor, recipe: Recipe | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, QuantState]:
    """Encode a weight on the device where it is (spec, "Encoding" and "Double quantization").

    Args:
        weight: bfloat16, float16 or float32, at least one dimension.
        recipe: quant_type, blocksize and double_quant; NF4, 64 and yes by default.

    Returns:
        packed uint8 [ceil(n/2), 1], absmax (uint8 or float32 [blocks]), nested_absmax (float32, or None), quant_state.

    Raises:
        QlfError: unusable arguments. NonFiniteError: a NaN or infinity (rule E1).
    """
    recipe = recipe or Recipe()
    dtype = next((name for name, known in _DTYPES.items() if known == weight.dtype), "")
    if not weight.dim():
        raise QlfError("found a scalar, needed a weight of at least one dimension")
    with torch.no_grad():
        packed, absmax = torch.ops.qlformat.quantize_nf4(
            weight, quant_type=recipe.quant_type, blocksize=recipe.blocksize
        )
        shape = tuple(weight.shape)
        if not recipe.double_quant:
            return packed, absmax, None, QuantState(recipe.quant_type, recipe.blocksize, dtype, shape, None)
        codes, nested_absmax, offset = torch.ops.qlformat.double_quantize(absmax)
    return packed, codes, nested_absmax, QuantState(recipe.quant_type, recipe.blocksize, dtype, shape, offset.item())
