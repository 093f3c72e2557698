"""The CUDA kernels on a real device: `make gpu-check`. The bits are those of the CPU, which equal the reference's."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from qlformat import ops
from qlformat.backends import cuda
from qlformat.errors import QlfError
from qlformat.layout import QuantState, Recipe
from qlformat.native import NonFiniteError
from tests.ops.weights import DTYPES, Case, assert_same_bits, encoded, random_cases

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).resolve().parents[2]
OPS = torch.ops.qlformat


def check(case: Case, device: str = "cuda") -> None:
    """Both quantizations and both ways back, against the reference."""
    expected, weight = encoded(case), case.weight().to(device)
    how = {"quant_type": case.quant_type, "blocksize": case.blocksize}
    packed, absmax = OPS.quantize_nf4(weight, **how)
    codes, nested_absmax, offset = OPS.double_quantize(absmax)
    shape_and_dtype = case.shape, DTYPES[case.dtype]
    plain = OPS.dequantize_nf4(packed, absmax, *shape_and_dtype, **how)
    nested = OPS.dequantize_nf4(packed, codes, *shape_and_dtype, nested_absmax, None, offset.item(), **how)
    for found, needed in (
        (packed, expected.packed),
        (absmax, expected.absmax),
        (codes, expected.codes),
        (nested_absmax, expected.nested_absmax),
        (offset, torch.tensor(expected.nested_offset)),
        (plain, expected.plain),
        (nested, expected.nested),
    ):
        assert found.device.type == "cuda"
        assert_same_bits(found.cpu(), needed)


def test_the_kernels_can_be_used() -> None:
    """Without this, all others would pass on the fallback."""
    assert cuda.why_unavailable() == ""


def test_random_shapes() -> None:
    for case in random_cases(200, seed=21):
        check(case)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_weights(dtype: str, quant_type: str) -> None:
    """More tiles than the device holds at once; the CPU's operators are the measure."""
    weight = torch.randn(5003, 4099, generator=torch.Generator().manual_seed(0)).to(DTYPES[dtype])
    recipe = Recipe(quant_type)
    packed, codes, nested, state = ops.quantize_weight(weight, recipe)
    found = ops.quantize_weight(weight.cuda(), recipe)
    assert found[3] == state
    for ours, theirs in zip(found[:3], (packed, codes, nested), strict=True):
        assert ours is not None and theirs is not None
        assert_same_bits(ours.cpu(), theirs)
    dense = ops.dequantize_weight(found[0], found[1], state, found[2], DTYPES[dtype])
    assert_same_bits(dense.cpu(), ops.dequantize_weight(packed, codes, state, nested, DTYPES[dtype]))


def test_unaligned_tensors() -> None:
    case = Case((301, 77), "bfloat16", "nf4", 64, seed=12)
    expected = encoded(case)

    def shifted(tensor: torch.Tensor) -> torch.Tensor:
        room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device="cuda")[1:]
        return room.copy_(tensor.flatten()).view(tensor.shape)

    state = QuantState("nf4", 64, "bfloat16", case.shape, expected.nested_offset)
    parts = shifted(expected.packed), shifted(expected.codes), state, shifted(expected.nested_absmax)
    assert_same_bits(ops.dequantize_weight(*parts).cpu(), expected.nested)
    assert_same_bits(OPS.quantize_nf4(shifted(case.weight()))[0].cpu(), expected.packed)


