"""Compare the weights of two models, tensor by tensor, whatever their encodings and shards.

Both are read in pieces, so memory does not grow with the model. Sums are added in the order of the elements: the
figures do not depend on the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qlformat import native
from qlformat.errors import QlfError
from qlformat.progress import Progress, ProgressMeter
from qlformat.quality.sides import Reader, Side, open_side
from qlformat.weights import Weight

PIECE_ELEMENTS = 1 << 14
"""Elements that a thread compares at a time: no array is larger than 128 KiB, or the allocator would fetch fresh pages
for each of them (2.5 s of 5 on SmolLM2)."""

_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class TensorDifference:
    """How far a weight of B is from that of the same name in A.

    Attributes:
        name: of the weight.
        shape_a, shape_b: logical shapes; where they differ there are no figures.
        encoding_a, encoding_b: "nf4", "fp4" or a dtype.
        relative_error: |B - A| / |A|, Frobenius norms; None when A is zero and B is not.
        max_error: the largest |b - a| of two elements.
        equal_values: share of the elements with equal values (NaN equals NaN).
        equal_codes: share of equal 4-bit codes; None unless both are in 4 bits of one kind.
        not_finite: elements of which only one is finite, or which are different infinities; they count in no error.
    """

    name: str
    shape_a: tuple[int, ...]
    shape_b: tuple[int, ...]
    encoding_a: str
    encoding_b: str
    relative_error: float | None = None
    max_error: float | None = None
    equal_values: float | None = None
    equal_codes: float | None = None
    not_finite: int = 0

    @property
    def compared(self) -> bool:
        """Whether the shapes fit."""
        return self.equal_values is not None

    @property
    def equal(self) -> bool:
        """Whether every value is the same."""
        return self.equal_values == 1.0

    def within(self, tolerance: float) -> bool:
        """Whether the relative error is at most `tolerance` and nothing is infinitely far away."""
        small = self.relative_error is not None and self.relative_error <= tolerance
        return self.equal or (self.compared and small and self.not_finite == 0)


@dataclass(frozen=True)
class Differences:
    """What `diff` found.

    Attributes:
        a, b: the models as they were asked for.
        tensors: of every weight that both have, in the order of A.
        only_a, only_b: names of weights that the other one lacks.
        relative_error: over all compared weights together, as for one; None as there.
        max_error: the largest of all.
        equal_codes: share over all weights that are in 4 bits on both sides; None when there are none.
        tolerance: relative error of a tensor up to which it passes.
        notes: what a user should read.
    """

    a: str
    b: str
    tensors: tuple[TensorDifference, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    relative_error: float | None
    max_error: float
    equal_codes: float | None
    tolerance: float
    notes: tuple[str, ...]

    @property
    def different(self) -> list[TensorDifference]:
        """The weights that are not within the tolerance, most different first."""
        found = [tensor for tensor in self.tensors if not tensor.within(self.tolerance)]
        return sorted(found, key=distance, reverse=True)

    @property
    def equal(self) -> bool:
        """Whether both have the same weights, within the tolerance."""
        return bool(self.tensors) and not (self.only_a or self.only_b or self.different)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        found = asdict(self)
        found["tensors"] = [asdict(tensor) for tensor in self.tensors]
        return {"equal": self.equal, "different": len(self.different), **found}


def distance(tensor: TensorDifference) -> tuple[bool, float]:
    """What to sort by: other shapes are farthest, then what has no finite relative error."""
    error = tensor.relative_error
    return not tensor.compared, math.inf if error is None or tensor.not_finite else error


def diff(
    a: str | Path,
    b: str | Path,
    *,
    tolerance: float = 0.0,
    threads: int | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Differences:
    """Compare two models by their weights. Elements are compared in the dtype that each side stores or decodes to.

    Args:
        a, b: 4-bit or 16-bit models: directories, weight files or Hub repositories. A is the reference of relative
            errors. A `Conv1D` weight, which lies transposed in 4-bit checkpoints, is turned.
        tolerance: relative error of a tensor that still counts as equal.
        threads: all by default; the result does not depend on it.
        progress: gets reports.

    Raises:
        QlfError: a model cannot be opened.
        FormatError: one breaks a rule of the format.
    """
    if not tolerance >= 0:
        raise QlfError(f"found the tolerance {tolerance}, needed a number from 0 on")
    with open_side(a) as left, open_side(b) as right, ThreadPoolExecutor(threads or native.default_threads()) as pool:
        common = [name for name in left.weights if name in right.weights]
        total = sum(left.weights[name].elements for name in common)
        meter = ProgressMeter(progress, len(common), total, "comparing")
        tallies = []
        for name in common:
            tallies.append(_compare(left, right, name, pool))
            meter.add(left.weights[name].elements, 1)
        notes: list[str] = []
        only_a, only_b = _only(left, right, notes), _only(right, left, notes)
    whole = Tally.sum(tally for _, tally in tallies)
    return Differences(
        left.name, right.name, tuple(found for found, _ in tallies), only_a, only_b,
        whole.relative_error, whole.max_error, whole.equal_codes, tolerance, tuple(notes),
    )  # fmt: skip


@dataclass
class Tally:
    """Sums over elements.

    Attributes:
        count: elements.
        error, norm: sums of (b - a)^2 and a^2, where both are finite.
        max_error: largest |b - a|.
        equal: elements with equal values.
        not_finite: see TensorDifference.
        codes, same_codes: 4-bit codes compared, and of these the equal ones.
    """

    count: int = 0
    error: float = 0.0
    norm: float = 0.0
    max_error: float = 0.0
    equal: int = 0
    not_finite: int = 0
    codes: int = 0
    same_codes: int = 0

    @staticmethod
    def sum(parts: Iterable[Tally]) -> Tally:
        """All of them together, added in their order."""
        whole = Tally()
        for part in parts:
            whole.count += part.count
            whole.error += part.error
            whole.norm += part.norm
            whole.max_error = max(whole.max_error, part.max_error)
            whole.equal += part.equal
            whole.not_finite += part.not_finite
            whole.codes += part.codes
            whole.same_codes += part.same_codes
        return whole

    @property
    def relative_error(self) -> float | None:
        """See TensorDifference."""
        if self.error == 0:
            return 0.0
        return math.sqrt(self.error / self.norm) if self.norm else None

    @property
    def equal_codes(self) -> float | None:
        """See TensorDifference."""
        return self.same_codes / self.codes if self.codes else None


def _compare(left: Side, right: Side, name: str, pool: ThreadPoolExecutor) -> tuple[TensorDifference, Tally]:
    a, b = left.weights[name], right.weights[name]
    turn = a.transposed != b.transposed and len(a.shape) == 2
    shapes = a.shape, b.shape
    if turn:  # both as the one that is quantized, [out, in]
        shapes = (a.shape, b.shape[::-1]) if a.transposed else (a.shape[::-1], b.shape)
    encodings = _encoding(a), _encoding(b)
    if shapes[0] != shapes[1]:
        return TensorDifference(name, *shapes, *encodings), Tally()
    readers = Reader(left, a, turn and not a.transposed), Reader(right, b, turn and not b.transposed)
    coded = a.quant_state is not None and b.quant_state is not None and encodings[0] == encodings[1]

    def piece(first: int) -> Tally:
        last = min(first + PIECE_ELEMENTS, a.elements)
        found = tally(readers[0].read(first, last), readers[1].read(first, last))
        if coded:
            found.codes = last - first
            found.same_codes = same_codes(left.packed(a, first, last), right.packed(b, first, last), last - first)
        return found

    whole = Tally.sum(pool.map(piece, range(0, a.elements, PIECE_ELEMENTS)))
    share = whole.equal / whole.count if whole.count else 1.0
    found = TensorDifference(
        name, *shapes, *encodings, whole.relative_error, whole.max_error, share, whole.equal_codes, whole.not_finite
    )
    return found, whole


def tally(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> Tally:
    """The sums over two flat arrays of float32 or float64."""
    same = (a == b) | ((a != a) & (b != b))
    finite = np.isfinite(a) & np.isfinite(b)
    if not finite.all():
        kept = finite.nonzero()[0]
        far = int((~finite & ~same).sum())
        count, equal = a.size, int(same.sum())
        a, b = a[kept], b[kept]
    else:
        far, count, equal = 0, a.size, int(same.sum())
    wide = a.astype(np.float64)
    step = b.astype(np.float64)
    step -= wide
    # np.sum adds pairwise and in one order; a dot product would depend on how many threads BLAS takes.
    largest = float(np.abs(step).max(initial=0.0))
    np.square(step, out=step)
    np.square(wide, out=wide)
    return Tally(count, float(step.sum()), float(wide.sum()), largest, equal, far)


def same_codes(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any], count: int) -> int:
    """How many of `count` 4-bit codes, two a byte and the first in the high nibble, are equal."""
    changed = a ^ b
    high, low = (changed & 0xF0) == 0, (changed & 0x0F) == 0
    return int(high.sum()) + int(low[: count // 2].sum())


def _encoding(weight: Weight) -> str:
    return weight.quant_state.quant_type if weight.quant_state is not None else weight.dtype


def _only(side: Side, other: Side, notes: list[str]) -> tuple[str, ...]:
    """Names that `other` lacks; an output embedding that it has tied is none."""
    return tuple(_lacking(side, other, notes))


def _lacking(side: Side, other: Side, notes: list[str]) -> Iterator[str]:
    for name in side.weights:
        if name in other.weights:
            continue
        if name.endswith(_HEAD) and other.config.get("tie_word_embeddings", False) is True:
            notes.append(f"{name} is tied to the input embedding in {other.name} and not compared")
        else:
            yield name
