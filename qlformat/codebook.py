"""The code tables of the format: NF4, FP4 and the signed 8-bit dynamic map (spec/format.md, "Codebooks").

`spec/codebooks/*.json` is the source. `_tables.py` holds its bits so that the library needs no file at run time;
a test compares both, and the C header, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from qlformat import _tables

F32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Codebook:
    """A 4-bit code table.

    Attributes:
        name: quant_type, "nf4" or "fp4".
        values: float32 [16], value of each code.
        order: uint8 [16], the codes sorted by value; equal values in the order that the spec fixes.
        thresholds: float32 [15], midpoints of neighbouring sorted values; a value equal to one takes the lower code.
        zero_code: code of 0.0, which pads an odd element count.
    """

    name: str
    values: F32
    order: npt.NDArray[np.uint8]
    thresholds: F32
    zero_code: int


def _frozen(array: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    array.setflags(write=False)
    return array


def _from_bits(bits: tuple[int, ...]) -> F32:
    values: F32 = np.array(bits, dtype=np.uint32).view(np.float32)
    _frozen(values)
    return values


def _codebook(name: str, bits: tuple[int, ...], sorted_codes: tuple[int, ...]) -> Codebook:
    values = _from_bits(bits)
    order = np.array(sorted_codes, dtype=np.uint8)
    ranked = values[order]
    thresholds: F32 = ((ranked[:-1] + ranked[1:]) * np.float32(0.5)).astype(np.float32)
    _frozen(order)
    _frozen(thresholds)
    return Codebook(name, values, order, thresholds, int(order[int((thresholds < 0).sum())]))


CODEBOOKS: Mapping[str, Codebook] = MappingProxyType(
    {
        "nf4": _codebook("nf4", _tables.NF4_BITS, tuple(range(16))),
        "fp4": _codebook("fp4", _tables.FP4_BITS, _tables.FP4_SORTED_CODES),
    }
)
"""quant_type -> its table."""

DYNAMIC8: F32 = _from_bits(_tables.DYNAMIC8_BITS)
"""float32 [256], ascending: the 8-bit codebook of double quantization."""

DYNAMIC8_THRESHOLDS: F32 = _from_bits(_tables.DYNAMIC8_THRESHOLD_BITS)
"""float32 [255], not descending: code k is taken by values above threshold k-1 and not above threshold k.

They lie within 1.6e-5 of the midpoints. They are the borders of bitsandbytes' CPU encoder, kept so that the bytes are
the same: with exact midpoints 0.2 % of the codes differ, and the logits of a small model by 3e-3.
"""
