"""The hashes of a shard and of every tensor in it, in one pass over its bytes."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qlformat import native_sha256
from qlformat.errors import FormatError
from qlformat.hashing import CHUNK_BYTES
from qlformat.shards import ShardReader
from qlformat.workers import Stopped


@dataclass(frozen=True)
class ShardHashes:
    """Hexadecimal sha256 of a shard, and of its tensors by name."""

    sha256: str
    tensors: dict[str, str]


def hash_shard(path: Path, stop: threading.Event) -> ShardHashes:
    """Hash a safetensors file; memory is one small buffer.

    Args:
        path: the file.
        stop: set it in another thread to give up.

    Raises:
        FormatError: it is no safetensors file (S1 to S7), or became shorter meanwhile.
        OSError: it cannot be read.
        Stopped: `stop` was set.
    """
    with ShardReader(path) as shard:
        start = shard.header.data_start
        # By place: the tensors tile the data, and the file ends with the last one (S5).
        infos = sorted(shard.header.tensors.values(), key=lambda info: (info.begin, info.end))
        ends = [start, *(start + info.end for info in infos)]
        if native_sha256.supported():
            found = native_sha256.hash_parts(shard.fileno(), ends, stop)
            if found is None:
                raise FormatError("the file became shorter while it was read", rule="S5", file=shard.name)
        else:
            found = _hash_parts(shard, ends, stop)
        whole, (_, *parts) = found
        return ShardHashes(whole, dict(zip((info.name for info in infos), parts, strict=True)))


def _hash_parts(shard: ShardReader, ends: Sequence[int], stop: threading.Event) -> tuple[str, list[str]]:
    """What native_sha256.hash_parts gives, in twice the time."""
    whole, parts = hashlib.sha256(), []
    buffer = memoryview(bytearray(CHUNK_BYTES))
    for begin, end in zip((0, *ends), ends, strict=False):
        part = hashlib.sha256()
        for position in range(begin, end, CHUNK_BYTES):
            if stop.is_set():
                raise Stopped
            data = buffer[: min(CHUNK_BYTES, end - position)]
            shard.read_at(position, data)
            whole.update(data)
            part.update(data)
        parts.append(part.hexdigest())
    return whole.hexdigest(), parts
