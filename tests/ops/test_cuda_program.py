"""The CUDA kernels through the compiler that users get (NVRTC, by pip): no GPU and no driver needed."""

from __future__ import annotations

import ctypes
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qlformat.backends import cuda, cuda_launch, cuda_program
from qlformat.errors import NativeError
from tests.ops.cuda_on_cpu import Launches, on_cpu

__all__ = ["on_cpu"]

if sys.platform != "linux":
    pytest.skip("there is no NVRTC for this system", allow_module_level=True)

KERNELS = [f"qlf_{verb}_{dtype}" for verb in ("dequantize", "dequantize_nested", "quantize")
           for dtype in ("bfloat16", "float16", "float32")]  # fmt: skip
KERNELS += ["qlf_absmax_mean", "qlf_absmax_sums", "qlf_quantize_absmax"]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QLF_CACHE_DIR", str(tmp_path))
    return tmp_path / "cuda"


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Architectures that were compiled, not read from the cache; the compiler is a quick one."""
    done: list[str] = []

    def quick(_: cuda_program.Sources, architecture: str) -> bytes:
        done.append(architecture)
        return f"code for {architecture}".encode()

    monkeypatch.setattr(cuda_program, "compiled", quick)
    return done


def test_what_is_compiled_is_installed() -> None:
    """The wheel holds every file that sources() looks for, in the places where it looks."""
    rules = (Path(__file__).resolve().parents[2] / "kernels" / "CMakeLists.txt").read_text(encoding="utf-8")
    installed = re.search(r"install\(FILES (.*) DESTINATION qlformat/_native/cuda\)", rules)
    assert installed and {f"cuda/{name}" for name in cuda_program.FILES} == set(installed[1].split())
    assert "install(FILES include/qlf/codebook.h DESTINATION qlformat/_native/cuda/qlf)" in rules


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_compiles_for(architecture: str) -> None:
    code = cuda_program.compiled(cuda_program.sources(), architecture)
    assert code.startswith(b"\x7fELF")
    for kernel in KERNELS:
        assert b".text." + kernel.encode() in code


@pytest.fixture(scope="module")
def ptx() -> str:
    """The kernels as readable assembly. cuda-core asks the driver for PTX, so its options go to NVRTC directly."""
    from cuda.bindings import nvrtc
    from cuda.core import ProgramOptions

    include = [str(path) for path in cuda_program.sources().include]
    options = ProgramOptions(arch="compute_90", include_path=include, **cuda_program.EXACT).as_bytes("nvrtc")

    def call(function: Any, *arguments: Any) -> Any:
        status, *values = function(*arguments)
        assert int(status) == 0, f"{function.__name__}: {status}"
        return values[0] if values else None

    program = call(nvrtc.nvrtcCreateProgram, cuda_program.PROGRAM.encode(), b"kernels.cu", 0, [], [])
    call(nvrtc.nvrtcCompileProgram, program, len(options), options)
    text = bytearray(call(nvrtc.nvrtcGetPTXSize, program))
    call(nvrtc.nvrtcGetPTX, program, text)
    return text.decode()


def test_arithmetic_is_neither_fused_nor_flushed(ptx: str) -> None:
    floating = set(
        re.findall(r"\b((?:fma|mad|mul|add|sub|div|rcp|cvt|min|max)\.[a-z0-9.]*f(?:16x2|16|32|64)\b[a-z0-9.]*)", ptx)
    )
    assert {"mul.rn.f32", "add.rn.f32", "add.rn.f64", "div.rn.f64"} <= floating
    assert not [name for name in floating if name.startswith(("fma", "mad")) or ".ftz" in name or ".approx" in name]


def test_memory_is_accessed_in_16_bytes(ptx: str) -> None:
    for dtype in ("bfloat16", "float16", "float32"):
        body = ptx.split(f".entry qlf_dequantize_nested_{dtype}(")[1].split(".entry")[0]
        assert "ld.global.nc.v4" in body and "st.global.v4" in body


def parameter_sizes(ptx: str, kernel: str) -> list[int]:
    """Bytes of each parameter of a compiled kernel."""
    parameters = ptx.split(f".entry {kernel}(")[1].split(")")[0]
    return [int(bits) // 8 for bits in re.findall(r"\.param \.[a-z](\d+)", parameters)]


def test_the_host_passes_what_the_kernels_take(ptx: str, on_cpu: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    """Number and size of the arguments of every launch, as cuda-core hands them to the driver."""
    handler = pytest.importorskip("cuda.core._kernel_arg_handler", reason="this cuda-core has no such module")
    seen: dict[str, list[int]] = {}

    def spy(device: torch.device, name: str, blocks: int, arguments: tuple[cuda_launch.Argument, ...]) -> None:
        on_cpu(device, name, blocks, arguments)
        held = handler.ParamHolder(arguments)
        cells = ctypes.cast(held.ptr, ctypes.POINTER(ctypes.c_void_p))
        for number, value in enumerate(arguments):
            kind: Any = ctypes.c_float if isinstance(value, np.float32) else ctypes.c_uint64
            assert kind.from_address(cells[number]).value == value
        seen[name] = [4 if isinstance(value, np.float32) else 8 for value in arguments]

    monkeypatch.setattr(cuda_launch, "launch", spy)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        packed, absmax = cuda.quantize(torch.ones(100, dtype=dtype), "nf4", 64)
        codes, nested, offset = cuda.double_quantize(absmax)
        cuda.dequantize(packed, absmax, (100,), dtype, "nf4", 64, None, None, 0.0)
        cuda.dequantize(packed, codes, (100,), dtype, "nf4", 64, nested, None, offset.item())
    assert sorted(seen) == sorted(KERNELS)
    for kernel, sizes in seen.items():
        assert parameter_sizes(ptx, kernel) == sizes, kernel


def test_the_cache_is_used_and_keyed(cache: Path, compilations: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert cuda_program.cubin("sm_90") == cuda_program.cubin("sm_90") == b"code for sm_90"
    assert compilations == ["sm_90"]
    cuda_program.cubin("sm_80")
    versions = cuda_program.toolchain()
    monkeypatch.setattr(cuda_program, "toolchain", lambda: {**versions, "nvrtc": "99.0"})
    cuda_program.cubin("sm_90")
    found = cuda_program.sources()
    monkeypatch.setattr(cuda_program, "sources", lambda: cuda_program.Sources(found.include, "another digest"))
    cuda_program.cubin("sm_90")
    assert compilations == ["sm_90", "sm_80", "sm_90", "sm_90"]
    assert len(list(cache.iterdir())) == 4  # and no file left beside them


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "other"])
def test_a_damaged_entry_is_compiled_again(damage: str, cache: Path, compilations: list[str]) -> None:
    code = cuda_program.cubin("sm_90")
    (entry,) = cache.iterdir()
    good = entry.read_bytes()
    flipped = good[:-1] + bytes([good[-1] ^ 1])
    entry.write_bytes({"empty": b"", "cut": good[:-3], "flipped": flipped, "other": b"\x7fELF" * 40}[damage])
    assert cuda_program.cubin("sm_90") == code and len(compilations) == 2
    assert entry.read_bytes() == good
    assert cuda_program.cubin("sm_90") == code and len(compilations) == 2


def test_a_cache_that_cannot_be_written_is_no_error(
    tmp_path: Path, compilations: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"")
    monkeypatch.setenv("QLF_CACHE_DIR", str(file))
    assert cuda_program.cubin("sm_90") == cuda_program.cubin("sm_90")
    assert len(compilations) == 2


def test_an_unknown_architecture_is_one_line() -> None:
    with pytest.raises(NativeError, match="NVRTC cannot compile the kernels for sm_12345: ") as caught:
        cuda_program.compiled(cuda_program.sources(), "sm_12345")
    assert "\n" not in str(caught.value)


def test_without_cuda_core_there_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    with pytest.raises(NativeError, match=r"cuda-core is not installed .*pip install 'qlformat\[cuda\]'"):
        cuda_program.toolchain()


class Driver:
    """cuda.bindings.driver of a driver for some CUDA version."""

    def __init__(self, version: int) -> None:
        self.version = version

    def cuDriverGetVersion(self) -> tuple[int, int]:
        return 0, self.version


@pytest.mark.parametrize(("version", "fits"), [(12_080, False), (13_000, True), (13_010, True), (14_000, True)])
def test_an_old_driver_is_a_reason(version: int, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import cuda.bindings

    monkeypatch.setattr(cuda.bindings, "driver", Driver(version), raising=False)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", Driver(version))
    if fits:
        cuda_launch._check_driver("13.5")
        return
    with pytest.raises(NativeError, match=r"found a driver for CUDA 12.8, needed 13.0 .*update the driver"):
        cuda_launch._check_driver("13.5")


def test_an_old_gpu_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    cuda_launch._module.cache_clear()
    assert cuda.why_unavailable("cuda:0") == "found compute capability 7.5, needed 8.0 or newer"
    with pytest.raises(NativeError, match=r"CUDA kernels unavailable: found compute capability 7.5"):
        cuda_launch.launch(torch.device("cuda", 0), "qlf_absmax_mean", 1, ())
    cuda_launch._module.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_gpu_is_a_reason() -> None:
    cuda_launch._module.cache_clear()
    reason = cuda.why_unavailable("cuda:0")
    cuda_launch._module.cache_clear()
    assert reason and "\n" not in reason