def test_more_than_two_to_the_31_elements() -> None:
    n = 2**31 + 20_001
    free, _ = torch.cuda.mem_get_info()
    if free < 8 << 30:
        pytest.skip(f"needs 8 GiB of GPU memory, {free >> 30} are free")
    packed = torch.randint(0, 256, (-(-n // 2),), dtype=torch.uint8, device="cuda")
    absmax = torch.rand(-(-n // 64), device="cuda")
    dense = OPS.dequantize_nf4(packed, absmax, (n,), torch.bfloat16)
    for start in (0, 2**31 - 64 * 100, n // 64 * 64 - 64 * 200):
        end = min(n, start + 64 * 200)
        piece = OPS.dequantize_nf4(
            packed[start // 2 : -(-end // 2)].cpu(), absmax[start // 64 : -(-end // 64)].cpu(), (end - start,),
            torch.bfloat16,
        )  # fmt: skip
        assert_same_bits(dense[start:end].cpu(), piece)


def test_launches_on_the_current_stream() -> None:
    """The kernel waits for what its stream waits for: packed is filled on that stream, late."""
    expected = encoded(Case((4096, 512), "bfloat16", "nf4", 64, seed=13))
    state = QuantState("nf4", 64, "bfloat16", (4096, 512), expected.nested_offset)
    codes, nested = expected.codes.cuda(), expected.nested_absmax.cuda()
    source = expected.packed.cuda()
    packed = torch.zeros_like(source)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # about 0.1 s
        packed.copy_(source)
        dense = ops.dequantize_weight(packed, codes, state, nested)
        assert not stream.query(), "the call waited for the device"
    stream.synchronize()
    assert_same_bits(dense.cpu(), expected.nested)


def test_in_a_new_thread() -> None:
    """A thread that has called nothing of CUDA before, as a loader's workers."""
    cases = random_cases(8, seed=24)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(check, cases))


def test_in_a_cuda_graph() -> None:
    expected = encoded(Case((256, 512), "float16", "nf4", 64, seed=14))
    state = QuantState("nf4", 64, "float16", (256, 512), expected.nested_offset)
    codes, nested = expected.codes.cuda(), expected.nested_absmax.cuda()
    packed = torch.zeros_like(expected.packed, device="cuda")
    ops.dequantize_weight(packed, codes, state, nested, torch.float16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        dense = ops.dequantize_weight(packed, codes, state, nested, torch.float16)
    packed.copy_(expected.packed)
    graph.replay()
    assert_same_bits(dense.cpu(), expected.nested)


def test_on_a_second_device() -> None:
    """The tensors' device is used, not the current one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one CUDA device")
    for case in random_cases(48, seed=22):
        check(case, "cuda:1")
    assert torch.cuda.current_device() == 0


def test_tensors_of_two_devices_are_refused() -> None:
    packed, absmax = OPS.quantize_nf4(torch.ones(128, device="cuda"))
    for mixed in ((packed.cpu(), absmax), (packed, absmax.cpu())):
        with pytest.raises(QlfError, match="absmax: found device"):
            OPS.dequantize_nf4(*mixed, (128,), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_non_finite_values_are_refused(dtype: str) -> None:
    weight = torch.zeros(5000, dtype=DTYPES[dtype], device="cuda")
    weight[[4000, 4999]] = float("inf")
    with pytest.raises(NonFiniteError) as caught:
        OPS.quantize_nf4(weight)
    assert caught.value.block == 4000 // 64 and caught.value.rule == "E1"


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: str) -> None:
    weight = torch.randn(5, 77, device="cuda", dtype=DTYPES[dtype])
    torch.library.opcheck(OPS.quantize_nf4.default, (weight,))
    packed, absmax = OPS.quantize_nf4(weight)
    torch.library.opcheck(OPS.double_quantize.default, (absmax,))
    torch.library.opcheck(OPS.dequantize_nf4.default, (packed, absmax, (5, 77), DTYPES[dtype]))


def test_compiles_without_a_graph_break() -> None:
    expected = encoded(Case((64, 128), "bfloat16", "nf4", 64, seed=15))
    state = QuantState("nf4", 64, "bfloat16", (64, 128), expected.nested_offset)

    @torch.compile(fullgraph=True)
    def decode(packed: torch.Tensor, codes: torch.Tensor, nested: torch.Tensor) -> torch.Tensor:
        return ops.dequantize_weight(packed, codes, state, nested)

    parts = (tensor.cuda() for tensor in (expected.packed, expected.codes, expected.nested_absmax))
    assert_same_bits(decode(*parts).cpu(), expected.nested)


@pytest.mark.parametrize("bitsandbytes", [True, False])
def test_the_fallbacks_have_the_same_bits(bitsandbytes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without our kernels: bitsandbytes' CUDA kernels where they are exact, else plain torch."""
    if bitsandbytes and not cuda._bitsandbytes_works():
        pytest.skip("bitsandbytes has no CUDA library for this version of CUDA")
    calls = []
    theirs = cuda._bitsandbytes_dequantize
    monkeypatch.setattr(cuda, "_bitsandbytes_works", lambda: bitsandbytes)
    monkeypatch.setattr(cuda, "_bitsandbytes_dequantize", lambda *a: calls.append(1) or theirs(*a))
    monkeypatch.setattr(cuda, "_unusable", lambda _: True)
    for case in random_cases(96, seed=23):
        check(case)
    assert bool(calls) == bitsandbytes


def test_compute_sanitizer(tmp_path: Path) -> None:
    """memcheck and racecheck over odd sizes, in a process of its own."""
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if tool is None:
        pytest.skip("compute-sanitizer is not installed")
    script = (
        "import torch\n"
        "from tests.gpu.test_cuda import check\n"
        "from tests.ops.weights import random_cases\n"
        "for case in random_cases(48, seed=31, largest=9000): check(case)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # each tensor an allocation: its ends are seen
    for check_kind in ("memcheck", "racecheck"):
        command = [tool, "--tool", check_kind, "--error-exitcode", "9", "--kernel-regex", "kns=qlf_"]
        done = subprocess.run(
            [*command, sys.executable, "-c", script], capture_output=True, text=True, env=environment, cwd=ROOT,
            timeout=900, check=False,
        )  # fmt: skip
        report = (done.stdout + done.stderr)[-3000:]
        if "Device not supported" in report:
            pytest.skip("compute-sanitizer does not support this device or its virtualization")
        assert done.returncode == 0, f"{check_kind}: {report}"
