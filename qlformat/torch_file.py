"""Read a PyTorch .bin checkpoint with weights_only, as bytes, through the same interface as a safetensors file."""

from __future__ import annotations

import math
import pickle
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qlformat.errors import SourceError
from qlformat.shards import DTYPE_BITS, TORCH_NAMES, TensorInfo

if TYPE_CHECKING:
    import torch

_DTYPES = {torch_name: dtype for dtype, torch_name in TORCH_NAMES.items()}


class TorchFile:
    """A .bin file loaded with weights_only=True, memory-mapped where its format allows.

    Attributes:
        tensors: TensorInfo by name; begin is the order in the file, not a byte position.
        aliases: name -> name of the tensor that shares its memory and is listed in its place.

    Raises:
        SourceError: rule E4 when the file needs code to load or is not a mapping of names to tensors.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.path = path
        self.name = name
        self.tensors: dict[str, TensorInfo] = {}
        self.aliases: dict[str, str] = {}
        self._values: dict[str, torch.Tensor] = {}
        self._stamp = _stamp(path)
        seen: dict[tuple[Any, ...], str] = {}
        # An output embedding comes last: of a tied pair the input embedding is the one that readers look for.
        loaded = sorted(_load(path, name).items(), key=lambda item: item[0].endswith("lm_head.weight"))
        for tensor_name, tensor in loaded:
            place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape), tensor.stride())
            if tensor.numel() and place in seen:
                self.aliases[tensor_name] = seen[place]
                continue
            seen[place] = tensor_name
            self._add(tensor_name, tensor)

    def _add(self, name: str, tensor: torch.Tensor) -> None:
        dtype = _DTYPES.get(str(tensor.dtype).removeprefix("torch."))
        if dtype is None:
            raise SourceError(
                f"found dtype {tensor.dtype}, needed a plain float, integer or bool dtype",
                rule="E3", tensor=name, file=self.name,
            )  # fmt: skip
        shape = tuple(tensor.shape)
        size = math.prod(shape) * DTYPE_BITS[dtype] // 8
        self.tensors[name] = TensorInfo(name, dtype, shape, len(self.tensors), len(self.tensors) + size)
        self._values[name] = tensor

    def read_into(self, info: TensorInfo, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the tensor's bytes from `offset` on."""
        import torch

        tensor = self._values[info.name]
        if not tensor.is_contiguous():  # a view into a larger storage; made whole once
            tensor = self._values[info.name] = tensor.contiguous()
        data = tensor.reshape(-1).view(torch.uint8).numpy()
        np.frombuffer(buffer, dtype=np.uint8)[:] = data[offset : offset + buffer.nbytes]

    def end_position(self, info: TensorInfo) -> int:
        """0: tensors have no place in the file that a reader could follow."""
        return 0

    def check_unchanged(self) -> None:
        """Raise SourceError when the file's size or time of change is another one by now."""
        if _stamp(self.path) != self._stamp:
            raise SourceError("the file was changed while it was read; run it again", file=self.name)

    def close(self) -> None:
        """Let go of the tensors."""
        self._values.clear()


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None  # removed since; what is mapped stays
    return status.st_size, status.st_mtime_ns


def _load(path: Path, name: str) -> dict[str, torch.Tensor]:
    import torch

    try:
        with warnings.catch_warnings():  # torch's advice on pickles is for those who write them
            warnings.simplefilter("ignore")
            try:
                loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # the legacy format before torch 1.6 cannot be mapped
                loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise SourceError(
            f"refused: it does not load with weights_only ({_refused(str(error))}); "
            "convert it to safetensors where you trust it",
            rule="E4",
            file=name,
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError, TypeError) as error:
        reason = str(error).split("\n")[0][:160]
        raise SourceError(
            f"not a readable PyTorch checkpoint ({reason}); fetch it again", rule="E4", file=name
        ) from None
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in loaded.items()
    ):
        raise SourceError("found something else than a mapping of names to tensors", rule="E4", file=name)
    return {key: value.detach() for key, value in loaded.items()}


def _refused(message: str) -> str:
    """What torch refused, from its message of several paragraphs."""
    code = re.search(r"GLOBAL ([\w.]+)", message)
    if code:
        return f"it calls {code[1][:100]}"
    lines = [line.strip() for line in message.split("\n") if line.strip()]
    reasons = [line for line in lines if line.startswith("Unsupported")] or lines or ["no reason given"]
    return reasons[0][:100]
