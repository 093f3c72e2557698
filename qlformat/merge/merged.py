"""The merged model as a file to read from: each piece is decoded, changed and rounded once, when it is asked for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from qlformat.checkpoint import FLOAT_DTYPES, NUMPY_DTYPES, AnyArray
from qlformat.errors import QlfError
from qlformat.merge import arithmetic, combining
from qlformat.merge.adapter_files import AdapterFiles
from qlformat.merge.base import Base, BaseWeight
from qlformat.merge.changes import (
    BiasDelta,
    Change,
    LowRank,
    Replaced,
    Tokens,
    column_factors,
    row_factors,
)
from qlformat.shards import TORCH_NAMES, TensorInfo

F32 = npt.NDArray[np.float32]

PIECE_ELEMENTS = 1 << 18
"""Elements changed at a time: what is between base and result stays in the cache."""


class MergedFile:
    """A WeightFile (see source.py) whose tensors are those of the base with the adapters in them.

    Args:
        base: decoded, and merged onto.
        adapters: the files.
        changes: weight -> what happens to it.
        method: how several deltas of one weight become one.
    """

    def __init__(
        self,
        base: Base,
        adapters: Sequence[AdapterFiles],
        changes: Mapping[str, Sequence[Change]],
        method: combining.Method,
    ) -> None:
        self._base = base
        self._adapters = adapters
        self._changes = changes
        self._method = method
        self._local = threading.local()
        self.overflowed: set[str] = set()

    def read_into(self, info: TensorInfo, offset: int, buffer: memoryview) -> None:
        """Bytes of the merged weight in the dtype of `info`."""
        weight = self._base.weights[info.name]
        target = TORCH_NAMES[info.dtype]
        changes = self._changes.get(info.name, ())
        if not changes and not weight.quantized and target == weight.dtype:
            self._base.copy(weight, offset, buffer)
            return
        out = np.frombuffer(buffer, dtype=NUMPY_DTYPES[target])
        self._fill(weight, offset // out.itemsize, out, target)

    def end_position(self, info: TensorInfo) -> int:
        """Not a position in a file."""
        return 0

    def check_unchanged(self) -> None:
        """Raise QlfError when somebody has written to the base's or an adapter's files since they were opened."""
        self._base.check_unchanged()
        for adapter in self._adapters:
            adapter.reader.check_unchanged()

    def close(self) -> None:
        """Nothing is open."""

    def base_values(self, name: str, first: int, last: int) -> F32:
        """The base's own elements, of this thread until its next call."""
        return self._base.read(self._base.weights[name], first, last)

    def values(self, name: str, first: int, last: int, out: F32 | None = None) -> F32:
        """Merged elements [first, last) in float32, not rounded; in `out` when it is given."""
        out = np.empty(last - first, dtype=np.float32) if out is None else out
        self._fill(self._base.weights[name], first, out, "float32")
        return out

    def both(self, name: str, first: int, last: int) -> tuple[F32, F32]:
        """(base, merged) elements [first, last) in float32, of this thread until its next call."""
        base = self._scratch("both base", last - first)
        np.copyto(base, self.base_values(name, first, last))
        return base, self.values(name, first, last, self._scratch("both merged", last - first))

    def _fill(self, weight: BaseWeight, first: int, out: AnyArray, target: str) -> None:
        """Write the merged elements from `first` on to `out`, rounded to `target`."""
        changes = self._changes.get(weight.name, ())
        sums = [change for change in changes if isinstance(change, LowRank) and change.magnitude is None]
        if len(sums) < len(changes) or (sums and self._method.combines(len(sums))):
            for begin, values in self._pieces(weight, first, first + out.size):
                part = out[begin - first : begin - first + values.size]
                self._note(weight, arithmetic.convert(values, "float32", part, target))
            return
        _check_dtype(weight)
        for at in range(0, out.size, PIECE_ELEMENTS):
            part = out[at : at + PIECE_ELEMENTS]
            self._note(weight, self._sum(weight, sums, first + at, part, target))

    def _sum(self, weight: BaseWeight, changes: Sequence[LowRank], first: int, out: AnyArray, target: str) -> bool:
        """Base plus deltas, one after the other in float32; whether finite values became infinite."""
        values, dtype = self._base.elements(weight, first, first + out.size)
        if not changes:
            return arithmetic.convert(values, dtype, out, target)
        for change in changes[:-1]:
            into = self._scratch("sum", out.size)
            arithmetic.add_low_rank(
                values, dtype, first, *self._factors(weight.name, change), change.scale, into, "float32"
            )
            values, dtype = into, "float32"
        last = changes[-1]
        return arithmetic.add_low_rank(values, dtype, first, *self._factors(weight.name, last), last.scale, out, target)

    def _note(self, weight: BaseWeight, overflowed: bool) -> None:
        if overflowed:
            self.overflowed.add(weight.name)

    def _pieces(self, weight: BaseWeight, first: int, last: int) -> Iterator[tuple[int, F32]]:
        """(index of the first element, merged elements), in order, by whole rows cut to what is wanted."""
        changes = self._changes.get(weight.name, ())
        _check_dtype(weight)
        width = weight.shape[-1] if len(weight.shape) == 2 else 1
        step = max(PIECE_ELEMENTS // width, 1)
        for row in range(first // width, -(-last // width), step):
            end = min(row + step, -(-last // width))
            values = self._rows(weight, changes, row, end, width)
            begin = max(first, row * width)
            yield begin, values[begin - row * width : min(last, end * width) - row * width]

    def _rows(self, weight: BaseWeight, changes: Sequence[Change], row: int, end: int, width: int) -> F32:
        """Rows [row, end) of the merged weight, flat."""
        replaced = next((change for change in changes if isinstance(change, Replaced)), None)
        if replaced is not None:
            own = self._tensor(replaced.adapter, replaced.tensor).reshape(-1)
            values = own[row * width : end * width].copy()
        else:
            values = self._base.read(weight, row * width, end * width)
        if not changes:
            return values
        matrix = values.reshape(end - row, width)
        low_rank = [change for change in changes if isinstance(change, LowRank)]
        if any(change.magnitude for change in low_rank):
            matrix = matrix.copy()  # DoRA reads the base again, into the memory that this thread has for it
            values = matrix.reshape(-1)
        if low_rank and self._method.combines(len(low_rank)):
            matrix += self._combined(weight, low_rank)[row:end]
        else:
            for change in low_rank:
                self._add(weight, change, matrix, row, end)
        for other in changes:
            if isinstance(other, BiasDelta):
                matrix += (self._tensor(other.adapter, other.tensor) * np.float32(other.scale))[row:end, None]
            elif isinstance(other, Tokens):
                self._put_tokens(other, matrix, row)
        return values

    def _add(self, weight: BaseWeight, change: LowRank, matrix: F32, row: int, end: int) -> None:
        """matrix += delta, and DoRA's factors."""
        left, right = self._factors(weight.name, change)
        delta = arithmetic.product(left[row:end], right, change.scale)
        if change.magnitude is None:
            np.add(matrix, delta, out=matrix)
            return
        factor = self._dora(weight, change, row, end, delta)
        np.add(matrix, delta, out=matrix)
        np.multiply(matrix, factor, out=matrix)

    def _dora(self, weight: BaseWeight, change: LowRank, row: int, end: int, delta: F32) -> F32:
        """The factor, from the norm of the base's weight plus this delta alone (peft's DoraLinearVariant)."""
        magnitude = self._tensor(change.adapter, str(change.magnitude)).reshape(-1)
        width = weight.shape[1]
        if change.norm_axis == 1:
            alone = self._alone(weight, row, end) + delta
            return row_factors(alone, magnitude[row:end])
        return self._kept(
            ("dora", weight.name, change.adapter), lambda: self._columns(weight, change, magnitude, width)
        )

    def _alone(self, weight: BaseWeight, row: int, end: int) -> F32:
        """Rows of the base in memory of their own: the caller holds the thread's."""
        width = weight.shape[1]
        held = self._base.read(weight, row * width, end * width)
        return held.reshape(end - row, width)

    def _columns(self, weight: BaseWeight, change: LowRank, magnitude: F32, width: int) -> F32:
        left, right = self._factors(weight.name, change)
        step = max(PIECE_ELEMENTS // width, 1)

        def pieces() -> Iterator[F32]:
            for row in range(0, weight.shape[0], step):
                end = min(row + step, weight.shape[0])
                delta = arithmetic.product(left[row:end], right, change.scale)
                yield self._alone(weight, row, end) + delta

        return column_factors(pieces(), width, magnitude)

    def _put_tokens(self, change: Tokens, matrix: F32, row: int) -> None:
        rows = self._tensor(change.adapter, change.tensor)
        for position, index in enumerate(change.indices):
            if row <= index < row + matrix.shape[0]:
                matrix[index - row] = rows[position]

    def _combined(self, weight: BaseWeight, changes: Sequence[LowRank]) -> F32:
        """The one delta that the method makes of all, held for as long as this thread works on the weight."""

        def make() -> F32:
            parts = []
            for change in changes:
                left, right = self._factors(weight.name, change)
                user = self._adapters[change.adapter].weight
                parts.append(combining.Part(left, right, change.scale / user, user))
            return self._method.combine(weight.name, parts)

        return self._kept(("combined", weight.name), make)

    def _kept(self, key: tuple[object, ...], make: Callable[[], F32]) -> F32:
        """What `make` gives, made once for as long as this thread works on the weight key[1]."""
        held: dict[tuple[object, ...], F32] = self._local.__dict__.setdefault("kept", {})
        if key not in held:
            for old in [found for found in held if found[1] != key[1]]:
                del held[old]
            held[key] = make()
        return held[key]

    def _factors(self, name: str, change: LowRank) -> tuple[F32, F32]:
        """left [rows, rank] and right [rank, columns], contiguous; those of the weight in work are kept."""

        def side(tensor: str) -> F32:
            read = self._adapters[change.adapter].read(tensor)
            return np.ascontiguousarray(read.T if change.turned else read)

        left = self._kept(("left", name, change.adapter), lambda: side(change.left))
        return left, self._kept(("right", name, change.adapter), lambda: side(change.right))

    def _tensor(self, adapter: int, name: str) -> F32:
        return self._kept(("tensor", name, adapter), lambda: self._adapters[adapter].read(name))

    def _scratch(self, use: str, count: int) -> F32:
        found: F32 | None = getattr(self._local, use, None)
        if found is None or found.size < count:
            found = np.empty(count, dtype=np.float32)
            setattr(self._local, use, found)
        return found[:count]


def _check_dtype(weight: BaseWeight) -> None:
    if weight.dtype not in FLOAT_DTYPES:
        raise QlfError(
            f"found dtype {weight.dtype}, needed {', '.join(FLOAT_DTYPES)} to merge into", tensor=weight.name
        )
