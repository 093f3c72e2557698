"""The native kernels against bitsandbytes' CPU path, bit for bit, on more than 10^8 random values and the edge cases.

Two differences are known, and each is asserted exactly: bitsandbytes decodes fp4's code 8 to -0.0 where its own table
says 0.0, and its nested_offset, a float32 mean whose last bits depend on its thread count.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from bitsandbytes import functional

from qlformat import native, reference
from qlformat.codebook import CODEBOOKS, DYNAMIC8, DYNAMIC8_THRESHOLDS

if not native.available():
    pytest.skip(f"no native kernels to test: {native.why_unavailable()}", allow_module_level=True)

Array = npt.NDArray[Any]
F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]

CHUNK = 4_000_000
THREADS = native.default_threads()
RANDOM = [
    ("nf4", 64, "bfloat16", 32_000_000),
    ("nf4", 64, "float16", 24_000_000),
    ("nf4", 64, "float32", 16_000_000),
    ("fp4", 64, "bfloat16", 8_000_000),
    ("fp4", 64, "float16", 8_000_000),
    ("fp4", 64, "float32", 8_000_000),
    *[("nf4", blocksize, "bfloat16", 1_000_000) for blocksize in (32, 128, 256, 512, 1024, 2048, 4096)],
    *[("fp4", blocksize, "float32", 1_000_000) for blocksize in (32, 128, 256, 512, 1024, 2048, 4096)],
]


def as_tensor(source: Array, dtype: str) -> Any:
    return torch.from_numpy(source.view(np.int16) if dtype == "bfloat16" else source).view(getattr(torch, dtype))


def as_bits(tensor: Any) -> Array:
    """A float tensor's bits as unsigned integers."""
    wide = torch.int32 if tensor.dtype == torch.float32 else torch.int16
    array: Array = tensor.contiguous().view(wide).numpy()
    return array.view(np.uint32 if wide == torch.int32 else np.uint16)


