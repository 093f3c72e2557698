"""Reading a base."""

from __future__ import annotations

import numpy as np
import pytest

from qlformat import native
from qlformat.checkpoint import cast
from qlformat.merge.base import widen


@pytest.mark.parametrize("with_native", [True, False])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_value_is_widened_exactly(dtype: str, with_native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not with_native:
        monkeypatch.setattr(native, "available", lambda: False)
    bits = np.arange(1 << 16, dtype=np.uint16)
    raw = bits.view(np.float16) if dtype == "float16" else bits
    found = widen(raw, dtype, np.empty(raw.size, dtype=np.float32))
    wanted = cast(raw, dtype, "float32")
    nan = np.isnan(wanted)
    assert np.array_equal(nan, np.isnan(found))
    assert np.array_equal(found[~nan].view(np.uint32), wanted[~nan].view(np.uint32))
