"""The CUDA kernels give the reference's bits. No GPU: the same source runs on the CPU (kernels/tests/cuda_shim.h)."""

from __future__ import annotations

import mmap
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from qlformat import reference
from qlformat.backends import cuda
from qlformat.codebook import DYNAMIC8
from qlformat.native import NonFiniteError
from tests.ops.cuda_on_cpu import ASCENDING, DESCENDING, FLAGS, SOURCE, Launches, compiler, on_cpu, run
from tests.ops.weights import DTYPES, Case, assert_same_bits, encoded, random_cases

__all__ = ["on_cpu"]

CASES = random_cases(240, seed=3)


def check(case: Case) -> None:
    expected, weight = encoded(case), case.weight()
    packed, absmax = cuda.quantize(weight, case.quant_type, case.blocksize)
    assert_same_bits(packed, expected.packed)
    assert_same_bits(absmax, expected.absmax)
    codes, nested_absmax, offset = cuda.double_quantize(absmax)
    assert_same_bits(codes, expected.codes)
    assert_same_bits(nested_absmax, expected.nested_absmax)
    assert_same_bits(offset, torch.tensor(expected.nested_offset))
    how = case.shape, DTYPES[case.dtype], case.quant_type, case.blocksize
    assert_same_bits(cuda.dequantize(packed, absmax, *how, None, None, 0.0), expected.plain)
    nested = nested_absmax, None, expected.nested_offset
    assert_same_bits(cuda.dequantize(packed, codes, *how, *nested), expected.nested)


@pytest.mark.parametrize("part", range(8))
def test_random_shapes(part: int, on_cpu: Launches) -> None:
    """240 shapes: 5 to 7 kernels each, in random grids and thread orders."""
    for case in CASES[part::8]:
        try:
            check(case)
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from error
    assert len(CASES) >= 200
    assert len(set(on_cpu.kernels)) == 12


@pytest.mark.parametrize("order", [ASCENDING, DESCENDING, 5])
def test_many_tiles_and_nested_blocks(order: int, on_cpu: Launches) -> None:
    """Tiles that one thread block takes in turn, more than 256 sums of absmax, and every thread order."""
    on_cpu.random.seed(order)
    check(Case((70_001,), "bfloat16", "nf4", 32, seed=order))
    absmax = torch.rand(256 * 300 + 5, generator=torch.Generator().manual_seed(order)) * 0.1
    codes, nested, offset = reference.double_quantize(absmax.numpy())
    found = cuda.double_quantize(absmax)
    assert_same_bits(found[0], torch.from_numpy(codes))
    assert_same_bits(found[1], torch.from_numpy(nested))
    assert_same_bits(found[2], torch.tensor(offset))


