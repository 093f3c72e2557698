"""How an adapter begins: from the 16-bit model that the base was made from, layer by layer, on a CPU.

W is a weight of that model, Q what the base decodes to, r the rank, and SVD_r the best approximation of rank r. Both
methods as published change the base. Here it stays what everybody has, so that each is what is left of it.

LoftQ (arXiv 2310.08659) alternates between Q = quantize(W - AB) and AB = SVD_r(W - Q). With Q given, the first round
is all of it: AB = SVD_r(W - Q). peft's `replace_lora_weights_loftq` does the same, on CUDA, and leaves alpha / r out.

PiSSA (arXiv 2404.02948) trains AB, which begins as the principal part P = SVD_r(W), and freezes the rest; QPiSSA
quantizes that rest, so that the principal part is not rounded. With Q given, the frozen rest is Q - C, where C has
rank r too: C = SVD_r(Q + P - W), which brings the layer's first Q - C + AB as near to W as any C of that rank. See
fixed_part.py for what is saved.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qlformat.checkpoint import Checkpoint
from qlformat.errors import QlfError
from qlformat.finetune import fixed_part
from qlformat.finetune.low_rank import truncated
from qlformat.reference import to_float32
from qlformat.source import Source, open_source

if TYPE_CHECKING:
    import torch

F32 = npt.NDArray[np.float32]
_DTYPES = {"F32": ("float32", "<f4"), "F16": ("float16", "<f2"), "BF16": ("bfloat16", "<u2")}


def begin(model: Any, directory: Path, source: str, method: str) -> str:
    """Set the LoRA weights of `model` by `method`, "loftq" or "pissa"; returns a line for the user.

    Raises:
        QlfError: as for loftq.
    """
    if method == "pissa":
        share = pissa(model, directory, source)
        return (
            f"PiSSA: the adapter begins as the principal part of each weight, with {share:.1%} of the squared "
            "quantization error made up for; saved as LoRA of twice the rank, which holds what the base keeps frozen"
        )
    share = loftq(model, directory, source)
    return f"LoftQ: the adapter begins with {share:.1%} of the squared quantization error made up for"


def loftq(model: Any, directory: Path, source: str) -> float:
    """Begin with what makes up for the most of the quantization error. One layer is in memory at a time.

    Args:
        model: peft's model, its adapter "default" fresh.
        directory: the base.
        source: the 16-bit model that the base was made from.

    Returns:
        Share of the squared quantization error that the adapter makes up for.

    Raises:
        QlfError: the source lacks a weight of the base or has another shape; or it does not differ from the base.
    """
    before = after = 0.0
    for layer in _layers(model, directory, source):
        error = layer.original - layer.decoded
        left = error - _set(layer, *truncated(error, layer.rank))
        before, after = before + _squared(error), after + _squared(left)
    return _share(before, after, source)


def pissa(model: Any, directory: Path, source: str) -> float:
    """Begin with the principal part of each weight, and take it out of what the base computes.

    Args, Returns, Raises: as for loftq.
    """
    before = after = 0.0
    for layer in _layers(model, directory, source):
        principal = _set(layer, *truncated(layer.original, layer.rank))
        surplus = layer.decoded + principal - layer.original
        left, values, right = truncated(surplus, layer.rank)
        fixed_part.attach(layer.module, *_factors(layer, left, values, right))
        before += _squared(layer.original - layer.decoded)
        after += _squared(surplus - (left * values) @ right)
    return _share(before, after, source)


@dataclass(frozen=True)
class _Layer:
    """An adapted 4-bit layer, its weight in the source and what the base decodes to, both float32 [out, in]."""

    module: Any
    original: torch.Tensor
    decoded: torch.Tensor

    @property
    def rank(self) -> int:
        return int(self.module.r["default"])


def _layers(model: Any, directory: Path, source: str) -> Iterator[_Layer]:
    """The adapted 4-bit layers. Others have no quantization error and begin by default."""
    import torch

    prefix = f"{getattr(model.get_base_model(), 'base_model_prefix', '')}."
    with Checkpoint(directory) as checkpoint, open_source(source) as original:
        for path, module in model.named_modules():
            if "default" not in getattr(module, "lora_A", {}):
                continue
            full = f"{path.removeprefix('base_model.model.')}.weight"
            names = (full, full.removeprefix(prefix), prefix + full)
            weight = next((checkpoint.weights[name] for name in names if name in checkpoint.weights), None)
            if weight is None:
                raise QlfError(f"{directory}: found no weight for the layer {path}; use --init default")
            if weight.quant_state is None:
                continue
            values = _read(original, weight.name, source)
            values = np.ascontiguousarray(values.T) if weight.transposed else values
            if values.shape != weight.shape:
                found, needed = list(values.shape), list(weight.shape)
                raise QlfError(f"{source}: {weight.name} is {found}, in the base {needed}; give the model of the base")
            decoded = checkpoint.dequantize(weight.name, "float32").astype(np.float32, copy=False)
            yield _Layer(module, torch.from_numpy(values), torch.from_numpy(decoded))


def _read(original: Source, name: str, source: str) -> F32:
    """A weight of the source as float32, as it is stored there."""
    tensor = original.tensors.get(name)
    if tensor is None or tensor.dtype not in _DTYPES:
        raise QlfError("the source has no such weight; give the 16-bit model of the base", tensor=name, file=source)
    kind, stored = _DTYPES[tensor.dtype]
    raw = np.empty(tensor.nbytes, dtype=np.uint8)
    tensor.read_into(0, raw.data)
    wide: F32 = to_float32(raw.view(stored), kind).reshape(tensor.shape)
    return wide


def _factors(
    layer: _Layer, left: torch.Tensor, values: torch.Tensor, right: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A [rank, in] and B [out, rank], of the same size; LoRA's scale times BA is left @ diag(values) @ right."""
    root = (values / layer.module.scaling["default"]).clamp_min(0).sqrt()
    return root[:, None] * right, left * root


def _set(layer: _Layer, left: torch.Tensor, values: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Let the adapter begin with left @ diag(values) @ right; returns that, [out, in]."""
    import torch

    a, b = _factors(layer, left, values, right)
    delta = (left * values) @ right
    with torch.no_grad():
        layer.module.lora_A["default"].weight.copy_(a)
        layer.module.lora_B["default"].weight.copy_(b)
        dora = getattr(layer.module, "lora_magnitude_vector", {})
        if "default" in dora:  # peft took the magnitude of each row from the base alone
            dora["default"].weight.copy_((layer.decoded + delta).norm(dim=1))
    return delta


def _squared(values: torch.Tensor) -> float:
    return float(values.double().square().sum())


def _share(before: float, after: float, source: str) -> float:
    if not before:
        raise QlfError(
            f"{source}: found no weight that differs from the base, needed the 16-bit model it was made from"
        )
    return 1 - after / before
