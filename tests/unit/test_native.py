"""The native kernels give the bits of `reference` on every instruction set, thread count and split of the work."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from qlformat import native, native_arrays, native_library, reference
from qlformat.codebook import CODEBOOKS, DYNAMIC8, DYNAMIC8_THRESHOLDS
from qlformat.errors import NativeError, QlfError

if not native.available():
    pytest.skip(f"no native kernels to test: {native.why_unavailable()}", allow_module_level=True)

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
DTYPES = ("float32", "float16", "bfloat16")
QUANT_TYPES = ("nf4", "fp4")
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
OF_MACHINE = ("neon",) if platform.machine() in ("aarch64", "arm64") else ("avx2", "avx512")
LEVELS = ("scalar", *OF_MACHINE, "avx512-emulated", "neon-emulated")

Array = npt.NDArray[Any]
F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]


def simde_roots() -> list[Path]:
    """Where SIMDe's headers may be: in the package simde-py, or installed by the system."""
    found = importlib.util.find_spec("simde_py")
    packaged = [Path(found.origin).parent / "simde"] if found and found.origin else []
    return [*packaged, Path("/usr/include"), Path("/usr/local/include")]


@pytest.fixture(scope="session")
def emulated_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The AVX-512 and NEON sources compiled against SIMDe's portable emulation of their intrinsics."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler to build the emulated kernels with")
    headers = next((root for root in simde_roots() if (root / "simde/x86/avx512.h").is_file()), None)
    if headers is None:
        pytest.skip("SIMDe's headers are not installed (pip install simde-py, or Debian: apt-get install libsimde-dev)")
    build = tmp_path_factory.mktemp("emulated")
    flags = ["-std=c++17", "-O1", "-fPIC", "-ffp-contract=off", "-Wno-psabi", "-DQLF_SIMDE", f"-I{KERNELS / 'include'}"]
    flags += ["-idirafter", str(headers)]
    names = ("api", "merge", "nested", "sha256", "transpose", "scalar", "avx512", "neon")
    jobs = [
        subprocess.Popen([compiler, *flags, "-c", str(KERNELS / "cpu" / f"{name}.cpp"), "-o", str(build / f"{name}.o")])
        for name in names
    ]
    assert [job.wait() for job in jobs] == [0] * len(jobs)
    library = build / "libqlf_cpu.so"
    objects = [str(build / f"{name}.o") for name in names]
    subprocess.run([compiler, "-shared", *objects, "-o", str(library), "-pthread"], check=True)
    return library


@pytest.fixture
def load_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], None]]:
    """A function that makes `native` use another library file until the test ends."""

    def load(path: Path) -> None:
        monkeypatch.setenv("QLF_NATIVE_LIB", str(path))
        native_library.load.cache_clear()

    yield load
    monkeypatch.undo()
    native_library.load.cache_clear()


@pytest.fixture(params=LEVELS)
def isa(request: pytest.FixtureRequest, load_library: Callable[[Path], None]) -> str:
    """Each instruction set by name: native where the processor has it, and emulated."""
    name, _, emulated = str(request.param).partition("-")
    if emulated:
        load_library(request.getfixturevalue("emulated_library"))
    if name not in native.isa_levels():
        pytest.skip(f"this processor has no {name}; the same kernels run emulated where SIMDe is installed")
    return name


def bits(array: Array | np.generic) -> bytes:
    return array.tobytes()


def floats(*values: float) -> F32:
    return np.array(values, dtype=np.float32)


def assert_same(found: Array, expected: Array, what: str) -> None:
    """Bit equality; the message names the first difference."""
    if bits(found) == bits(expected):
        return
    wide = np.dtype(f"u{expected.itemsize}")
    where = np.flatnonzero(found.view(wide).ravel() != expected.view(wide).ravel())
    first = int(where[0])
    pytest.fail(
        f"{what}: {where.size} of {expected.size} differ, first at {first}: "
        f"found {found.ravel()[first]!r}, expected {expected.ravel()[first]!r}"
    )


