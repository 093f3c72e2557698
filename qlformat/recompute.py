"""Quantize the source of a checkpoint again and compare, bit for bit (rules E5 and E6)."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import numpy.typing as npt

from qlformat import codec, reference
from qlformat.checkpoint import CHUNK_ELEMENTS, NUMPY_DTYPES, Checkpoint
from qlformat.codebook import DYNAMIC8, DYNAMIC8_THRESHOLDS
from qlformat.errors import FormatError, SourceError
from qlformat.hashing import hash_file
from qlformat.layout import NESTED_BLOCKSIZE, QuantState, quant_state_name
from qlformat.manifest import FILE_NAME, FileEntry, WeightEntry
from qlformat.reference import SMALLEST_DIVISOR
from qlformat.shards import TORCH_NAMES
from qlformat.source import Source, SourceTensor
from qlformat.weights import Report, Severity, Weight

_CHUNK_BYTES = 2 << 20
_MEAN_TOLERANCE = np.float32(1e-4)
"""bitsandbytes sums absmax in float32, in an order that depends on its threads: its nested_offset is off by little."""
_CELL = 1 / 32767.5
"""Width of a cell of bitsandbytes' 8-bit encoder, in values scaled to [-1, 1]."""

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
AnyArray = npt.NDArray[np.generic]


