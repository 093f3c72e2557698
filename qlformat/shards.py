"""Streaming safetensors files: one validator for every header, a positional reader, and a writer.

The reader and the writer use pread and pwrite, so threads share them without locks and memory stays bounded: no
file is ever mapped or held whole (spec/format.md, "Container", rules S1 to S7, P2 and P3).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from qlformat.errors import FormatError, shown
from qlformat.layout import element_count, strict_json

DTYPE_BITS: dict[str, int] = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}
"""safetensors dtype -> bits of one element."""

TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "C64": "complex64", "BOOL": "bool",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip
"""safetensors dtype -> torch name, for the dtypes of ordinary checkpoints."""

MAX_HEADER_BYTES = 100_000_000
MAX_NAME_BYTES = 4096
ALIGNMENT = 64
_PREFIX = 8
_WRITEBACK_BYTES = 64 << 20
_SYNC_FILE_RANGE_WRITE = 2
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file: safetensors dtype, shape, and its bytes [begin, end) within the data section."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Size of the tensor in bytes."""
        return self.end - self.begin


@dataclass(frozen=True)
class Header:
    """A validated header: tensors by name in file order, metadata, and where the data section starts."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    data_start: int


def header_length(prefix: bytes, file_size: int, file: str) -> int:
    """Length of the JSON header from the first 8 bytes of a file of `file_size` bytes (rule S1)."""
    if len(prefix) < _PREFIX or file_size < _PREFIX:
        raise FormatError(
            f"found {min(len(prefix), file_size)} bytes, a safetensors file has at least 8; fetch it again",
            rule="S1",
            file=file,
        )
    length = int.from_bytes(prefix[:_PREFIX], "little")
    if length > MAX_HEADER_BYTES:
        raise FormatError(
            f"the header claims {length} bytes, at most {MAX_HEADER_BYTES} are allowed; it is no sound safetensors",
            rule="S1",
            file=file,
        )
    if _PREFIX + length > file_size:
        raise FormatError(
            f"the header claims {length} bytes but the file has {file_size}; it is truncated, fetch it again",
            rule="S1",
            file=file,
        )
    return length


def parse_header(data: bytes, file_size: int, file: str) -> Header:
    """Validate the JSON header of a safetensors file.

    Args:
        data: the header's bytes, without the length prefix.
        file_size: size of the whole file in bytes.
        file: name for messages.

    Raises:
        FormatError: one of the rules S2 to S7.
    """
    if not data.startswith(b"{"):
        raise FormatError("the header does not start with '{'", rule="S2", file=file)
    try:
        entries = strict_json(data)
    except ValueError as error:
        raise FormatError(f"the header is not valid JSON: {error}", rule="S2", file=file) from None
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FormatError("__metadata__ is not a map of strings to strings", rule="S6", file=file)
    tensors = [_entry(name, fields, file) for name, fields in entries.items()]
    tensors.sort(key=lambda info: (info.begin, info.end))
    data_start = _PREFIX + len(data)
    _check_tiling(tensors, file_size - data_start, file)
    return Header({info.name: info for info in tensors}, metadata, data_start)


def _entry(name: str, fields: Any, file: str) -> TensorInfo:
    def bad(rule: str, message: str) -> FormatError:
        return FormatError(message, rule=rule, tensor=name[:200], file=file)

    try:
        size = len(name.encode("utf-8"))
    except UnicodeEncodeError:
        raise bad("S7", "the name is not valid Unicode") from None
    if not 1 <= size <= MAX_NAME_BYTES or _CONTROL.search(name):
        raise bad("S7", f"the name has {size} bytes or holds a control character, needed 1 to {MAX_NAME_BYTES} bytes")
    if not isinstance(fields, dict) or set(fields) != _ENTRY_KEYS:
        raise bad("S3", f"the entry must have exactly {sorted(_ENTRY_KEYS)}")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise bad("S3", f"found dtype {shown(dtype)}, needed a safetensors dtype")
    if not isinstance(shape, list) or any(type(dim) is not int or dim < 0 for dim in shape):
        raise bad("S3", f"found shape {shown(shape)}, needed a list of integers that are not negative")
    if not isinstance(offsets, list) or len(offsets) != 2 or any(type(o) is not int or o < 0 for o in offsets):
        raise bad("S3", f"found data_offsets {shown(offsets)}, needed [begin, end]")
    count = element_count(shape)
    if count >= 1 << 63 or max(shape, default=0) >= 1 << 63:
        raise bad("S3", f"found shape {shown(shape)}, its element count must be below 2**63")
    begin, end = offsets
    if (end - begin) * 8 != count * DTYPE_BITS[dtype]:
        raise bad(
            "S4", f"found {end - begin} bytes, {dtype} of shape {shown(shape)} needs {count * DTYPE_BITS[dtype] / 8:g}"
        )
    return TensorInfo(name, dtype, tuple(shape), begin, end)


def _check_tiling(tensors: Iterable[TensorInfo], data_size: int, file: str) -> None:
    position = 0
    for info in tensors:
        if info.begin != position:
            kind = "overlaps the one before it" if info.begin < position else "leaves a hole before it"
            raise FormatError(
                f"starts at byte {info.begin} of the data but {position} was expected: it {kind}",
                rule="S5",
                tensor=info.name,
                file=file,
            )
        position = info.end
    if position != data_size:
        problem = "truncated, fetch it again" if position > data_size else "longer than its header says"
        raise FormatError(
            f"the header describes {position} bytes of data, the file has {data_size}: it is {problem}",
            rule="S5",
            file=file,
        )


class ShardReader:
    """A safetensors file open for positional reads. Safe to share between threads.

    Raises:
        FormatError: the header breaks one of S1 to S7.
        OSError: the file cannot be opened or read.
    """

    def __init__(self, path: Path, name: str | None = None) -> None:
        self.path = path
        self.name = name or path.name
        # O_NONBLOCK: opening a FIFO that somebody planted must fail at the check below, not wait for a writer.
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            status = os.fstat(self._fd)
            if not stat.S_ISREG(status.st_mode):
                raise FormatError("this is not a regular file", rule="R4", file=self.name)
            self.size = status.st_size
            self._changed_ns = status.st_mtime_ns
            length = header_length(os.pread(self._fd, _PREFIX, 0), self.size, self.name)
            self.header = parse_header(os.pread(self._fd, length, _PREFIX), self.size, self.name)
        except BaseException:
            self.close()
            raise

    def read_into(self, info: TensorInfo, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` (bytes) with the tensor's bytes from `offset` on."""
        if offset < 0 or offset + buffer.nbytes > info.nbytes:
            raise FormatError(f"bytes past the end of {info.nbytes} were asked for", rule="S5", tensor=info.name)
        self.read_at(self.header.data_start + info.begin + offset, buffer)

    def read_at(self, position: int, buffer: memoryview) -> None:
        """Fill `buffer` with the file's bytes from `position` on."""
        done = 0
        while done < buffer.nbytes:
            count = os.preadv(self._fd, [buffer[done:]], position + done)
            if count == 0:
                raise FormatError("the file became shorter while it was read", rule="S5", file=self.name)
            done += count

    def fileno(self) -> int:
        """The file's descriptor, for positional reads."""
        return self._fd

    def prefetch(self, info: TensorInfo, offset: int, size: int) -> None:
        """Have the system read `size` bytes of a tensor from `offset` on in the background, where it can."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd, self.header.data_start + info.begin + offset, size, os.POSIX_FADV_WILLNEED)

    def check_unchanged(self) -> None:
        """Compare size and time of the last change with those when the file was opened.

        Raises:
            FormatError: S5, somebody wrote to it. A file that was replaced by renaming is still read as it was.
        """
        status = os.fstat(self._fd)
        if (status.st_size, status.st_mtime_ns) != (self.size, self._changed_ns):
            raise FormatError("the file was changed while it was read; run it again", rule="S5", file=self.name)

    def end_position(self, info: TensorInfo) -> int:
        """Position in the file just behind the tensor's bytes."""
        return self.header.data_start + info.end

    def header_bytes(self) -> bytes:
        """The file's bytes before its data: the length of the header, the header and its padding."""
        data = bytearray(self.header.data_start)
        self.read_at(0, memoryview(data))
        return bytes(data)

    def read(self, info: TensorInfo) -> bytearray:
        """All bytes of a tensor."""
        data = bytearray(info.nbytes)
        self.read_into(info, 0, memoryview(data))
        return data

    def close(self) -> None:
        """Close the file; reading afterwards is an error."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor to be written: its dtype and shape, or, for a quant_state, only an upper bound of its size.

    Attributes:
        packed: a packed weight, to be aligned where its size allows.
        late: the shape is [at most this many bytes]; the real size is known when the bytes are.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    packed: bool = False
    late: bool = False

    @property
    def nbytes(self) -> int:
        """Size in bytes (an upper bound when late)."""
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8

    def _order(self) -> tuple[int, str]:
        if self.late:
            return 6, self.name
        if self.packed:
            return (0 if self.nbytes % ALIGNMENT == 0 else 4), self.name
        return {64: 1, 32: 2, 16: 3}.get(DTYPE_BITS[self.dtype], 5), self.name


def file_order(specs: Iterable[TensorSpec]) -> list[TensorSpec]:
    """The order of the tensors in a shard: aligned packed weights first, quant_states last (rules P2 and P3)."""
    return sorted(specs, key=TensorSpec._order)


@functools.cache
def _sync_file_range() -> Callable[..., int] | None:
    """Linux' sync_file_range, or None on other systems."""
    return getattr(ctypes.CDLL(None), "sync_file_range", None)


