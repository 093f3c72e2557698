"""Move one weight from the source to its shard in chunks: read, quantize, hash, write."""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import numpy.typing as npt

from qlformat import codec, reference
from qlformat.codebook import CODEBOOKS, DYNAMIC8
from qlformat.errors import SourceError
from qlformat.hashing import Digest
from qlformat.journal import StoredWeight
from qlformat.layout import NESTED_BLOCKSIZE, QuantState, quant_state_name
from qlformat.native import NonFiniteError
from qlformat.plan import Item
from qlformat.progress import ProgressMeter
from qlformat.shards import ShardWriter
from qlformat.workers import Stopped, run_all

CHUNK_ELEMENTS = 1 << 20
"""Elements quantized at a time: a multiple of every blocksize, small enough for the CPU caches."""
CHUNK_BYTES = 2 << 20

F32 = npt.NDArray[np.float32]

_MOMENTS_BYTES = 12
_BLOCKS_IN_MEMORY = 3 << 16
"""Most blocks of a weight whose moments stay in memory (2.4 MB): a multiple of 256, and at least those of a chunk."""
_BLOCKS_AT_A_TIME = 1 << 14
"""Blocks whose moments are read back together where they do not: a multiple of 256."""

_NUMPY: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(np.uint16),
}


class Rounded(Protocol):
    """A weight whose codes and scales are chosen."""

    @property
    def packed(self) -> npt.NDArray[np.uint8]:
        """Codes, uint8 [ceil(n/2)]."""

    @property
    def absmax(self) -> F32:
        """Scales before double quantization, float32 [blocks]."""