class SourceComparison:
    """Compares every weight of a checkpoint with the source.

    What qlformat wrote must be equal to the last bit. In a repository that bitsandbytes wrote, the packed codes and
    plain absmax must be; its double quantization differs in the last bits by design (see `_compare_foreign`), and
    weights that were cast while loading cannot be compared: both are notes.

    Attributes:
        bytes_total: bytes that the tasks read from the source.
    """

    def __init__(self, checkpoint: Checkpoint, source: Source, report: Report) -> None:
        self._checkpoint = checkpoint
        self._source = source
        self._report = report
        self._foreign = not checkpoint.has_manifest
        recorded = checkpoint.manifest.weights if checkpoint.manifest else ()
        self._recorded = {entry.name: entry for entry in recorded}
        self._calibrated = checkpoint.manifest is not None and checkpoint.manifest.calibration is not None
        self._stop = threading.Event()
        self.bytes_total = sum(tensor.nbytes for tensor in source.tensors.values())

    def tasks(self, stop: threading.Event) -> list[Callable[[], None]]:
        """Pieces of work for any thread; they give up when `stop` is set."""
        self._stop = stop
        found: list[Callable[[], None]] = []
        if self._calibrated:
            message = "its codes were chosen with a calibration text: compared by their error figures only"
            self._report(FormatError(message, rule="E5", file=FILE_NAME), "note")
        if self._checkpoint.manifest is not None:
            found += self._file_tasks(self._checkpoint.manifest.source.files)
        for name, weight in self._checkpoint.weights.items():
            tensor = self._source.tensors.get(name)
            if tensor is None:
                self._bad("the source has no such tensor", name, self._lesser())
            else:
                found.append(partial(self._compare, weight, tensor))
        stored = self._checkpoint.tensors
        for name in self._source.tensors:
            if name not in stored:
                self._bad("the source has this tensor, the checkpoint lacks it", name, self._lesser())
        return found

    def _file_tasks(self, recorded: tuple[FileEntry, ...]) -> Iterator[Callable[[], None]]:
        paths = dict(self._source.files)
        if not recorded:
            return  # hashes are recorded on request; E5 has compared every weight
        for entry in recorded:
            if entry.name in paths:
                yield partial(self._compare_file, entry)
            else:
                self._report(FormatError("qlf.json names it, the source lacks it", rule="E6", file=entry.name))
        for name in paths.keys() - {entry.name for entry in recorded}:
            self._report(FormatError("the source has this file, qlf.json does not name it", rule="E6", file=name))

    def _compare_file(self, entry: FileEntry) -> None:
        size, digest = hash_file(dict(self._source.files)[entry.name])
        if (size, digest) != (entry.size, entry.sha256):
            message = f"found {size} bytes with sha256 {digest}, qlf.json says {entry.size} with {entry.sha256}"
            self._report(FormatError(message, rule="E6", file=entry.name))

    def _compare(self, weight: Weight, tensor: SourceTensor) -> None:
        shape = tuple(reversed(tensor.shape)) if weight.transposed else tensor.shape
        dtype = TORCH_NAMES.get(tensor.dtype, tensor.dtype)
        if shape != weight.shape:
            message = f"the source has shape {list(tensor.shape)}, the checkpoint {list(weight.shape)}"
            self._bad(message, weight.name)
        elif dtype != weight.dtype:
            message = f"the source has {dtype}, the checkpoint {weight.dtype}: not compared"
            self._bad(message, weight.name, self._lesser())
        elif weight.quant_state is None:
            self._compare_plain(weight, tensor)
        elif self._calibrated:
            self._compare_calibrated(weight, weight.quant_state, tensor)
        else:
            self._compare_quantized(weight, weight.quant_state, tensor)

    def _compare_plain(self, weight: Weight, tensor: SourceTensor) -> None:
        for offset in range(0, tensor.nbytes, _CHUNK_BYTES):
            if self._stop.is_set():
                return
            size = min(_CHUNK_BYTES, tensor.nbytes - offset)
            data = np.empty(size, dtype=np.uint8)
            tensor.read_into(offset, data.data)
            if not np.array_equal(data, self._checkpoint.read_part(weight.name, offset, size)):
                self._bad("its bytes differ from those of the source", weight.name)
                return

    def _compare_calibrated(self, weight: Weight, state: QuantState, tensor: SourceTensor) -> None:
        """The error figures alone: codes chosen with a calibration text cannot be had from the source."""
        sums = (0.0, 0.0)
        for start, values in self._chunks(weight, state, tensor):
            if self._stop.is_set():
                return
            first, last = start // state.blocksize, -(-(start + values.size) // state.blocksize)
            packed = self._checkpoint.read_part(weight.name, start // 2, -(-values.size // 2))
            wide = reference.to_float32(values, state.dtype)
            moments = reference.block_moments(wide, packed.view(np.uint8), state.quant_type, state.blocksize)
            sums = codec.squared_error(self._checkpoint.absmax(weight, first, last), moments, sums)
        self._compare_error(weight, state, sums)

    def _compare_quantized(self, weight: Weight, state: QuantState, tensor: SourceTensor) -> None:
        absmax = np.empty(state.blocks, dtype=np.float32)
        sums = (0.0, 0.0)
        differing, first_differing = 0, 0
        for start, values in self._chunks(weight, state, tensor):
            if self._stop.is_set():
                return
            blocks = slice(start // state.blocksize, -(-(start + values.size) // state.blocksize))
            moments = np.empty((blocks.stop - blocks.start, 3), dtype=np.float32)
            try:
                packed, _ = codec.quantize(
                    values,
                    dtype=state.dtype,
                    quant_type=state.quant_type,
                    blocksize=state.blocksize,
                    absmax=absmax[blocks],
                    moments=moments,
                )
            except SourceError as error:
                self._report(FormatError(f"in the source: {error.message}", rule="E1", tensor=weight.name))
                return
            wrong = packed != self._checkpoint.read_part(weight.name, start // 2, packed.size)
            if wrong.any():
                first_differing = first_differing if differing else start + 2 * int(wrong.argmax())
                differing += int(wrong.sum())
            decoded = self._checkpoint.absmax(weight, blocks.start, blocks.stop)
            sums = codec.squared_error(decoded, moments, sums)
        if differing:
            message = f"{differing} of {-(-state.elements // 2)} packed bytes differ from the source's"
            self._bad(f"{message}, the first at element {first_differing}", weight.name)
        self._compare_absmax(weight, state, absmax)
        if not differing:
            self._compare_error(weight, state, sums)

    def _chunks(self, weight: Weight, state: QuantState, tensor: SourceTensor) -> Iterator[tuple[int, AnyArray]]:
        """(first element, values) of the source as the encoder saw it; a Conv1D is held whole to be transposed."""
        dtype = NUMPY_DTYPES[state.dtype]
        whole = None
        if weight.transposed:
            matrix = np.empty(tensor.shape, dtype=dtype)
            tensor.read_into(0, memoryview(matrix.reshape(-1).view(np.uint8).data))
            whole = codec.transpose(matrix).reshape(-1)
        for start in range(0, state.elements, CHUNK_ELEMENTS):
            count = min(CHUNK_ELEMENTS, state.elements - start)
            if whole is not None:
                yield start, whole[start : start + count]
                continue
            raw = np.empty(count * dtype.itemsize, dtype=np.uint8)
            tensor.read_into(start * dtype.itemsize, raw.data)
            yield start, raw.view(dtype)

    def _compare_absmax(self, weight: Weight, state: QuantState, absmax: F32) -> None:
        name = f"{weight.name}.absmax"
        if not state.nested:
            if self._checkpoint.read(name) != absmax.astype("<f4").tobytes():
                self._bad("it differs from the source's", name)
            return
        if self._foreign:
            self._compare_foreign(weight, state, absmax)
            return
        codes, nested, offset = codec.double_quantize(absmax)
        for stored, needed in ((name, codes), (f"{weight.name}.nested_absmax", nested)):
            if self._checkpoint.read(stored) != needed.tobytes():
                self._bad("it differs from the source's", stored)
        if float(offset) != state.nested_offset:
            stored = quant_state_name(weight.name, state.quant_type)
            self._bad(f"nested_offset is {state.nested_offset!r}, the source's is {float(offset)!r}", stored)

    def _compare_foreign(self, weight: Weight, state: QuantState, absmax: F32) -> None:
        """bitsandbytes' double quantization: its own mean, and codes as near as ours but for its encoder's cells."""
        offset = np.float32(state.nested_offset)
        mean = np.float32(absmax.mean(dtype=np.float64))
        near, far = 0, 0
        sound = abs(offset - mean) <= _MEAN_TOLERANCE * mean
        for first in range(0, state.blocks, CHUNK_ELEMENTS):
            last = min(first + CHUNK_ELEMENTS, state.blocks)
            nested = self._scales(weight, first, last)
            residual = absmax[first:last] - offset
            largest = np.maximum.reduceat(np.abs(residual), np.arange(0, residual.size, NESTED_BLOCKSIZE))
            sound &= np.allclose(nested, largest, rtol=1e-5, atol=0)
            codes = self._checkpoint.read_part(f"{weight.name}.absmax", first, last - first)
            found = _other_codes(codes, residual, largest)
            near, far = near + found[0], far + found[1]
        if not sound:
            self._bad("nested_offset or nested_absmax does not fit the source", f"{weight.name}.nested_absmax")
        elif far:
            message = f"{far} of {state.blocks} codes are not the nearest to the source's absmax"
            self._bad(message, f"{weight.name}.absmax")
        elif near or offset != mean:
            message = f"as bitsandbytes rounds it: {near} of {state.blocks} codes differ from ours and are as near"
            self._bad(message, f"{weight.name}.absmax", "note")

    def _scales(self, weight: Weight, first: int, last: int) -> F32:
        """nested_absmax of blocks [first, last), `first` a multiple of 256."""
        begin, end = first // NESTED_BLOCKSIZE, -(-last // NESTED_BLOCKSIZE)
        stored: F32 = self._checkpoint.read_part(f"{weight.name}.nested_absmax", begin * 4, (end - begin) * 4).view(
            "<f4"
        )
        return stored

    def _compare_error(self, weight: Weight, state: QuantState, sums: tuple[float, float]) -> None:
        entry = self._recorded.get(weight.name)
        if entry is None:
            return
        error, signal = max(sums[0], 0.0), sums[1]
        rms = math.sqrt(error / state.elements)
        relative = math.sqrt(error / signal) if signal else 0.0
        for kind, found, recorded in _error_figures(entry, rms, relative):
            if recorded not in (found, float(f"{found:.6g}")):
                message = f"{kind} is {recorded!r} in qlf.json, the source gives {found:.6g}"
                self._report(FormatError(message, rule="E5", tensor=weight.name, file=FILE_NAME))

    def _lesser(self) -> Severity:
        return "note" if self._foreign else "error"

    def _bad(self, message: str, tensor: str, severity: Severity = "error") -> None:
        stored = self._checkpoint.tensors.get(tensor)
        self._report(FormatError(message, rule="E5", tensor=tensor, file=stored.shard if stored else None), severity)


def _other_codes(codes: U8, residual: F32, largest: F32) -> tuple[int, int]:
    """How many 8-bit codes are not ours: (those as good within the rounding of an encoder, the others).

    Encoders differ in where they put the border of two codes: at the midpoint, or up to half a cell of 1/32767.5
    beside it. So a code may be farther from the scaled value than ours by one cell, and no more.
    """
    scale = np.repeat(np.maximum(largest, SMALLEST_DIVISOR), NESTED_BLOCKSIZE)[: codes.size]
    scaled = residual / scale
    ours = np.searchsorted(DYNAMIC8_THRESHOLDS, scaled)
    differs = (codes != ours) & (
        np.repeat(largest, NESTED_BLOCKSIZE)[: codes.size] != 0
    )  # there any code decodes alike
    farther = np.abs(DYNAMIC8[codes] - scaled) - np.abs(DYNAMIC8[ours] - scaled)
    far = int((differs & (farther > _CELL)).sum())
    return int(differs.sum()) - far, far


def _error_figures(entry: WeightEntry, rms: float, relative: float) -> Iterator[tuple[str, float, float | None]]:
    yield "rms_error", rms, entry.rms_error
    yield "relative_error", relative, entry.relative_error
