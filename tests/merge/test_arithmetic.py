"""Conversions and low-rank deltas: the native kernels, the NumPy way, and exact arithmetic give the same bits."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from qlformat import native, native_merge
from qlformat.checkpoint import NUMPY_DTYPES, cast
from qlformat.errors import NativeError
from qlformat.merge import arithmetic

DTYPES = ("float32", "float16", "bfloat16")
ISAS = native.isa_levels()


@pytest.fixture(params=[*ISAS, "numpy"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each instruction set of this machine, and no library at all."""
    if request.param == "numpy":
        monkeypatch.setattr(native, "available", lambda: False)
    else:
        monkeypatch.setenv("QLF_ISA", request.param)
    return str(request.param)


def awkward() -> np.ndarray[Any, np.dtype[np.float32]]:
    """All patterns of the upper 16 bits with lower bits around every tie, and random ones."""
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    lower = [0, 1, 0xFFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x3001, 0x7FFF, 0x8000, 0x8001, 0xFFFF]
    random = np.random.default_rng(0).integers(0, 1 << 32, (1 << 16) + 5, dtype=np.uint32)
    return np.concatenate([*(upper | np.uint32(low) for low in lower), random]).view(np.float32)


def bits_of(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return values.view({2: np.uint16, 4: np.uint32}[values.itemsize])


@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("source", DTYPES)
def test_conversions_are_those_of_numpy(source: str, target: str, way: str) -> None:
    values = awkward()
    if source != "float32":
        values = np.arange(1 << 16, dtype=np.uint16).view(NUMPY_DTYPES[source])
    with np.errstate(over="ignore"):
        wanted = cast(values, source, target)
        wide = cast(values, source, "float32")
    found = np.empty(values.size, dtype=NUMPY_DTYPES[target])
    overflowed = arithmetic.convert(values, source, found, target)
    # Whether a signalling NaN keeps its lower bits is up to the processor for NumPy, and up to nobody here.
    nan = np.isnan(wide)
    assert np.array_equal(bits_of(found)[~nan], bits_of(wanted)[~nan])
    assert np.isnan(cast(found[nan], target, "float32")).all()
    large = target == "float16" and source != "float16"
    assert overflowed is large
    if large:
        small = values[np.abs(wide) < 65520]
        assert arithmetic.convert(small, source, found[: small.size], target) is False


def test_every_way_keeps_the_same_bits_of_nan() -> None:
    values = awkward()
    values = values[np.isnan(values)]
    found = [np.empty(values.size, dtype=np.float16) for _ in ISAS]
    for isa, out in zip(ISAS, found, strict=True):
        native_merge.convert(values, "float32", out, "float16", isa=isa)
        assert np.isnan(out).all() and np.array_equal(bits_of(out), bits_of(found[0]))


def fused(a: float, b: float, c: float) -> np.float32:
    """a * b + c, rounded once, by rational arithmetic; the result must be normal."""
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    near = np.float32(float(exact))
    around = [np.nextafter(near, np.float32(-np.inf)), near, np.nextafter(near, np.float32(np.inf))]
    return min(around, key=lambda value: (abs(Fraction(float(value)) - exact), int(value.view(np.uint32)) & 1))


def test_a_product_is_a_chain_of_fused_steps(way: str) -> None:
    """Close to ties on purpose: the addend ends where the product's last bits begin."""
    rng = np.random.default_rng(1)
    left = (1 + rng.integers(0, 1 << 12, (64, 3)) * 2.0**-12).astype(np.float32)
    right = (1 + rng.integers(0, 1 << 12, (3, 5)) * 2.0**-12).astype(np.float32)
    right[1] *= np.float32(2.0**-13)
    right[2] *= np.float32(-(2.0**-25))
    found = arithmetic.product(left, right, 1.0)
    for i in range(left.shape[0]):
        for j in range(right.shape[1]):
            value = 0.0
            for k in range(3):
                value = float(fused(float(left[i, k]), float(right[k, j]), value))
            assert found[i, j] == np.float32(value)


@pytest.mark.parametrize("rank", [1, 4, 16, 70, 600])
@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("source", DTYPES)
def test_all_ways_and_all_pieces_agree(source: str, target: str, rank: int) -> None:
    rng = np.random.default_rng(rank)
    rows, columns = 13, 53
    values = rng.standard_normal(rows * columns).astype(np.float32)
    base = np.empty(values.size, dtype=NUMPY_DTYPES[source])
    arithmetic.convert(values, "float32", base, source)
    left = rng.standard_normal((rows, rank)).astype(np.float32)
    right = rng.standard_normal((rank, columns)).astype(np.float32)
    found = []
    for isa in (*ISAS, None):
        out = np.empty(base.size, dtype=NUMPY_DTYPES[target])
        size = base.size if isa == "scalar" else 3 * columns + 20
        for first in range(0, base.size, size):
            piece = slice(first, first + size)
            if isa is None:
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(native, "available", lambda: False)
                    arithmetic.add_low_rank(base[piece], source, first, left, right, 0.3, out[piece], target)
            else:
                native_merge.add_low_rank(base[piece], source, first, left, right, 0.3, out[piece], target, isa=isa)
        found.append(bits_of(out))
    assert all(np.array_equal(found[0], other) for other in found[1:])
    wide = cast(base, source, "float32").astype(np.float64)
    exact = wide + 0.3 * (left.astype(np.float64) @ right).reshape(-1)
    near = cast(found[0].view(NUMPY_DTYPES[target]), target, "float32")
    tolerance = {"float32": 1e-4, "float16": 5e-2, "bfloat16": 3e-1}[target]
    assert np.abs(near - exact).max() < tolerance


def test_overflow_is_seen(way: str) -> None:
    base, out = np.full(20, 65000, dtype=np.float32), np.empty(20, dtype=np.float16)
    left, right = np.ones((1, 1), dtype=np.float32), np.zeros((1, 20), dtype=np.float32)
    assert arithmetic.add_low_rank(base, "float32", 0, left, right, 1.0, out, "float16") is False
    right[0, 19] = 600
    assert arithmetic.add_low_rank(base, "float32", 0, left, right, 1.0, out, "float16") is True
    assert np.isinf(out[19]) and np.isfinite(out[:19]).all()


def test_one_array_may_be_both_ends() -> None:
    rng = np.random.default_rng(2)
    base = rng.standard_normal(6 * 40).astype(np.float32)
    left, right = rng.standard_normal((6, 8)).astype(np.float32), rng.standard_normal((8, 40)).astype(np.float32)
    wanted = np.empty_like(base)
    native_merge.add_low_rank(base, "float32", 0, left, right, 2.0, wanted, "float32")
    native_merge.add_low_rank(base, "float32", 0, left, right, 2.0, base, "float32")
    assert np.array_equal(base, wanted)


F = np.float32
MISUSE = {
    "rank": (np.zeros((2, 3), F), np.zeros((4, 5), F), np.zeros(10, F), 0, r"found shapes \(2, 3\) and \(4, 5\)"),
    "range": (np.zeros((2, 3), F), np.zeros((3, 5), F), np.zeros(10, F), 1, "first: found 1, needed an integer"),
    "large": (np.zeros((2, 3), F), np.zeros((3, 5), F), np.zeros(11, F), 0, "first: found 0"),
    "dtype": (np.zeros((2, 3)), np.zeros((3, 5), F), np.zeros(10, F), 0, "left: found float64, needed float32"),
    "order": (np.zeros((3, 2), F).T, np.zeros((3, 5), F), np.zeros(10, F), 0, "left: needed a C-contiguous"),
}


@pytest.mark.parametrize(("left", "right", "base", "first", "message"), MISUSE.values(), ids=MISUSE)
def test_misuse_is_refused(left: Any, right: Any, base: Any, first: int, message: str) -> None:
    with pytest.raises(NativeError, match=message):
        native_merge.add_low_rank(base, "float32", first, left, right, 1.0, np.empty_like(base), "float32")


def test_overlap_and_sizes_are_refused() -> None:
    memory = np.zeros(64, dtype=np.float32)
    with pytest.raises(NativeError, match="overlaps"):
        native_merge.convert(memory[:32], "float32", memory[16:48], "float32")
    with pytest.raises(NativeError, match="overlaps"):  # one address and another size of element
        native_merge.convert(memory[:32], "float32", memory[:16].view(np.float16), "float16")
    with pytest.raises(NativeError, match="found 31 elements, needed 32"):
        native_merge.convert(memory[:32], "float32", np.zeros(31, dtype=np.float32), "float32")