def _start_writeback(fd: int) -> None:
    """Ask the system to begin writing what is not on the disk yet; `flush` then has less to wait for."""
    begin = _sync_file_range()
    if begin is not None:
        begin(fd, ctypes.c_int64(0), ctypes.c_int64(0), ctypes.c_uint(_SYNC_FILE_RANGE_WRITE))


class ShardWriter:
    """A safetensors file whose tensors may be written in any order, from any thread.

    Space for the header is reserved for the longest quant_states possible, so the offsets of all other tensors are
    known before the first byte is written. `finish` writes the quant_states and the header.
    """

    def __init__(self, path: Path, specs: Iterable[TensorSpec]) -> None:
        self.path = path
        self._specs = file_order(specs)
        self._late: dict[str, bytes] = {}
        self._offsets: dict[str, int] = {}
        self._unflushed = 0
        position = 0
        for spec in self._specs:
            self._offsets[spec.name] = position
            position += 0 if spec.late else spec.nbytes
        self._late_start = position
        self.data_start = _PREFIX + len(self._header({s.name: s.nbytes for s in self._specs}, 0))
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)

    def write(self, name: str, offset: int, data: memoryview | bytes) -> None:
        """Write bytes of a tensor at `offset` within it."""
        view = memoryview(data)
        self._write_at(self.data_start + self._offsets[name] + offset, view)
        self._unflushed += view.nbytes  # a count lost between two threads does not matter
        if self._unflushed >= _WRITEBACK_BYTES:
            self._unflushed = 0
            _start_writeback(self._fd)

    def write_late(self, name: str, data: bytes) -> None:
        """Set the bytes of a late tensor; they reach the file in `finish`."""
        self._late[name] = data

    def read_back(self, name: str, offset: int, buffer: memoryview) -> int:
        """Read bytes of a tensor back from the file; the count read is returned."""
        return os.preadv(self._fd, [buffer], self.data_start + self._offsets[name] + offset)

    def finish(self) -> tuple[int, str]:
        """Write the quant_states and the header, and cut the file to its size.

        Returns:
            The size in bytes, and the sha256 of the bytes before the data, as a manifest holds it.
        """
        position = self.data_start + self._late_start
        for spec in self._specs:
            if spec.late:
                self._write_at(position, memoryview(self._late[spec.name]))
                position += len(self._late[spec.name])
        sizes = {s.name: len(self._late[s.name]) if s.late else s.nbytes for s in self._specs}
        header = self._header(sizes, self.data_start - _PREFIX)
        head = len(header).to_bytes(_PREFIX, "little") + header
        self._write_at(0, memoryview(head))
        os.ftruncate(self._fd, position)
        return position, hashlib.sha256(head).hexdigest()

    def flush(self) -> None:
        """Wait until the file is on the disk."""
        os.fsync(self._fd)

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _header(self, sizes: Mapping[str, int], length: int) -> bytes:
        """The JSON header, padded with spaces to `length` bytes or, with 0, so that the data starts aligned."""
        # Entry by entry: as one tree of objects it would be the largest thing in memory for a model of many tensors.
        entries = ['"__metadata__":{"format":"pt"}']
        position = 0
        for spec in self._specs:
            shape = [sizes[spec.name]] if spec.late else list(spec.shape)
            end = position + sizes[spec.name]
            entry = {"dtype": spec.dtype, "shape": shape, "data_offsets": [position, end]}
            entries.append(f"{json.dumps(spec.name, ensure_ascii=False)}:{json.dumps(entry, separators=(',', ':'))}")
            position = end
        text = f"{{{','.join(entries)}}}".encode()
        return text.ljust(length or -(-(_PREFIX + len(text)) // ALIGNMENT) * ALIGNMENT - _PREFIX)

    def _write_at(self, position: int, data: memoryview) -> None:
        done = 0
        while done < data.nbytes:
            done += os.pwrite(self._fd, data[done:], position + done)
