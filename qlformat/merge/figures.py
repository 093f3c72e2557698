"""What was kept of each delta, of what was written to the file, as numbers and as a picture."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]

WHOLE_ELEMENTS = 1 << 18
PART_ELEMENTS = 1 << 15
_STRIDE = 64
"""A weight up to the first size is measured as a whole; of a larger one, one part of so many."""
WHOLE_ELEMENTS_IN_4_BITS = 1 << 20
PART_ELEMENTS_IN_4_BITS = 1 << 17
_STRIDE_IN_4_BITS = 16
"""More of them where rounding is coarse, and the figures vary with the elements."""
_STEP_ELEMENTS = 1 << 15
_STRETCH = 1 << 12


@dataclass(frozen=True)
class Kept:
    """One changed weight.

    Attributes:
        name: of the weight.
        share: <Q(W + D) - W, D> / <D, D>: the part of the change that the stored weight has; None for a zero change.
        relative_error: |Q(W + D) - (W + D)| / |W + D|.
        delta: |D| / |W|, how large the change is.
        measured: share of the elements that were compared.
    """

    name: str
    share: float | None
    relative_error: float
    delta: float
    measured: float

    def as_dict(self) -> dict[str, float | str | None]:
        """Rounded for the report."""
        return {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in vars(self).items()}


def parts(elements: int, *, four_bit: bool, begin: int = 0, end: int | None = None) -> Iterator[tuple[int, int]]:
    """(first, last) of the parts of a weight to compare, those that start in [begin, end).

    Each begins a block of every size, and none crosses a multiple of its largest size.
    """
    whole, part, stride = (
        (WHOLE_ELEMENTS_IN_4_BITS, PART_ELEMENTS_IN_4_BITS, _STRIDE_IN_4_BITS)
        if four_bit
        else (WHOLE_ELEMENTS, PART_ELEMENTS, _STRIDE)
    )
    if elements <= whole:
        stride = 1
    step = part * stride
    for first in range(-(-begin // step) * step, elements if end is None else end, step):
        yield first, min(first + part, elements)


class Sums:
    """Sums over parts of one weight, in float64."""

    def __init__(self) -> None:
        self.kept = self.delta = self.error = self.merged = self.base = 0.0
        self.count = 0

    def add(self, base: F32, merged: F32, stored: F32) -> None:
        """Take one part: the base's values, base + delta, and what a reader of the new file gets; all flat."""
        for first in range(0, base.size, _STEP_ELEMENTS):
            self._step(*(values[first : first + _STEP_ELEMENTS] for values in (base, merged, stored)))
        self.count += base.size

    def _step(self, base: F32, merged: F32, stored: F32) -> None:
        delta = merged - base
        self.kept += _dot(stored - base, delta)
        self.delta += _dot(delta, delta)
        error = stored - merged
        self.error += _dot(error, error)
        self.merged += _dot(merged, merged)
        self.base += _dot(base, base)

    def result(self, name: str, elements: int) -> Kept:
        """The figures."""
        share = self.kept / self.delta if self.delta else None
        error = math.sqrt(self.error / self.merged) if self.merged else 0.0
        size = math.sqrt(self.delta / self.base) if self.base else 0.0
        return Kept(name, share, error, size, self.count / elements if elements else 1.0)


def _dot(left: F32, right: F32) -> float:
    """The dot product: float32 over a stretch, float64 over the stretches."""
    whole = left.size // _STRETCH * _STRETCH
    rows = [values[:whole].reshape(-1, _STRETCH) for values in (left, right)]
    sums = np.einsum("ij,ij->i", *rows).tolist()
    return math.fsum([*sums, float(np.dot(left[whole:], right[whole:]))])


def summary(kept: Sequence[Kept]) -> dict[str, float | int | None]:
    """Over all changed weights: the least, the median and the mean share, and the largest error."""
    shares = sorted(entry.share for entry in kept if entry.share is not None)
    return {
        "weights": len(kept),
        "share_least": _rounded(shares[0]) if shares else None,
        "share_median": _rounded(shares[len(shares) // 2]) if shares else None,
        "share_mean": _rounded(sum(shares) / len(shares)) if shares else None,
        "relative_error_most": _rounded(max((entry.relative_error for entry in kept), default=0.0)),
    }


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


_ROW, _LEFT, _WIDE, _TOP = 14, 330, 420, 46


def picture(kept: Sequence[Kept], title: str) -> bytes:
    """An SVG: a bar for the share of each weight's delta that was kept, with its relative error beside it."""
    rows = list(kept)
    height = _TOP + _ROW * len(rows) + 20
    most = max([1.0, *(abs(entry.share or 0.0) for entry in rows)])
    width = _LEFT + _WIDE + 110
    size = f'width="{width}" height="{height}" font-family="sans-serif" font-size="10"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size}>',
        f'<rect width="100%" height="100%" fill="white"/><text x="10" y="18" font-size="13">{_text(title)}</text>',
        f'<text x="{_LEFT}" y="36">share of the delta kept</text>',
        f'<text x="{_LEFT + _WIDE + 10}" y="36">relative error</text>',
    ]
    lines += _bars(rows, most)
    full = _LEFT + _WIDE / most
    lines.append(f'<line x1="{full:.1f}" x2="{full:.1f}" y1="{_TOP - 4}" y2="{height - 14}" stroke="black"/>')
    lines.append(f'<text x="{full:.1f}" y="{height - 4}" text-anchor="middle">1</text></svg>')
    return ("\n".join(lines) + "\n").encode()


def _bars(rows: Iterable[Kept], most: float) -> Iterator[str]:
    for index, entry in enumerate(rows):
        y = _TOP + _ROW * index
        share = entry.share
        width = max(share or 0.0, 0.0) / most * _WIDE
        color = "#999999" if share is None else "#2a7f3f" if share > 0.9 else "#d08a1d" if share > 0.5 else "#b3261e"
        label = "zero" if share is None else f"{share:.3f}"
        yield (
            f'<text x="{_LEFT - 6}" y="{y + 10}" text-anchor="end">{_text(entry.name)}</text>'
            f'<rect x="{_LEFT}" y="{y + 2}" width="{width:.1f}" height="{_ROW - 4}" fill="{color}"/>'
            f'<text x="{_LEFT + 4}" y="{y + 10}">{label}</text>'
            f'<text x="{_LEFT + _WIDE + 10}" y="{y + 10}">{entry.relative_error:.2e}</text>'
        )


def _text(name: str) -> str:
    cleaned = "".join(c if c.isprintable() else "?" for c in name)
    return cleaned.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
