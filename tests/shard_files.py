"""safetensors and JSON files for tests, written and changed with struct and json alone. Nothing is checked here."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlformat.manifest import seal

SINGLE = "model.safetensors"
DTYPE_BYTES = {
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
"""Bytes of an element where it is more than one."""


@dataclass(frozen=True)
class Tensor:
    """A stored tensor: safetensors dtype, shape and little-endian bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


def shard_name(position: int, count: int) -> str:
    """File name of a shard: model.safetensors when it is the only one."""
    return SINGLE if count == 1 else f"model-{position + 1:05d}-of-{count:05d}.safetensors"


def file_class(name: str, tensors: Mapping[str, Tensor]) -> int:
    """Class of a tensor in the order of a shard (format.md, "Order in a shard")."""
    tensor = tensors[name]
    if ".quant_state." in name:
        return 6
    if f"{name}.absmax" in tensors or f"{name}.quant_map" in tensors:
        return 0 if len(tensor.data) % 64 == 0 else 4
    return {8: 1, 4: 2, 2: 3}.get(DTYPE_BYTES.get(tensor.dtype, 1), 5)


def shard_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """A safetensors file in the order and with the alignment of the spec."""
    names = sorted(tensors, key=lambda name: (file_class(name, tensors), name))
    sizes = {name: len(tensors[name].data) for name in names}
    reserved = {name: reserved_size(tensors[name].data) for name in names if ".quant_state." in name}
    length = len(header_text(tensors, names, {**sizes, **reserved}))
    length += -(8 + length) % 64
    header = header_text(tensors, names, sizes).ljust(length)
    return container_bytes(header, b"".join(tensors[name].data for name in names))


def header_text(tensors: Mapping[str, Tensor], names: Iterable[str], sizes: Mapping[str, int]) -> bytes:
    """The header of a shard that holds `names` in this order, without padding."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        begin, end = end, end + sizes[name]
        shape = [sizes[name]] if ".quant_state." in name else list(tensors[name].shape)
        entries[name] = {"dtype": tensors[name].dtype, "shape": shape, "data_offsets": [begin, end]}
    return json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()


def reserved_size(state: bytes) -> int:
    """Bytes that the header counts for a quant_state (format.md, "Header length")."""
    without_offset, mark, _ = state.rpartition(b": ")
    return len(without_offset) + len(mark) + 28 if b"nested_offset" in without_offset else len(state)


def container_bytes(header: Mapping[str, Any] | bytes, data: bytes, align: int = 64) -> bytes:
    """A safetensors file from its header (an object, or raw bytes to be taken as they are) and data section."""
    if not isinstance(header, bytes):
        header = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        header += b" " * (-(8 + len(header)) % align)
    return struct.pack("<Q", len(header)) + header + data


def read_container(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data section of a safetensors file; nothing is checked."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header: dict[str, Any] = json.loads(raw[8 : 8 + length])
    return header, raw[8 + length :]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a sound safetensors file."""
    header, data = read_container(path)
    return {
        name: Tensor(entry["dtype"], tuple(entry["shape"]), data[slice(*entry["data_offsets"])])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def json_bytes(value: object) -> bytes:
    """The JSON text that config.json and the index have here."""
    return (json.dumps(value, sort_keys=True) + "\n").encode()


def edit_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Let `change` alter the header of a safetensors file; the data section stays as it is."""
    header, data = read_container(path)
    change(header)
    path.write_bytes(container_bytes(header, data))


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Let `change` alter a JSON file: config.json, the index or qlf.json."""
    value = json.loads(path.read_bytes())
    change(value)
    data = json_bytes(value)
    path.write_bytes(seal(data) if path.name == "qlf.json" else data)


def flip_bit(path: Path, position: int, bit: int = 0) -> None:
    """Flip one bit of a file."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)
