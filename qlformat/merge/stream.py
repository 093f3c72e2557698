"""Write merged weights into their shards: TensorStream, quantizing from float32, and measuring what was kept."""

from __future__ import annotations

import threading
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qlformat import codec
from qlformat.checkpoint import NUMPY_DTYPES, AnyArray
from qlformat.hashing import Digest
from qlformat.journal import StoredWeight
from qlformat.layout import NESTED_BLOCKSIZE, QuantState, strict_json
from qlformat.merge.arithmetic import convert
from qlformat.merge.direct_shard import PAGE
from qlformat.merge.figures import Kept, Sums, parts
from qlformat.merge.merged import MergedFile
from qlformat.plan import Item
from qlformat.progress import ProgressMeter
from qlformat.shards import TORCH_NAMES, ShardWriter
from qlformat.tensor_stream import Rounded, TensorStream

F32 = npt.NDArray[np.float32]


class MergedStream(TensorStream):
    """A TensorStream that quantizes from float32: the merged weight is rounded once.

    Args:
        directory, writers, meter, digest: as TensorStream.
        dtypes: weight -> the dtype that its quant_state names.
        file: the merged weights.
        changed: names of those that adapters change; what is kept of the changes is measured.
    """

    def __init__(
        self,
        directory: Path,
        writers: Sequence[ShardWriter],
        meter: ProgressMeter,
        dtypes: Mapping[str, str],
        digest: Callable[[], Digest],
        file: MergedFile,
        changed: Container[str],
    ) -> None:
        super().__init__(directory, writers, meter, digest)
        self._file, self._changed = file, changed
        self._shards = writers
        self._memory = threading.local()
        self._dtypes = dtypes

    def measured(self, item: Item, stored: StoredWeight) -> Kept:
        """What the file holds of the changes of one weight; right after `write`, by the same worker."""
        sums: Sums | None = self._memory.__dict__.pop("sums", None)
        if sums is not None:
            return sums.result(item.name, item.elements)
        sums = Sums()
        if item.transpose and item.state is not None:
            whole = self.stored_values(item, stored, 0, item.elements).reshape(item.state.shape)
            values = codec.transpose(whole).reshape(-1)
            base = self._file.base_values(item.name, 0, item.elements).copy()
            sums.add(base, self._file.values(item.name, 0, item.elements), values)
        else:
            for first, last in parts(item.elements, four_bit=item.state is not None):
                sums.add(*self._file.both(item.name, first, last), self.stored_values(item, stored, first, last))
        return sums.result(item.name, item.elements)

    def _written(self, item: Item, offset: int, part: memoryview) -> None:
        """Measure what passes by: reading it back would keep the disk from writing."""
        if item.name not in self._changed:
            return
        if not offset:
            self._memory.sums = Sums()
        sums: Sums = self._memory.sums
        dtype = TORCH_NAMES[item.tensor.dtype]
        values = np.frombuffer(part, dtype=NUMPY_DTYPES[dtype])
        begin = offset // values.itemsize
        for first, last in parts(item.elements, four_bit=False, begin=begin, end=begin + values.size):
            stored = self._widened(values[first - begin : last - begin], dtype)
            sums.add(*self._file.both(item.name, first, last), stored)

    def _quantize(self, item: Item, state: QuantState, rounded: Rounded | None) -> StoredWeight:
        return super()._quantize(item, replace(state, dtype="float32"), rounded)

    def _companions(
        self,
        item: Item,
        state: QuantState,
        companions: dict[str, npt.NDArray[Any]],
        packed_sha256: str,
        sums: tuple[float, float],
    ) -> StoredWeight:
        state = replace(state, dtype=self._dtypes[item.name])
        return super()._companions(item, state, companions, packed_sha256, sums)

    def stored_values(self, item: Item, stored: StoredWeight, first: int, last: int) -> F32:
        """Elements [first, last) as a reader of the new file gets them, float32; `first` begins a nested block.

        They are this worker's until its next call.
        """
        if stored.quant_state is None:
            return self._plain_values(item, first, last)
        fields = strict_json(stored.quant_state.encode())
        size: int = fields["blocksize"]
        packed = self._bytes(item, item.name, first // 2, -(-last // 2))
        begin, end = first // size, -(-last // size)
        if "nested_offset" in fields:
            codes = self._bytes(item, f"{item.name}.absmax", begin, end)
            group, groups = begin // NESTED_BLOCKSIZE, -(-end // NESTED_BLOCKSIZE)
            nested = self._bytes(item, f"{item.name}.nested_absmax", group * 4, groups * 4).view("<f4")
            absmax = codec.double_dequantize(codes, nested, np.float32(fields["nested_offset"]))
        else:
            absmax = self._bytes(item, f"{item.name}.absmax", begin * 4, end * 4).view("<f4")
        decoded: F32 = codec.dequantize(
            packed,
            absmax,
            last - first,
            quant_type=fields["quant_type"],
            blocksize=size,
            dtype="float32",
            out=self._held("stored values", (last - first) * 4).view(np.float32),
        )
        return decoded

    def _plain_values(self, item: Item, first: int, last: int) -> F32:
        dtype = TORCH_NAMES[item.tensor.dtype]
        size = NUMPY_DTYPES[dtype].itemsize
        return self._widened(self._bytes(item, item.name, first * size, last * size).view(NUMPY_DTYPES[dtype]), dtype)

    def _widened(self, raw: AnyArray, dtype: str) -> F32:
        out = self._held("stored values", raw.size * 4).view(np.float32)
        convert(raw, dtype, out, "float32")
        return out

    def _bytes(self, item: Item, name: str, begin: int, end: int) -> npt.NDArray[np.uint8]:
        data = self._held(f"stored {name.rpartition('.')[2]}", end - begin)
        done = 0
        while done < data.size:
            count = self._shards[item.shard].read_back(name, begin + done, data[done:].data)
            if not count:
                raise OSError(f"{self._shards[item.shard].path.name} became shorter while it was written")
            done += count
        return data

    def _buffer(self, use: str, size: int) -> npt.NDArray[np.uint8]:
        """A buffer that begins with a page, so that it may be written past the page cache as it is."""
        if not hasattr(self._local, use):
            raw = np.empty(size + PAGE, dtype=np.uint8)
            start = -raw.__array_interface__["data"][0] % PAGE
            setattr(self._local, use, raw[start : start + size])
        return super()._buffer(use, size)

    def _held(self, use: str, size: int) -> npt.NDArray[np.uint8]:
        """`size` bytes of this worker, the same ones each time: fresh memory costs more than what is done with it."""
        found: npt.NDArray[np.uint8] | None = getattr(self._memory, use, None)
        if found is None or found.size < size:
            found = np.empty(size, dtype=np.uint8)
            setattr(self._memory, use, found)
        return found[:size]
