"""Load a 4-bit checkpoint as an ordinary state dict of torch tensors, decoded while loading."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from qlformat import remote
from qlformat.checkpoint import NUMPY_DTYPES, U8, AnyArray, Checkpoint, dtype_name
from qlformat.decoder import chosen_weights, decode_weights, model_shape, out_of_memory, require_memory, thread_count
from qlformat.errors import QlfError
from qlformat.weights import Weight

if TYPE_CHECKING:
    import torch


def load_state_dict(
    path_or_repo: str | Path,
    dtype: str | torch.dtype | None = None,
    device: str | int | torch.device = "cpu",
    names: Iterable[str] | None = None,
    *,
    threads: int | None = None,
) -> dict[str, torch.Tensor]:
    """Load the weights of a 4-bit checkpoint as 16- or 32-bit tensors, for `model.load_state_dict` of the plain model.

    The bits are those of `Checkpoint.dequantize`, on every device and with any number of threads. Each tensor owns its
    memory. To the GPU go the 4-bit bytes, through pinned buffers; they are decoded there while the next ones are read.

    Args:
        path_or_repo: directory of a checkpoint, ours or bitsandbytes' own, or a Hub repository "ORG/NAME[@revision]".
        dtype: torch.bfloat16, torch.float16 or torch.float32, or its name; by default each weight's own. Tensors of
            integers and bools keep theirs.
        device: "cpu", "cuda" or "cuda:N".
        names: exact names of the weights wanted; all by default.
        threads: for reading and decoding; all processors of this process by default.

    Returns:
        Name -> tensor, without the companions of the 4-bit form, in the shapes of the 16-bit model ([in, out] for the
        Conv1D of GPT-2). Weights that the checkpoint ties by storing one of them are not added.

    Raises:
        FormatError: the checkpoint breaks a structural rule, T4 or D1; or a file changed while it was read (S5).
        QlfError: no such repository, name, dtype or device; or out of memory, with what is needed. Nothing stays
            allocated.
    """
    kind = None if dtype is None else dtype_name(dtype)
    count = thread_count(threads)
    target = _device(device)
    with Checkpoint(remote.local_directory(path_or_repo)) as checkpoint:
        weights = chosen_weights(checkpoint, names)
        if target.type != "cpu":
            from qlformat.device_loader import load_to_device

            return load_to_device(checkpoint, weights, kind, target, count)
        require_memory(checkpoint, weights, kind)
        return _on_cpu(checkpoint, weights, kind, count)


def _on_cpu(checkpoint: Checkpoint, weights: list[Weight], dtype: str | None, threads: int) -> dict[str, torch.Tensor]:
    import torch

    tensors: dict[str, torch.Tensor] = {}
    views: dict[str, AnyArray] = {}
    for weight in weights:
        kind = checkpoint.decoded_dtype(weight, dtype)
        try:
            tensors[weight.name] = torch.empty(model_shape(weight), dtype=getattr(torch, kind))
        except RuntimeError:  # torch has no class of its own for this on the CPU
            tensors.clear()  # and not when the caller lets go of the error
            views.clear()
            raise out_of_memory(checkpoint, weight, weights, dtype) from None
        views[weight.name] = _array(tensors[weight.name]).view(NUMPY_DTYPES[kind]).reshape(model_shape(weight))
    decode_weights(checkpoint, views, dtype, threads)
    return tensors


def _array(tensor: torch.Tensor) -> U8:
    """The memory of a tensor as bytes: NumPy has no bfloat16."""
    import torch

    found: U8 = tensor.reshape(-1).view(torch.uint8).numpy()
    return found


def _device(device: str | int | torch.device) -> torch.device:
    import torch

    try:
        found = torch.device(device)
    except (RuntimeError, TypeError, AssertionError):
        raise QlfError(f"device {device!r} is unknown; use one of {', '.join(_devices())}") from None
    # torch keeps an index in few bits: of a large one, something else is left, even something negative.
    here = found.type == "cpu" or (found.type == "cuda" and 0 <= (found.index or 0) < torch.cuda.device_count())
    if not here:
        raise QlfError(f"device {str(device)!r} was asked for, found only {', '.join(_devices())}; use one of them")
    return found


def _devices() -> list[str]:
    import torch

    return ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
