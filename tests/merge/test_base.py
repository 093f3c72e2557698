"""Reading a base."""

from __future__ import annotations

import numpy as np
import pytest

from qlformat.checkpoint import cast
from qlformat.merge.base import widen
from qlformat.merge.narrowing import to_float16


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_value_is_widened_exactly(dtype: str) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    raw = bits.view(np.float16) if dtype == "float16" else bits
    finite = np.isfinite(cast(raw, dtype, "float32"))
    for chosen in (raw, raw[finite]):  # with infinities and without: two ways
        found = widen(chosen, dtype, np.empty(chosen.size, dtype=np.float32))
        wanted = cast(chosen, dtype, "float32")
        nan = np.isnan(wanted)
        assert np.array_equal(nan, np.isnan(found))
        assert np.array_equal(found[~nan].view(np.uint32), wanted[~nan].view(np.uint32))


def test_float16_is_rounded_as_numpy_does() -> None:
    """All patterns of the upper 16 bits with lower bits around every tie, and random ones; then without the large."""
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    lower = [0, 1, 0xFFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x3001, 0x8000, 0xFFFF]
    random = np.random.default_rng(0).integers(0, 1 << 32, 1 << 20, dtype=np.uint32)
    values = np.concatenate([*(upper | np.uint32(low) for low in lower), random]).view(np.float32)
    with np.errstate(over="ignore"):
        wanted = values.astype(np.float16)
    found = np.empty(values.size, dtype=np.float16)
    assert to_float16(values, found)  # they overflowed
    nan = np.isnan(values)
    assert np.array_equal(found[~nan].view(np.uint16), wanted[~nan].view(np.uint16)) and np.isnan(found[nan]).all()
    small = values[np.abs(values) < 65520]
    assert small.size > 1 << 19
    assert not to_float16(small, found[: small.size])
    assert np.array_equal(found[: small.size].view(np.uint16), small.astype(np.float16).view(np.uint16))