def unaligned(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, one element after an aligned address."""
    copy = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:]
    copy.copy_(tensor.flatten())
    return copy.view(tensor.shape)


@pytest.mark.parametrize("dtype", DTYPES)
def test_unaligned_and_strided_tensors(dtype: str, on_cpu: Launches) -> None:
    case = Case((3, 5000), dtype, "nf4", 64, seed=11)
    expected, weight = encoded(case), case.weight()
    for same in (unaligned(weight), weight.t().contiguous().t()):
        packed, absmax = cuda.quantize(same, "nf4", 64)
        assert_same_bits(packed, expected.packed)
        assert_same_bits(absmax, expected.absmax)
    for packed in (unaligned(expected.packed), expected.packed.repeat(1, 2)[:, :1]):
        found = cuda.dequantize(
            packed, unaligned(expected.codes), case.shape, DTYPES[dtype], "nf4", 64,
            unaligned(expected.nested_absmax), None, expected.nested_offset,
        )  # fmt: skip
        assert_same_bits(found, expected.nested)


def test_output_at_an_odd_address() -> None:
    """torch allocates aligned outputs; the kernel does not rely on it."""
    case = Case((9000,), "float16", "fp4", 128, seed=2)
    expected = encoded(case)
    out = torch.empty(9001, dtype=torch.float16)[1:]
    arguments = expected.packed.data_ptr(), expected.absmax.data_ptr(), 0, 0, np.float32(0), 9000, 7, 1, out.data_ptr()
    assert run("qlf_dequantize_float16", arguments, grid=1) == 0
    assert_same_bits(out, expected.plain)


def test_another_table_for_the_scales(on_cpu: Launches) -> None:
    case = Case((129, 31), "bfloat16", "nf4", 64, seed=4)
    expected = encoded(case)
    other = torch.from_numpy(DYNAMIC8.copy())
    other[0] = -1.0
    codes = expected.codes.clone()
    codes[::3] = 0
    scales = (
        other[codes.int()] * expected.nested_absmax.repeat_interleave(256)[: codes.numel()] + expected.nested_offset
    )
    how = case.shape, torch.bfloat16, "nf4", 64
    plain = cuda.dequantize(expected.packed, scales, *how, None, None, 0.0)
    nested = cuda.dequantize(expected.packed, codes, *how, expected.nested_absmax, other, expected.nested_offset)
    assert_same_bits(nested, plain)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("blocksize", [64, 4096])
def test_non_finite_values_are_refused(value: float, blocksize: int, on_cpu: Launches) -> None:
    for dtype in DTYPES.values():
        weight = torch.zeros(3 * blocksize + 5, dtype=dtype)
        weight[[2 * blocksize + 1, -1]] = value
        with pytest.raises(NonFiniteError) as caught:
            cuda.quantize(weight, "nf4", blocksize)
        assert caught.value.block == 2 and caught.value.rule == "E1"
    absmax = torch.ones(1000)
    absmax[777] = value
    with pytest.raises(NonFiniteError) as caught:
        cuda.double_quantize(absmax)
    assert caught.value.block == 777


def address_space(size: int) -> mmap.mmap:
    """Zeros that take no memory until they are touched."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    return mmap.mmap(-1, size, flags=flags)


def test_more_than_two_to_the_32_elements() -> None:
    """The last tiles of 2**32 + 20,001 elements. Only the touched pages of the buffers exist."""
    n, blocksize, tile = 2**32 + 20_001, 64, 8192
    blocks, tiles = -(-n // blocksize), -(-n // tile)
    tail = tile * 2 + n % tile  # elements of the last three tiles
    case = Case((tail,), "bfloat16", "nf4", blocksize, seed=9)
    expected = encoded(case)
    packed, absmax, out = (address_space(size) for size in (-(-n // 2), blocks * 4, n * 2))
    np.frombuffer(packed, np.uint8)[-expected.packed.numel() :] = expected.packed.flatten().numpy()
    np.frombuffer(absmax, np.float32)[-expected.absmax.numel() :] = expected.absmax.numpy()
    address = [np.frombuffer(buffer, np.uint8).ctypes.data for buffer in (packed, absmax, out)]
    arguments = address[0], address[1], 0, 0, np.float32(0), n, 6, 0, address[2]
    assert run("qlf_dequantize_bfloat16", arguments, grid=tiles, blocks=range(tiles - 3, tiles)) == 0
    found = torch.from_numpy(np.frombuffer(out, np.int16)[-tail:].copy()).view(torch.bfloat16)
    assert_same_bits(found, expected.plain)
    # The other way round: encode those elements where they lie now.
    again, scales = address_space(-(-n // 2)), address_space(blocks * 4)
    bad = np.full(1, -1, dtype=np.int64)
    target = [np.frombuffer(buffer, np.uint8).ctypes.data for buffer in (again, scales)]
    tiles = -(-n // 4096)
    assert run("qlf_quantize_bfloat16", (address[2], n, 6, 0, *target, bad.ctypes.data), grid=tiles,
               blocks=range(tiles - 5, tiles)) == 0  # fmt: skip
    codes, largest = reference.quantize(found.float().numpy(), "nf4", blocksize)
    assert bad[0] == -1
    assert np.array_equal(np.frombuffer(again, np.uint8)[-codes.size :], codes)
    assert np.array_equal(np.frombuffer(scales, np.float32)[-largest.size :], largest)


def test_the_shim_notices_what_is_wrong() -> None:
    """A missing barrier shows in some order of the threads; one that not all threads reach ends the launch."""
    results = set()
    for order in (ASCENDING, DESCENDING, 2):
        out = np.zeros(256, dtype=np.uint32)
        assert run("missing_barrier", (out.ctypes.data,), order=order) == 0
        results.add(out.tobytes())
    assert len(results) == 3
    assert run("divergent_barrier", (np.zeros(256, dtype=np.uint32).ctypes.data,)) == 2


def test_kernels_are_clean_under_the_sanitizers(tmp_path: Path) -> None:
    driver = tmp_path / "driver"
    sanitize = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-DQLF_DRIVER"]
    subprocess.run([compiler(), *FLAGS, *sanitize, str(SOURCE), "-o", str(driver)], check=True)
    # Sanitizers refuse to run under a preloaded allocator; leaks cannot be looked for under a tracer.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    environment["ASAN_OPTIONS"] = "detect_leaks=0"
    done = subprocess.run([str(driver)], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