def mixed_values(n: int, dtype: str, seed: int) -> Array:
    """Gaussian weights with blocks of zeros, subnormals, extremes, signed zeros and constant values among them."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal(n) * 0.05).astype(np.float32)
    largest = 65504.0 if dtype == "float16" else 2.0**126  # decoding a double-quantized 2**128 could overflow
    smallest = {"float32": 1e-45, "float16": 6e-8, "bfloat16": 1e-40}[dtype]
    for start in range(0, n, 96):
        span = x[start : start + 96]
        kind = (start // 96) % 8
        if kind == 1:
            span[:] = np.where(rng.random(span.size) < 0.5, np.float32(-0.0), np.float32(0.0))
        elif kind == 2:
            span[:] = (rng.integers(-90, 91, span.size) * smallest).astype(np.float32)
        elif kind == 3:
            span[rng.integers(span.size)] = -largest
        elif kind == 4:
            span[:] = largest
        elif kind == 5:
            span[:] = rng.choice(CODEBOOKS["nf4"].thresholds, span.size)
            span[0] = 1.0
    return reference.from_float32(x, dtype)


def sizes(blocksize: int) -> tuple[int, ...]:
    return (1, 2, 31, blocksize - 1, blocksize, blocksize + 1, 3 * blocksize + 5, 9 * blocksize)


@functools.cache
def expected_case(n: int, dtype: str, quant_type: str, blocksize: int) -> dict[str, Any]:
    """What the reference makes of one tensor, computed once for all instruction sets."""
    source = mixed_values(n, dtype, seed=n * blocksize)
    x = reference.to_float32(source, dtype)
    packed, absmax = reference.quantize(x, quant_type, blocksize)
    codes, nested, offset = reference.double_quantize(absmax)
    scales = reference.double_dequantize(codes, nested, offset)
    with np.errstate(over="ignore", invalid="ignore"):
        moments = reference.block_moments(x, packed, quant_type, blocksize)
    decoded = reference.dequantize(packed, absmax, n, quant_type, blocksize)
    decoded_nested = reference.dequantize(packed, scales, n, quant_type, blocksize)
    return {
        "source": source,
        "packed": packed,
        "absmax": absmax,
        "moments": moments,
        "nested": (codes, nested, offset),
        "decoded": {out: reference.from_float32(decoded, out) for out in DTYPES},
        "decoded_nested": {out: reference.from_float32(decoded_nested, out) for out in DTYPES},
    }


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_level_equals_the_reference(isa: str, dtype: str, quant_type: str, blocksize: int) -> None:
    how: dict[str, Any] = {"quant_type": quant_type, "blocksize": blocksize, "isa": isa}
    for n in sizes(blocksize):
        case = expected_case(n, dtype, quant_type, blocksize)
        moments = np.empty_like(case["moments"])
        packed, absmax = native.quantize(case["source"], dtype=dtype, moments=moments, **how)
        assert_same(packed, case["packed"], f"packed, n={n}")
        assert_same(absmax, case["absmax"], f"absmax, n={n}")
        assert_same(moments, case["moments"], f"moments, n={n}")
        for out in DTYPES:
            decoded = native.dequantize(packed, absmax, n, dtype=out, **how)
            assert_same(decoded, case["decoded"][out], f"decoded to {out}, n={n}")
            codes, nested, offset = case["nested"]
            decoded = native.dequantize_nested(packed, codes, nested, offset, n, dtype=out, **how)
            assert_same(decoded, case["decoded_nested"][out], f"nested, decoded to {out}, n={n}")


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_all_finite_16_bit_patterns(isa: str, dtype: str, quant_type: str) -> None:
    patterns = np.arange(65536, dtype=np.uint16)
    exponent = 0x7C00 if dtype == "float16" else 0x7F80
    finite = patterns[(patterns & exponent) != exponent]
    for order in (finite, np.random.default_rng(7).permutation(finite)):
        x = reference.to_float32(order.view(np.float16) if dtype == "float16" else order, dtype)
        expected = reference.quantize(x, quant_type, 64)
        packed, absmax = native.quantize(order, dtype=dtype, quant_type=quant_type, isa=isa)
        assert_same(packed, expected[0], "packed")
        assert_same(absmax, expected[1], "absmax")
        with np.errstate(over="ignore"):
            wide = reference.from_float32(reference.dequantize(packed, absmax, x.size, quant_type, 64), dtype)
        found = native.dequantize(packed, absmax, x.size, quant_type=quant_type, dtype=dtype, isa=isa)
        assert_same(found, wide, "decoded")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrowing_rounds_every_tie_to_even_and_overflows_to_infinity(isa: str, dtype: str) -> None:
    exponent = 0x7C00 if dtype == "float16" else 0x7F80
    patterns = np.arange(exponent, dtype=np.uint16)
    values = reference.to_float32(patterns.view(np.float16) if dtype == "float16" else patterns, dtype)
    middle = (values[1:].astype(np.float64) + values[:-1].astype(np.float64)) / 2
    ties = middle.astype(np.float32)
    limit = np.float32(65520.0) if dtype == "float16" else np.float32(3.3961776e38)
    absmax = np.concatenate([values, ties, np.nextafter(ties, np.float32(np.inf)), np.nextafter(ties, -np.float32(1))])
    absmax = np.abs(np.append(absmax, [limit, np.nextafter(limit, np.float32(0))])).astype(np.float32)
    # Every block is the code of 1.0 and of -1.0 in turn: absmax itself is what gets rounded.
    packed = np.full(absmax.size * 16, 0xF0, dtype=np.uint8)
    with np.errstate(over="ignore"):
        expected = reference.from_float32(np.repeat(absmax, 32) * np.tile(floats(1, -1), absmax.size * 16), dtype)
    found = native.dequantize(packed, absmax, absmax.size * 32, blocksize=32, dtype=dtype, isa=isa)
    assert_same(found, expected, "narrowed")


def codes_of(packed: U8, n: int) -> list[int]:
    return [int(code) for code in reference.unpack(packed, n)]


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_a_tie_takes_the_lower_code_and_one_ulp_decides(isa: str, quant_type: str) -> None:
    book = CODEBOOKS[quant_type]
    for direction, step in ((-np.inf, 0), (None, 0), (np.inf, 1)):
        s = book.thresholds.copy()
        if direction is not None:
            # Beside a threshold of 0.0 the neighbour is subnormal: it must not be flushed to the tie.
            s = np.nextafter(s, np.float32(direction))
        x = np.zeros(64, dtype=np.float32)
        x[:16] = [1.0, *s]
        packed, _ = native.quantize(x, dtype="float32", quant_type=quant_type, isa=isa)
        expected = [int(book.order[rank + step]) for rank in range(15)]
        assert codes_of(packed, 64)[1:16] == expected


@pytest.mark.parametrize(("quant_type", "zero"), [("nf4", 7), ("fp4", 0)])
def test_zero_blocks_signed_zeros_and_the_pad_nibble(isa: str, quant_type: str, zero: int) -> None:
    x = np.zeros(64 + 3, dtype=np.float32)
    x[::2] = -0.0
    packed, absmax = native.quantize(x, dtype="float32", quant_type=quant_type, isa=isa)
    assert bits(packed) == bytes([zero << 4 | zero] * 34)
    assert bits(absmax) == bits(np.array([0.0, 1e-38], dtype=np.float32))  # the ragged tail stores its divisor


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_full_blocks_multiply_by_the_reciprocal_and_the_tail_divides(isa: str, quant_type: str) -> None:
    """Values for which the two roundings fall on different sides of a threshold."""
    rng = np.random.default_rng(17)
    absmax = rng.uniform(0.5, 2.0, 200_000).astype(np.float32)
    x = (rng.choice(CODEBOOKS[quant_type].thresholds, absmax.size) * absmax).astype(np.float32)
    multiplied, divided = x * (np.float32(1) / absmax), x / absmax

    def rank(scaled: F32) -> npt.NDArray[np.intp]:
        return np.searchsorted(CODEBOOKS[quant_type].thresholds, scaled, side="left")

    telling = np.flatnonzero(rank(multiplied) != rank(divided))
    assert telling.size > 1000
    for index in telling[:200]:
        block = np.zeros(64, dtype=np.float32)
        block[:2] = absmax[index], x[index]
        for count, scaled in ((64, multiplied), (33, divided)):
            packed, _ = native.quantize(block[:count], dtype="float32", quant_type=quant_type, isa=isa)
            assert packed[0] & 15 == CODEBOOKS[quant_type].order[rank(scaled[index : index + 1])[0]]


def test_blocks_below_the_smallest_divisor(isa: str) -> None:
    x = np.zeros(128, dtype=np.float32)
    x[:64] = np.float32(1e-38) * np.linspace(-1, 1, 64, dtype=np.float32)
    x[64:] = np.float32(1e-40) * np.linspace(-1, 1, 64, dtype=np.float32)
    packed, absmax = native.quantize(x, dtype="float32", isa=isa)
    assert_same(packed, reference.quantize(x, "nf4", 64)[0], "packed")
    assert bits(absmax) == bits(np.abs(x.reshape(2, 64)).max(axis=1))


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_any_finite_bit_pattern(isa: str, quant_type: str) -> None:
    """Random float32 patterns: blocks whose magnitudes span the whole range, subnormals and the largest included."""
    rng = np.random.default_rng(13)
    for n in (64 * 200, 64 * 7 + 29, 5):
        patterns = rng.integers(0, 1 << 32, n, dtype=np.uint32)
        patterns[(patterns & 0x7F800000) == 0x7F800000] &= 0x807FFFFF
        narrow = patterns.copy()  # the same mantissas within a few binades: codes of every rank
        narrow = (narrow & np.uint32(0x807FFFFF)) | (np.uint32(0x3B000000) + (narrow & np.uint32(0x03800000)))
        extremes = np.where(rng.random(n) < 0.5, np.uint32(0x7F7FFFFF), np.uint32(0xFF7FFFFF))
        for bit_patterns in (patterns, narrow, extremes):
            x = bit_patterns.astype(np.uint32).view(np.float32)
            for blocksize in (32, 64, 128):
                expected = reference.quantize(x, quant_type, blocksize)
                how: dict[str, Any] = {"quant_type": quant_type, "blocksize": blocksize, "isa": isa}
                packed, absmax = native.quantize(x, dtype="float32", **how)
                assert_same(packed, expected[0], "packed")
                assert_same(absmax, expected[1], "absmax")
                decoded = reference.dequantize(packed, absmax, n, quant_type, blocksize)
                assert_same(native.dequantize(packed, absmax, n, **how), decoded, "decoded")


LARGE = (1 << 19) + (1 << 17) + 4099  # six pieces of work, the last one ragged


@pytest.fixture(scope="module")
def large() -> Array:
    """bfloat16 weights whose scale grows along the tensor: every nested block has its own nested_absmax."""
    rng = np.random.default_rng(3)
    scale = np.linspace(0.01, 2.0, LARGE, dtype=np.float32)
    return reference.from_float32(rng.standard_normal(LARGE, dtype=np.float32) * scale, "bfloat16")


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_threads_do_not_change_the_bytes(large: Array, threads: int) -> None:
    def run(count: int) -> list[bytes]:
        moments = np.empty((-(-LARGE // 64), 3), dtype=np.float32)
        packed, absmax = native.quantize(large, dtype="bfloat16", moments=moments, threads=count)
        nested = native.double_quantize(absmax, threads=count)
        plain = native.dequantize(packed, absmax, LARGE, dtype="bfloat16", threads=count)
        both = native.dequantize_nested(packed, *nested, LARGE, dtype="float16", threads=count)
        scales = native.double_dequantize(*nested)
        assert bits(both) == bits(native.dequantize(packed, scales, LARGE, dtype="float16", threads=count))
        return [bits(array) for array in (packed, absmax, moments, *nested, plain, both)]

    assert run(threads) == run(1)


def test_pieces_give_the_bytes_of_the_whole(isa: str, large: Array) -> None:
    n, blocksize = 64 * 1000 + 7, 64
    source = large[:n]
    moments = np.empty((1001, 3), dtype=np.float32)
    packed, absmax = native.quantize(source, dtype="bfloat16", moments=moments, isa=isa)
    codes, nested, offset = native.double_quantize(absmax)
    whole = native.dequantize_nested(packed, codes, nested, offset, n, dtype="bfloat16", isa=isa)
    parts: list[list[Array]] = [[], [], [], []]
    edges = [0, 64, 64 * 255, 64 * 257, 64 * 700, n]
    for begin, end in itertools.pairwise(edges):
        first, last = begin // blocksize, -(-end // blocksize)
        part = np.empty((last - first, 3), dtype=np.float32)
        got = native.quantize(source[begin:end], dtype="bfloat16", moments=part, isa=isa)
        decoded = native.dequantize_nested(
            got[0], codes[first:last], nested, offset, end - begin, dtype="bfloat16", first_block=first, isa=isa
        )
        for collected, array in zip(parts, (*got, part, decoded), strict=True):
            collected.append(array)
    for collected, array in zip(parts, (packed, absmax, moments, whole), strict=True):
        assert_same(np.concatenate(collected), array, "pieces")


def test_flush_to_zero_in_the_caller_changes_nothing(isa: str) -> None:
    n = 64 * 40 + 9
    x = mixed_values(n, "float32", seed=11)
    x[: 64 * 8] *= np.float32(1e-38)
    expected = reference.quantize(x, "nf4", 64)
    moments = np.empty((41, 3), dtype=np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        expected_moments = reference.block_moments(x, expected[0], "nf4", 64)
    expected_decoded = reference.dequantize(*expected, n, "nf4", 64)
    tiny_absmax = np.linspace(1e-45, 1e-39, 300, dtype=np.float32)
    expected_nested = reference.double_quantize(tiny_absmax)
    expected_scales = reference.double_dequantize(*expected_nested)
    tiny_moments = np.full((300, 3), 1e-40, dtype=np.float32)
    expected_error = reference.squared_error(tiny_absmax, tiny_moments)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        assert (torch.tensor([1e-39]) * 1.0).item() == 0.0  # else the test shows nothing
        packed, absmax = native.quantize(x, dtype="float32", moments=moments, isa=isa)
        decoded = native.dequantize(packed, absmax, n, isa=isa)
        nested = native.double_quantize(tiny_absmax)
        scales = native.double_dequantize(*nested)
        error = native.squared_error(tiny_absmax, tiny_moments)
        assert (torch.tensor([1e-39]) * 1.0).item() == 0.0  # the caller's mode is restored
    finally:
        torch.set_flush_denormal(False)
    assert_same(packed, expected[0], "packed")
    assert_same(absmax, expected[1], "absmax")
    assert_same(moments, expected_moments, "moments")
    assert_same(decoded, expected_decoded, "decoded")
    assert [bits(a) for a in nested] == [bits(a) for a in expected_nested]
    assert_same(scales, expected_scales, "scales")
    assert error == expected_error and error[1] > 0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_first_block_that_is_not_finite_is_named(isa: str, dtype: str, value: float) -> None:
    n = 64 * 5000 + 3
    for positions, block in (([64 * 3 + 63, 64 * 4000], 3), ([n - 1], 5000), ([0], 0)):
        x = np.ones(n, dtype=np.float32)
        x[positions] = value
        bad = reference.from_float32(x, dtype)
        for threads in (1, 3):
            with pytest.raises(native.NonFiniteError, match="NaN or infinity") as caught:
                native.quantize(bad, dtype=dtype, threads=threads, isa=isa)
            assert caught.value.block == block
            assert caught.value.rule == "E1"
            assert "\n" not in str(caught.value)


def test_the_first_bad_block_is_named_whichever_thread_finds_one_first() -> None:
    piece = 1 << 17  # elements that one thread takes at a time
    early = [piece - 64, 2 * piece - 1, 3 * piece - 1, 4 * piece]
    for positions in (early, [piece - 1, piece, 2 * piece, 5 * piece]):
        x = np.zeros(6 * piece, dtype=np.uint16)
        x[positions] = 0x7F80
        for threads in (1, 2, 3) * 8:
            with pytest.raises(native.NonFiniteError) as caught:
                native.quantize(x, dtype="bfloat16", threads=threads)
            assert caught.value.block == positions[0] // 64


@pytest.mark.parametrize("threads", [1, 3])
def test_double_quantization_equals_the_reference(threads: int) -> None:
    rng = np.random.default_rng(5)
    cases = [np.abs(rng.standard_normal(nb)).astype(np.float32) for nb in (1, 2, 255, 256, 257, 1024, 1300, 70001)]
    cases += [np.full(300, 0.75, dtype=np.float32), np.zeros(300, dtype=np.float32)]
    cases += [(np.abs(rng.standard_normal(600)) * scale).astype(np.float32) for scale in (1e-44, 1e-39, 1e-20, 1e37)]
    for absmax in cases:
        codes, nested, offset = native.double_quantize(absmax, threads=threads)
        expected = reference.double_quantize(absmax)
        assert_same(codes, expected[0], "codes")
        assert_same(nested, expected[1], "nested_absmax")
        assert bits(offset) == bits(expected[2]) and isinstance(offset, np.float32)
        assert_same(native.double_dequantize(codes, nested, offset), reference.double_dequantize(*expected), "absmax")


def test_double_quantization_at_every_threshold() -> None:
    # Each value is followed by its opposite, so the mean is exactly 0, and 1.0 scales each block of 256 by exactly 1.
    for direction in (-np.inf, None, np.inf):
        s = DYNAMIC8_THRESHOLDS if direction is None else np.nextafter(DYNAMIC8_THRESHOLDS, np.float32(direction))
        for start in range(0, 255, 127):
            part = s[start : start + 127]
            absmax = np.concatenate([np.stack([part, -part], axis=1).reshape(-1), floats(1, -1)])
            codes, nested, offset = native.double_quantize(absmax)
            assert offset == 0 and bits(nested) == bits(floats(1))
            assert_same(codes, np.searchsorted(DYNAMIC8_THRESHOLDS, absmax, side="left").astype(np.uint8), "codes")


def test_the_offset_is_summed_in_the_order_of_the_spec() -> None:
    # 1e30 + 1 rounds to 1e30: each order of the additions leaves another sum.
    for terms, total in (((1e30, 1, -1e30, 1), 1), ((1e30, -1e30, 1, 1), 2), ((1, 1e30, 1, -1e30), 0)):
        within, across = np.zeros(2048, dtype=np.float32), np.zeros(2048, dtype=np.float32)
        within[[0, 1, 2, 3]] = terms
        across[[5, 256, 600, 1023]] = terms
        for absmax in (within, across, within[:255], across[:1024]):
            _, _, offset = native.double_quantize(absmax)
            assert offset == np.float32(total / absmax.size)
            assert offset == reference.nested_offset(absmax)


def test_every_8_bit_code_decodes_in_two_roundings() -> None:
    codes = np.tile(np.arange(256, dtype=np.uint8), 3)
    nested = floats(0.1, 3e38, 1e-40)
    offset = np.float32(0.3)
    expected = np.concatenate([(DYNAMIC8 * scale).astype(np.float32) + offset for scale in nested])
    assert_same(native.double_dequantize(codes, nested, offset), expected, "absmax")


def test_double_quantization_names_the_first_value_that_is_not_finite() -> None:
    absmax = np.ones(2000, dtype=np.float32)
    absmax[[700, 1500]] = np.nan
    with pytest.raises(native.NonFiniteError) as caught:
        native.double_quantize(absmax)
    assert caught.value.block == 700


def test_squared_error_equals_the_reference_and_the_plain_formula() -> None:
    n = 64 * 3000 + 11
    x = (np.random.default_rng(1).standard_normal(n) * 0.02).astype(np.float32)
    moments = np.empty((3001, 3), dtype=np.float32)
    packed, absmax = native.quantize(x, dtype="float32", moments=moments)
    scales = native.double_dequantize(*native.double_quantize(absmax))
    error, signal = native.squared_error(scales, moments)
    assert (error, signal) == reference.squared_error(scales, moments)
    difference = x.astype(np.float64) - native.dequantize(packed, scales, n)
    assert error == pytest.approx(float(difference @ difference), rel=1e-4)
    assert signal == pytest.approx(float(x.astype(np.float64) @ x), rel=1e-6)


@pytest.mark.parametrize("dtype", [np.float16, np.uint16, np.float32])
@pytest.mark.parametrize("shape", [(1, 1), (1, 77), (31, 33), (700, 513), (0, 5)])
@pytest.mark.parametrize("threads", [1, 3])
def test_transpose(dtype: npt.DTypeLike, shape: tuple[int, int], threads: int) -> None:
    src = np.random.default_rng(2).integers(0, 9999, shape).astype(dtype)
    assert bits(native.transpose(src, threads=threads)) == bits(np.ascontiguousarray(src.T))
    out = np.empty(shape[::-1], dtype=dtype)
    assert native.transpose(src, out=out) is out
    assert bits(out) == bits(np.ascontiguousarray(src.T))


def test_nothing_outside_the_outputs_is_written(isa: str) -> None:
    """Red zones around every output, for every small size; reads are watched by test_sanitizers."""

    def guarded(nbytes: int) -> tuple[U8, U8]:
        raw = np.full(nbytes + 256, 0xA5, dtype=np.uint8)
        return raw, raw[128 : 128 + nbytes]

    for n in (*range(140), 257, 1023):
        nb = -(-n // 32)
        source = mixed_values(n, "float32", seed=n)
        zones = [guarded(size) for size in ((n + 1) // 2, nb * 4, nb * 12, n * 4, n * 2)]
        packed, absmax, moments, out32, out16 = (inner for _, inner in zones)
        scales = absmax.view(np.float32)
        native.quantize(
            source,
            dtype="float32",
            blocksize=32,
            packed=packed,
            absmax=scales,
            moments=moments.view(np.float32),
            isa=isa,
        )
        native.dequantize(packed, scales, n, blocksize=32, out=out32.view(np.float32), isa=isa)
        native.dequantize(packed, scales, n, blocksize=32, dtype="bfloat16", out=out16.view(np.uint16), isa=isa)
        for raw, inner in zones:
            assert (raw[:128] == 0xA5).all() and (raw[128 + inner.size :] == 0xA5).all()


def test_any_alignment_works(isa: str) -> None:
    n = 64 * 9 + 5
    source = mixed_values(n, "float32", seed=21)
    packed, absmax = native.quantize(source, dtype="float32", isa=isa)
    decoded = native.dequantize(packed, absmax, n, isa=isa)

    def shifted(array: Array) -> Array:
        raw = np.zeros(array.nbytes + 1, dtype=np.uint8)
        raw[1:] = np.frombuffer(array.tobytes(), dtype=np.uint8)
        moved: Array = raw[1:].view(array.dtype)
        return moved

    again = native.quantize(shifted(source), dtype="float32", absmax=shifted(absmax), packed=shifted(packed), isa=isa)
    assert [bits(array) for array in again] == [bits(packed), bits(absmax)]
    out = native.dequantize(shifted(packed), shifted(absmax), n, out=shifted(decoded), isa=isa)
    assert bits(out) == bits(decoded)


def test_large_outputs_are_the_same_with_streaming_stores(isa: str) -> None:
    """Outputs of 32 MiB and more on a cache-line boundary bypass the cache; others do not."""
    n = (1 << 24) + 64 * 3 + 5
    packed = np.resize(np.random.default_rng(9).integers(0, 256, 4099, dtype=np.uint8), (n + 1) // 2)
    absmax = np.resize(floats(0.5, 0.25, 3.0, 1e-3, 7.0), -(-n // 64))
    begin = n // 64 * 64 - 6400
    expected = reference.dequantize(packed[begin // 2 :], absmax[begin // 64 :], n - begin, "nf4", 64)
    for dtype in ("float32", "bfloat16"):
        streamed = native.dequantize(packed, absmax, n, dtype=dtype, threads=2, isa=isa)
        raw = np.empty(streamed.nbytes + 128, dtype=np.uint8)
        start = 8 - raw.ctypes.data % 64 + 64
        out = raw[start : start + streamed.nbytes].view(streamed.dtype)
        assert (streamed.ctypes.data % 64, out.ctypes.data % 64) == (0, 8)
        native.dequantize(packed, absmax, n, dtype=dtype, out=out, threads=2, isa=isa)
        assert bits(out) == bits(streamed)
        assert_same(streamed[begin:], reference.from_float32(expected, dtype), "the last blocks")


def _valid() -> dict[str, Any]:
    x = np.linspace(-1, 1, 100, dtype=np.float32)
    packed, absmax = native.quantize(x, dtype="float32")
    codes, nested, offset = native.double_quantize(absmax)
    return {"x": x, "packed": packed, "absmax": absmax, "codes": codes, "nested": nested, "offset": offset}


MISUSES: dict[str, Callable[[dict[str, Any]], object]] = {
    "src of another dtype": lambda v: native.quantize(v["x"], dtype="bfloat16"),
    "src of int": lambda v: native.quantize(v["x"].astype(np.int32), dtype="float32"),
    "src big-endian": lambda v: native.quantize(v["x"].astype(">f4"), dtype="float32"),
    "src not an array": lambda v: native.quantize(v["x"].tolist(), dtype="float32"),
    "src strided": lambda v: native.quantize(v["x"][::2], dtype="float32"),
    "unknown dtype": lambda v: native.quantize(v["x"], dtype="float8"),
    "unknown quant_type": lambda v: native.quantize(v["x"], dtype="float32", quant_type="nf3"),
    "blocksize 48": lambda v: native.quantize(v["x"], dtype="float32", blocksize=48),
    "blocksize 16": lambda v: native.quantize(v["x"], dtype="float32", blocksize=16),
    "blocksize 8192": lambda v: native.quantize(v["x"], dtype="float32", blocksize=8192),
    "no threads": lambda v: native.quantize(v["x"], dtype="float32", threads=0),
    "too many threads": lambda v: native.quantize(v["x"], dtype="float32", threads=257),
    "unknown isa": lambda v: native.quantize(v["x"], dtype="float32", isa="sse9"),
    "packed too short": lambda v: native.quantize(v["x"], dtype="float32", packed=np.empty(49, np.uint8)),
    "absmax too short": lambda v: native.quantize(v["x"], dtype="float32", absmax=np.empty(1, np.float32)),
    "moments too short": lambda v: native.quantize(v["x"], dtype="float32", moments=np.empty((1, 3), np.float32)),
    "packed read-only": lambda v: native.quantize(
        v["x"], dtype="float32", packed=np.frombuffer(bytes(50), dtype=np.uint8)
    ),
    "packed over src": lambda v: native.quantize(v["x"], dtype="float32", packed=v["x"].view(np.uint8)[:50]),
    "decode: packed too short": lambda v: native.dequantize(v["packed"][:-1], v["absmax"], 100),
    "decode: absmax too short": lambda v: native.dequantize(v["packed"], v["absmax"][:1], 100),
    "decode: absmax of float64": lambda v: native.dequantize(v["packed"], v["absmax"].astype(np.float64), 100),
    "blocksize 64.0": lambda v: native.quantize(v["x"], dtype="float32", blocksize=64.0),  # type: ignore[arg-type]
    "threads not an integer": lambda v: native.quantize(v["x"], dtype="float32", threads="2"),  # type: ignore[arg-type]
    "packed a list": lambda v: native.quantize(v["x"], dtype="float32", packed=[0] * 50),  # type: ignore[arg-type]
    "decode: packed a list": lambda v: native.dequantize(v["packed"].tolist(), v["absmax"], 100),
    "decode: out a list": lambda v: native.dequantize(v["packed"], v["absmax"], 100, out=[0.0] * 100),  # type: ignore[arg-type]
    "decode: n not an integer": lambda v: native.dequantize(v["packed"], v["absmax"], 100.0),  # type: ignore[arg-type]
    "decode: n beyond the limit": lambda v: native.dequantize(v["packed"], v["absmax"], 1 << 60),
    "decode: out over packed": lambda v: native.dequantize(v["x"].view(np.uint8)[:50], v["absmax"], 100, out=v["x"]),
    "nested: offset not a number": lambda v: native.dequantize_nested(
        v["packed"],
        v["codes"],
        v["nested"],
        v["x"].tobytes(),
        100,
    ),
    "decode: negative n": lambda v: native.dequantize(v["packed"], v["absmax"], -1),
    "decode: out too short": lambda v: native.dequantize(
        v["packed"], v["absmax"], 100, out=np.empty(99, dtype=np.float32)
    ),
    "decode: out of another dtype": lambda v: native.dequantize(
        v["packed"], v["absmax"], 100, dtype="bfloat16", out=np.empty(100, dtype=np.float16)
    ),
    "nested: too few nested_absmax": lambda v: native.dequantize_nested(
        v["packed"], v["codes"], v["nested"], v["offset"], 100, first_block=255
    ),
    "nested: negative first_block": lambda v: native.dequantize_nested(
        v["packed"], v["codes"], v["nested"], v["offset"], 100, first_block=-1
    ),
    "nested: absmax not uint8": lambda v: native.dequantize_nested(
        v["packed"], v["absmax"], v["nested"], v["offset"], 100
    ),
    "double_quantize: nothing": lambda v: native.double_quantize(np.empty(0, dtype=np.float32)),
    "double_dequantize: sizes": lambda v: native.double_dequantize(np.zeros(257, np.uint8), v["nested"], 0.0),
    "squared_error: sizes": lambda v: native.squared_error(v["absmax"], np.zeros((1, 3), np.float32)),
    "transpose: 1-D": lambda v: native.transpose(v["x"]),
    "transpose: 8-byte elements": lambda v: native.transpose(np.zeros((2, 2))),
    "transpose: shape of out": lambda v: native.transpose(
        np.zeros((2, 3), np.float32), out=np.zeros((2, 3), np.float32)
    ),
}


@pytest.mark.parametrize("misuse", MISUSES)
def test_misuse_is_one_clear_line(misuse: str) -> None:
    with pytest.raises(NativeError) as caught:
        MISUSES[misuse](_valid())
    assert isinstance(caught.value, QlfError)
    assert str(caught.value) and "\n" not in str(caught.value)


def test_isa_can_be_forced_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.ones(64, dtype=np.float32)
    missing = [name for name in native_arrays.ISA_LEVELS if name not in native.isa_levels()]
    for name in missing:
        monkeypatch.setenv("QLF_ISA", name)
        with pytest.raises(NativeError, match="has only scalar"):
            native.quantize(x, dtype="float32")
    monkeypatch.setenv("QLF_ISA", "scalar")
    assert native.quantize(x, dtype="float32")[1][0] == 1
    monkeypatch.setenv("QLF_ISA", "no-such")
    with pytest.raises(NativeError, match="needed one of"):
        native.quantize(x, dtype="float32")


def test_default_threads_follow_the_affinity_mask() -> None:
    assert 1 <= native.default_threads() <= (os.cpu_count() or 1)


def test_a_missing_library_is_explained(
    load_library: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "libqlf_cpu.so"
    broken.write_text("not a library")
    for path, reason in ((tmp_path / "none.so", "cannot be loaded"), (broken, "cannot be loaded")):
        load_library(path)
        monkeypatch.delenv("QLF_REQUIRE_NATIVE", raising=False)
        assert not native.available()
        assert reason in native.why_unavailable() and "\n" not in native.why_unavailable()
        with pytest.raises(NativeError, match="unavailable"):
            native.quantize(np.ones(64, dtype=np.float32), dtype="float32")
        monkeypatch.setenv("QLF_REQUIRE_NATIVE", "1")
        with pytest.raises(NativeError, match=reason):
            native.available()


def test_another_interface_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QLF_REQUIRE_NATIVE", raising=False)
    monkeypatch.setattr(native_library, "ABI_VERSION", 99)
    native_library.load.cache_clear()
    try:
        assert not native.available()
        assert "interface version 1, needed 99" in native.why_unavailable()
    finally:
        native_library.load.cache_clear()


def test_first_use_imports_nothing_slow() -> None:
    code = (
        "import sys, numpy; before = set(sys.modules); from qlformat import native; assert native.available();"
        "print(*sorted(set(sys.modules) - before))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    imported = set(found.stdout.split())
    assert "qlformat.native" in imported
    assert not imported & {"torch", "importlib.metadata", "email", "zipfile", "transformers"}


def _table(header: str, name: str) -> list[int]:
    body = re.search(rf"\b{name}\[(\d+)\] = {{([^}}]*)}}", header)
    assert body is not None, name
    literals = [literal.strip().rstrip("u") for literal in body.group(2).split(",") if literal.strip()]
    assert len(literals) == int(body.group(1))
    return [int(literal, 0) for literal in literals]


def test_the_c_header_holds_the_same_tables() -> None:
    header = (KERNELS / "include" / "qlf" / "codebook.h").read_text()

    def float_bits(values: F32) -> list[int]:
        return [int(value) for value in values.view(np.uint32)]

    for name, book in CODEBOOKS.items():
        assert _table(header, f"qlf_{name}_values") == float_bits(book.values)
        assert _table(header, f"qlf_{name}_thresholds") == float_bits(book.thresholds)
        assert _table(header, f"qlf_{name}_order") == [int(code) for code in book.order]
    assert _table(header, "qlf_dynamic8_values") == float_bits(DYNAMIC8)
    assert _table(header, "qlf_dynamic8_thresholds") == float_bits(DYNAMIC8_THRESHOLDS)


def test_no_python_package_in_the_kernels_folder() -> None:
    """An importable `kernels` at the repository root would shadow Hugging Face's package of that name."""
    assert not list(KERNELS.rglob("*.py"))
    spec = importlib.util.find_spec("qlformat.native")
    assert spec is not None
