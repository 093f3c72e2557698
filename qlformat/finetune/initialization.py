"""LoftQ: begin with the adapter that makes up for as much of the quantization error as its rank can.

arXiv 2310.08659 alternates between quantizing W - AB and taking the truncated SVD of what is left. Here the base is
fixed, since others share it, so that the first round is all of it: AB = SVD_r(W - dequantize(base)).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qlformat.checkpoint import Checkpoint
from qlformat.errors import QlfError
from qlformat.reference import to_float32
from qlformat.source import Source, open_source

if TYPE_CHECKING:
    import torch

F32 = npt.NDArray[np.float32]
_DTYPES = {"F32": ("float32", "<f4"), "F16": ("float16", "<f2"), "BF16": ("bfloat16", "<u2")}
_EXACT = 4096
"""Up to this size of the smaller side the singular vectors are computed exactly, above by power iteration."""


def loftq(model: Any, directory: Path, source: str) -> float:
    """Set the LoRA weights of `model` layer by layer, with one decoded layer in memory at a time, on a CPU.

    Args:
        model: peft's model, its adapter "default" fresh.
        directory: the base.
        source: the 16-bit model that the base was made from.

    Returns:
        Share of the squared quantization error that the adapter makes up for.

    Raises:
        QlfError: the source lacks a weight of the base or has another shape.
    """
    before = after = 0.0
    with Checkpoint(directory) as checkpoint, open_source(source) as original:
        for name, module in model.named_modules():
            if "default" not in getattr(module, "lora_A", {}):
                continue
            weight = f"{name.removeprefix('base_model.model.')}.weight"
            if weight not in checkpoint.weights or checkpoint.weights[weight].quant_state is None:
                continue
            error = _read(original, weight, source) - checkpoint.dequantize(weight, "float32").astype(np.float32)
            left = _set(module, error)
            before += float(np.square(error, dtype=np.float64).sum())
            after += left
    if not before:
        raise QlfError(
            f"{source}: found no weight that differs from the base, needed the 16-bit model it was made from"
        )
    return 1 - after / before


def _read(original: Source, name: str, source: str) -> F32:
    """A weight of the source as float32 [out, in]."""
    tensor = original.tensors.get(name)
    if tensor is None or tensor.dtype not in _DTYPES:
        raise QlfError("the source has no such weight; give the 16-bit model of the base", tensor=name, file=source)
    kind, stored = _DTYPES[tensor.dtype]
    raw = np.empty(tensor.nbytes, dtype=np.uint8)
    tensor.read_into(0, raw.data)
    wide: F32 = to_float32(raw.view(stored), kind).reshape(tensor.shape)
    return wide


def _set(module: Any, error: F32) -> float:
    """Give the layer's adapter the best approximation of `error` of its rank; returns the squared error left."""
    import torch

    a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
    if error.shape != (b.shape[0], a.shape[1]):
        raise QlfError(f"the source has a weight of {list(error.shape)}, the base one of {[b.shape[0], a.shape[1]]}")
    matrix = torch.from_numpy(np.ascontiguousarray(error))
    left, values, right = _truncated(matrix, a.shape[0])
    root = (values / module.scaling["default"]).clamp_min(0).sqrt()
    with torch.no_grad():
        b.copy_(left * root)
        a.copy_(root[:, None] * right)
    return float((matrix.double() - (left * values).double() @ right.double()).square().sum())


def _truncated(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U [out, rank], singular values [rank] in falling order and V [rank, in] of a matrix, float32."""
    import torch

    if min(matrix.shape) > _EXACT:
        left, values, right = torch.svd_lowrank(matrix, q=rank, niter=8)
        return left, values, right.T
    wide = matrix.shape[0] <= matrix.shape[1]
    exact = matrix.double() if wide else matrix.double().T
    _, vectors = torch.linalg.eigh(exact @ exact.T)
    left = vectors.flip(1)[:, :rank]
    right = left.T @ exact
    values = right.norm(dim=1)
    right = right / values.clamp_min(1e-30)[:, None]
    if not wide:
        left, right = right.T, left.T
    return left.float(), values.float(), right.float()
