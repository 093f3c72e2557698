"""The stored tensors of a checkpoint as torch tensors that share memory with its files: nothing is read or copied."""

from __future__ import annotations

import math
import mmap
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlformat.errors import FormatError
from qlformat.shards import TORCH_NAMES, ShardReader
from qlformat.stored import StoredCheckpoint
from qlformat.weights import Weight

if TYPE_CHECKING:
    import torch

Version = tuple[int, int, int, int]
"""Device, inode, size and time of last change of a file."""


class MappedTensors:
    """Stored tensors by name, mapped copy-on-write.

    A tensor reads the page cache; writing to one changes a private copy of its pages, never the file. The mappings live
    as long as their tensors, also after the checkpoint is closed. A file that is cut short meanwhile ends the process
    at the next access (SIGBUS), as with every mapped file: replace a checkpoint by renaming, not by writing over it.

    Args:
        checkpoint: an open checkpoint; its checked headers say where the tensors are.

    Raises:
        FormatError: S5, a file is another one than when the checkpoint was opened.
        OSError: a file cannot be opened.
    """

    def __init__(self, checkpoint: StoredCheckpoint) -> None:
        import torch

        self._checkpoint = checkpoint
        self._versions: dict[Path, Version] = {}
        self._files: dict[str, torch.Tensor] = {}
        for name, shard in checkpoint.shards.items():
            self._files[name] = torch.frombuffer(self._map(shard), dtype=torch.uint8)

    def tensor(self, name: str) -> torch.Tensor:
        """A stored tensor with its dtype and shape, on the CPU.

        A tensor that does not start at a multiple of its element size, which only foreign writers produce, is copied.
        """
        import torch

        stored = self._checkpoint.tensors[name]
        start = self._checkpoint.shards[stored.shard].header.data_start
        begin, end = start + stored.info.begin, start + stored.info.end
        dtype: Any = getattr(torch, TORCH_NAMES[stored.info.dtype])
        data = self._files[stored.shard][begin:end]
        if begin % dtype.itemsize:
            data = data.clone()
        return data.view(dtype).view(stored.info.shape)

    def companions(self, weight: Weight) -> dict[str, torch.Tensor]:
        """The companions of a quantized weight by suffix, as bitsandbytes' QuantState.from_dict takes them.

        Raises:
            FormatError: T4 or D1, a scale is negative or not finite.
        """
        state = weight.quant_state
        if state is None:
            return {}
        names = [name for name in state.tensor_specs(weight.name) if name != weight.name]
        found = {name.removeprefix(f"{weight.name}."): self.tensor(name) for name in names}
        suffix, rule = ("nested_absmax", "D1") if state.nested else ("absmax", "T4")
        low, high = (float(value) for value in found[suffix].aminmax())
        if not (low >= 0 and high < math.inf):  # false for NaN, which aminmax hands on
            name = f"{weight.name}.{suffix}"
            raise FormatError(
                f"found scales from {low} to {high}, needed finite values that are not negative; fetch it again",
                rule=rule,
                tensor=name,
                file=self._checkpoint.tensors[name].shard,
            )
        return found

    def check_unchanged(self) -> None:
        """Compare every file with what was mapped.

        Raises:
            FormatError: S5, a file was written to or replaced in the meantime.
        """
        for path, version in self._versions.items():
            if _version(os.stat(path)) != version:
                raise _changed(path.name)

    def _map(self, shard: ShardReader) -> mmap.mmap:
        descriptor = os.open(shard.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            status = os.fstat(descriptor)
            checked = bytearray(shard.header.data_start)
            shard.read_at(0, memoryview(checked))
            if status.st_size != shard.size or os.pread(descriptor, len(checked), 0) != checked:
                raise _changed(shard.name)
            self._versions[shard.path] = _version(status)
            return mmap.mmap(descriptor, shard.size, access=mmap.ACCESS_COPY)
        finally:
            os.close(descriptor)


def _version(status: os.stat_result) -> Version:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _changed(name: str) -> FormatError:
    return FormatError("the file was changed while it was being loaded; load it again", rule="S5", file=name)