def random_chunks(total: int, dtype: str) -> Iterator[Array]:
    """Weights as they come: Gaussian, heavy-tailed, uniform, and blocks of very different magnitudes."""
    for index, start in enumerate(range(0, total, CHUNK)):
        n = min(CHUNK, total - start)
        rng = np.random.default_rng([total, index])
        x = rng.standard_normal(n, dtype=np.float32)
        if index % 4 == 1:
            x *= np.abs(rng.standard_normal(n, dtype=np.float32)) ** 2
        elif index % 4 == 2:
            x = rng.random(n, dtype=np.float32) * 2 - 1
        elif index % 4 == 3:
            x *= np.repeat(np.exp2(rng.integers(-12, 3, -(-n // 64))), 64)[:n].astype(np.float32)
        yield reference.from_float32(x * np.float32(0.02), dtype)


def assert_like_bitsandbytes(source: Array, dtype: str, quant_type: str, blocksize: int) -> None:
    """Encode and decode one array with both."""
    n = source.size
    packed, absmax = native.quantize(source, dtype=dtype, quant_type=quant_type, blocksize=blocksize, threads=THREADS)
    theirs, state = functional.quantize_4bit(as_tensor(source, dtype), blocksize=blocksize, quant_type=quant_type)
    their_packed = theirs.numpy().ravel()
    if n % 2:  # bitsandbytes leaves the same pad: the code of zero
        assert their_packed[-1] & 15 == CODEBOOKS[quant_type].zero_code
    different = np.flatnonzero(packed != their_packed)
    assert different.size == 0, f"{different.size} packed bytes differ, first at {different[0]}"
    assert absmax.tobytes() == state.absmax.numpy().tobytes()
    decoded = native.dequantize(
        packed, absmax, n, quant_type=quant_type, blocksize=blocksize, dtype=dtype, threads=THREADS
    )
    assert_decoded_alike(decoded, functional.dequantize_4bit(theirs, state), packed, quant_type)


def assert_decoded_alike(ours: Array, theirs: Any, packed: U8, quant_type: str) -> None:
    found = ours.view(np.uint32 if ours.itemsize == 4 else np.uint16).ravel()
    expected = as_bits(theirs).ravel()
    if np.array_equal(found, expected):
        return
    different = np.flatnonzero(found != expected)
    assert quant_type == "fp4", f"{different.size} decoded values differ, first at {different[0]}"
    codes = reference.unpack(packed, found.size)[different]
    assert (codes == 8).all()
    sign = 1 << (8 * ours.itemsize - 1)
    assert (found[different] == 0).all() and (expected[different] == sign).all()


@pytest.mark.parametrize(("quant_type", "blocksize", "dtype", "total"), RANDOM)
def test_random_values(quant_type: str, blocksize: int, dtype: str, total: int) -> None:
    for source in random_chunks(total, dtype):
        assert_like_bitsandbytes(source, dtype, quant_type, blocksize)


def test_the_random_values_are_enough() -> None:
    assert sum(total for *_, total in RANDOM) >= 10**8


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_edge_cases(dtype: str, quant_type: str) -> None:
    rng = np.random.default_rng(3)
    book = CODEBOOKS[quant_type]
    cases = [(rng.standard_normal(n) * 0.1).astype(np.float32) for n in (*range(1, 70), 127, 128, 129, 191, 4097)]
    ties = [np.nextafter(book.thresholds, np.float32(to)) for to in (-np.inf, np.inf)] + [book.thresholds]
    cases += [np.concatenate([[1.0], part, np.zeros(48)]).astype(np.float32) for part in ties]
    signs = np.where(np.arange(64) % 2, np.float32(-0.0), np.float32(0.0))
    cases += [np.zeros(64, np.float32), signs, np.append(signs, np.float32(-0.0)), np.append(signs[1:], np.float32(1))]
    unit = {"float32": 1e-45, "float16": 6e-8, "bfloat16": 1e-40}[dtype]
    cases += [(rng.integers(-99, 100, n) * unit).astype(np.float32) for n in (64, 65, 128, 1)]
    cases += [np.float32(scale) * np.linspace(-1, 1, 128, dtype=np.float32) for scale in (1e-37, 1e-38, 9e-39, 2e-38)]
    largest = {"float32": 3.4028235e38, "float16": 65504.0, "bfloat16": 3.3895314e38}[dtype]
    cases += [np.float32(largest) * rng.choice(np.array([-1, 0.5, 1], np.float32), n) for n in (64, 67)]
    for case in cases:
        assert_like_bitsandbytes(reference.from_float32(case, dtype), dtype, quant_type, 64)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_all_finite_16_bit_patterns(dtype: str, quant_type: str) -> None:
    exponent = 0x7C00 if dtype == "float16" else 0x7F80
    patterns = np.arange(65536, dtype=np.uint16)
    finite = np.random.default_rng(1).permutation(patterns[(patterns & exponent) != exponent])
    for order in (np.sort(finite), finite):
        source = order.view(np.float16) if dtype == "float16" else order
        assert_like_bitsandbytes(source, dtype, quant_type, 64)


def absmax_of_weights(n: int, seed: int) -> F32:
    x = np.random.default_rng(seed).standard_normal(n, dtype=np.float32) * np.float32(0.02)
    return native.quantize(x, dtype="float32", threads=THREADS)[1]


@pytest.mark.parametrize("nb", [1, 100, 256, 257, 400_000])
def test_double_quantization_equals_bitsandbytes_for_the_same_offset(nb: int) -> None:
    absmax = absmax_of_weights(nb * 64, seed=nb)
    codes, nested, offset = native.double_quantize(absmax)
    theirs, state = functional.quantize_blockwise(torch.from_numpy(absmax - offset), blocksize=256)
    assert state.code.numpy().tobytes() == DYNAMIC8.tobytes()
    assert nested.tobytes() == state.absmax.numpy().tobytes()
    assert codes.tobytes() == theirs.numpy().tobytes()


def test_the_8_bit_thresholds_are_where_bitsandbytes_changes_its_code() -> None:
    # Each block of 256 holds 1.0, so that it is scaled by exactly 1, and 255 values.
    steps = [np.nextafter(DYNAMIC8_THRESHOLDS, np.float32(to)) for to in (-np.inf, np.inf)]
    rng = np.random.default_rng(3)
    fine = [rng.standard_normal(255 * 400, dtype=np.float32) * np.float32(s) for s in (0.3, 1e-3, 1e-5, 1e-7)]
    values = np.clip(np.concatenate([DYNAMIC8_THRESHOLDS, *steps, *fine]), -1, 1).reshape(-1, 255)
    blocks = np.concatenate([np.ones((len(values), 1), dtype=np.float32), values], axis=1)
    theirs, _ = functional.quantize_blockwise(torch.from_numpy(blocks), blocksize=256)
    ours = np.searchsorted(DYNAMIC8_THRESHOLDS, blocks, side="left").astype(np.uint8)
    assert ours.tobytes() == theirs.numpy().tobytes()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_bitsandbytes_decodes_our_double_quantized_tensors_to_the_same_bits(dtype: str) -> None:
    n = 64 * 20_000 + 33
    x = np.random.default_rng(8).standard_normal(n, dtype=np.float32) * np.float32(0.02)
    packed, absmax = native.quantize(reference.from_float32(x, dtype), dtype=dtype, threads=THREADS)
    codes, nested, offset = native.double_quantize(absmax)
    ours = native.dequantize_nested(packed, codes, nested, offset, n, dtype=dtype, threads=THREADS)
    inner = functional.QuantState(
        absmax=torch.from_numpy(nested), code=torch.from_numpy(DYNAMIC8.copy()), blocksize=256, dtype=torch.float32
    )
    state = functional.QuantState(
        absmax=torch.from_numpy(codes),
        shape=torch.Size([n]),
        dtype=getattr(torch, dtype),
        blocksize=64,
        code=torch.from_numpy(CODEBOOKS["nf4"].values.copy()),
        quant_type="nf4",
        offset=torch.tensor(offset),
        state2=inner,
    )
    theirs = functional.dequantize_4bit(torch.from_numpy(packed).reshape(-1, 1), state)
    assert_decoded_alike(ours, theirs, packed, "nf4")