class TensorStream:
    """Writes weights into their shards; one instance serves all workers.

    Args:
        directory: for scratch files.
        writers: of the shards.
        meter: told what is done.
        digest: for weights that are not quantized. What a manifest is to hold is sha256.

    Attributes:
        stop: set it to make all workers give up at their next chunk.
    """

    def __init__(
        self,
        directory: Path,
        writers: Sequence[ShardWriter],
        meter: ProgressMeter,
        digest: Callable[[], Digest] = hashlib.sha256,
    ) -> None:
        self._directory = directory
        self._writers = writers
        self._meter = meter
        self._digest = digest
        self._local = threading.local()
        self._scratch_files: list[IO[bytes]] = []
        self.stop = threading.Event()

    def write(self, item: Item, rounded: Rounded | None = None) -> StoredWeight:
        """Store one weight.

        Args:
            rounded: its codes and absmax, when they are chosen already.

        Raises:
            SourceError: rule E1, NaN or infinity in a weight to be quantized.
        """
        return self._copy(item) if item.state is None else self._quantize(item, item.state, rounded)

    def run(self, tasks: Iterable[Callable[[], None]], threads: int) -> None:
        """Run tasks that write weights, and raise the first error; the others give up at their next chunk then."""
        run_all(tasks, threads, self.stop)

    def release_buffers(self) -> None:
        """Let go of the calling worker's buffers; they are made again when they are needed."""
        for use in ("copy", "source", "packed", "moments"):
            self._local.__dict__.pop(use, None)

    def close(self) -> None:
        """Close the workers' scratch files."""
        for file in self._scratch_files:
            file.close()

    def is_intact(self, item: Item, stored: StoredWeight) -> bool:
        """Whether an interrupted run's bytes of a weight are all in the file (its quant_state is in the journal)."""
        buffer = self._buffer("copy", CHUNK_BYTES).data
        for spec in item.specs:
            if spec.late:
                continue
            digest = hashlib.sha256() if item.state else self._digest()
            for offset in range(0, spec.nbytes, CHUNK_BYTES):
                self._check_stop()
                part = buffer[: min(CHUNK_BYTES, spec.nbytes - offset)]
                if self._writers[item.shard].read_back(spec.name, offset, part) != part.nbytes:
                    return False
                digest.update(part)
            if digest.hexdigest() != stored.sha256.get(spec.name):
                return False
        if stored.quant_state is not None and item.state is not None:
            name = quant_state_name(item.name, item.state.quant_type)
            self._writers[item.shard].write_late(name, stored.quant_state.encode())
        self._meter.add(item.tensor.nbytes, 1)
        return True

    def _copy(self, item: Item) -> StoredWeight:
        digest = self._digest()
        buffer = self._buffer("copy", CHUNK_BYTES).data
        for offset in range(0, item.tensor.nbytes, CHUNK_BYTES):
            self._check_stop()
            part = buffer[: min(CHUNK_BYTES, item.tensor.nbytes - offset)]
            item.tensor.read_into(offset, part)
            digest.update(part)
            self._writers[item.shard].write(item.name, offset, part)
            self._written(item, offset, part)
            self._meter.add(part.nbytes)
        self._meter.add(0, 1)
        return StoredWeight(item.name, {item.name: digest.hexdigest()})

    def _written(self, item: Item, offset: int, part: memoryview) -> None:
        """For subclasses: bytes of a weight that is not quantized have been written, in order."""

    def _quantize(self, item: Item, state: QuantState, rounded: Rounded | None) -> StoredWeight:
        if rounded is None:
            absmax = np.empty(state.blocks, dtype=np.float32)
            packed_sha256 = self._pack(item, state, absmax)
        else:
            absmax = rounded.absmax
            packed_sha256 = self._put(item, state, rounded.packed)
        companions: dict[str, npt.NDArray[Any]] = {
            f"{item.name}.absmax": absmax,
            f"{item.name}.quant_map": CODEBOOKS[state.quant_type].values,
        }
        nested = None
        if state.nested:
            nested = codes, nested_absmax, offset = codec.double_quantize(absmax)
            companions[f"{item.name}.absmax"] = codes
            companions[f"{item.name}.nested_absmax"] = nested_absmax
            companions[f"{item.name}.nested_quant_map"] = DYNAMIC8
            state = replace(state, nested_offset=float(offset))
        sums = self._squared_error(state, absmax, nested)
        return self._companions(item, state, companions, packed_sha256, sums)

    def _pack(self, item: Item, state: QuantState, absmax: F32) -> str:
        """Quantize in chunks, filling absmax and keeping the moments; returns the sha256 of the packed bytes."""
        digest = hashlib.sha256()
        packed = self._buffer("packed", CHUNK_ELEMENTS // 2)
        whole = self._transposed(item, state) if item.transpose else None
        for start in range(0, state.elements, CHUNK_ELEMENTS):
            self._check_stop()
            count = min(CHUNK_ELEMENTS, state.elements - start)
            values = self._read(item, state, start, count) if whole is None else whole[start : start + count]
            first = start // state.blocksize
            blocks = slice(first, first + -(-count // state.blocksize))
            out = packed[: -(-count // 2)]
            moments = self._moments(state, blocks)
            try:
                codec.quantize(
                    values, dtype=state.dtype, quant_type=state.quant_type, blocksize=state.blocksize,
                    packed=out, absmax=absmax[blocks], moments=moments,
                )  # fmt: skip
            except NonFiniteError as error:
                raise self._located(item, state, first + error.block) from None
            if state.blocks > _BLOCKS_IN_MEMORY:
                os.pwrite(self._scratch(), moments.data, first * _MOMENTS_BYTES)
            self._writers[item.shard].write(item.name, start // 2, out.data)
            digest.update(out.data)
            self._meter.add(values.nbytes)
        self._meter.add(0, 1)
        return digest.hexdigest()

    def _put(self, item: Item, state: QuantState, packed: npt.NDArray[np.uint8]) -> str:
        """Write codes that are chosen already, keeping their moments; returns the sha256 of the packed bytes."""
        digest = hashlib.sha256()
        whole = self._transposed(item, state) if item.transpose else None
        for start in range(0, state.elements, CHUNK_ELEMENTS):
            self._check_stop()
            count = min(CHUNK_ELEMENTS, state.elements - start)
            values = self._read(item, state, start, count) if whole is None else whole[start : start + count]
            first = start // state.blocksize
            moments = self._moments(state, slice(first, first + -(-count // state.blocksize)))
            part = packed[start // 2 : start // 2 + -(-count // 2)]
            values = reference.to_float32(values, state.dtype)
            moments[...] = reference.block_moments(values, part, state.quant_type, state.blocksize)
            if state.blocks > _BLOCKS_IN_MEMORY:
                os.pwrite(self._scratch(), moments.data, first * _MOMENTS_BYTES)
            self._writers[item.shard].write(item.name, start // 2, part.data)
            digest.update(part.data)
            self._meter.add(count * _NUMPY[state.dtype].itemsize)
        self._meter.add(0, 1)
        return digest.hexdigest()

    def _read(self, item: Item, state: QuantState, start: int, count: int) -> npt.NDArray[Any]:
        dtype = _NUMPY[state.dtype]
        values: npt.NDArray[Any] = self._buffer("source", CHUNK_ELEMENTS * 4)[: count * dtype.itemsize].view(dtype)
        item.tensor.read_into(start * dtype.itemsize, values.data.cast("B"))
        return values

    def _transposed(self, item: Item, state: QuantState) -> npt.NDArray[Any]:
        """A Conv1D weight, turned from [in, out] to [out, in] and flattened; it is held whole."""
        whole = np.empty(item.tensor.shape, dtype=_NUMPY[state.dtype])
        item.tensor.read_into(0, whole.data.cast("B"))
        return codec.transpose(whole).reshape(-1)

    def _squared_error(
        self, state: QuantState, absmax: F32, nested: tuple[npt.NDArray[np.uint8], F32, np.float32] | None
    ) -> tuple[float, float]:
        """Squared error and norm of the weight just packed, from its moments."""
        sums = (0.0, 0.0)
        step = _BLOCKS_IN_MEMORY if state.blocks <= _BLOCKS_IN_MEMORY else _BLOCKS_AT_A_TIME
        for first in range(0, state.blocks, step):  # every piece begins with a nested block
            blocks = slice(first, min(first + step, state.blocks))
            moments = self._moments(state, blocks)
            if state.blocks > _BLOCKS_IN_MEMORY:
                os.preadv(self._scratch(), [moments.data.cast("B")], first * _MOMENTS_BYTES)
            decoded = absmax[blocks]
            if nested is not None:
                codes, nested_absmax, offset = nested
                groups = slice(first // NESTED_BLOCKSIZE, -(-blocks.stop // NESTED_BLOCKSIZE))
                decoded = codec.double_dequantize(codes[blocks], nested_absmax[groups], offset)
            sums = codec.squared_error(decoded, moments, sums)
        return sums

    def _companions(
        self,
        item: Item,
        state: QuantState,
        companions: dict[str, npt.NDArray[Any]],
        packed_sha256: str,
        sums: tuple[float, float],
    ) -> StoredWeight:
        writer = self._writers[item.shard]
        text = state.to_json()
        sha256 = {}
        for spec in item.specs:  # whose names are kept, not copies of them: a model has thousands
            if spec.packed:
                sha256[spec.name] = packed_sha256
            elif spec.late:
                writer.write_late(spec.name, text)
                sha256[spec.name] = hashlib.sha256(text).hexdigest()
            else:
                data = np.ascontiguousarray(companions[spec.name]).data.cast("B")
                writer.write(spec.name, 0, data)
                sha256[spec.name] = hashlib.sha256(data).hexdigest()
        return StoredWeight(item.name, sha256, text.decode(), *sums)

    def _located(self, item: Item, state: QuantState, block: int) -> SourceError:
        first = block * state.blocksize
        last = min(first + state.blocksize, state.elements) - 1
        return SourceError(
            f"found NaN or infinity in elements {first} to {last} of {state.elements}, needed finite values; "
            f"repair the source, or leave it out with --skip {item.name}",
            rule="E1", tensor=item.name, file=item.tensor.file,
        )  # fmt: skip

    def _moments(self, state: QuantState, blocks: slice) -> F32:
        """The worker's buffer for the moments of some blocks, float32 [blocks, 3]; a small weight has room for all."""
        start = blocks.start * _MOMENTS_BYTES if state.blocks <= _BLOCKS_IN_MEMORY else 0
        size = (blocks.stop - blocks.start) * _MOMENTS_BYTES
        buffer = self._buffer("moments", _BLOCKS_IN_MEMORY * _MOMENTS_BYTES)
        return buffer[start : start + size].view(np.float32).reshape(-1, 3)

    def _scratch(self) -> int:
        """Descriptor of this worker's scratch file, which has no name.

        It holds the moments of a large weight: they are wanted again only when the whole tensor's absmax is known, and
        in memory they would grow with the largest tensor.
        """
        if not hasattr(self._local, "scratch"):
            file = tempfile.TemporaryFile(dir=self._directory, buffering=0)  # noqa: SIM115 (open until close())
            self._scratch_files.append(file)
            self._local.scratch = file.fileno()
        descriptor: int = self._local.scratch
        return descriptor

    def _buffer(self, use: str, size: int) -> npt.NDArray[np.uint8]:
        """A buffer of this worker, made once."""
        found: npt.NDArray[np.uint8] | None = getattr(self._local, use, None)
        if found is None:
            found = np.empty(size, dtype=np.uint8)
            setattr(self._local, use, found)
        return found

    def _check_stop(self) -> None:
        if self.stop.is_set():
            raise Stopped
