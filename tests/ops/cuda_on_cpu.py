"""The CUDA kernels of kernels/cuda compiled for the CPU (kernels/tests/cuda_shim.h), and launched on CPU tensors.

`Launches` stands in for `cuda_launch.launch`, so everything else of `backends.cuda` runs as on a GPU: which kernel,
which arguments in which order, which sizes, which alignment.
"""

from __future__ import annotations

import ctypes
import functools
import os
import random
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from qlformat.backends import cuda_launch

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
SOURCE = KERNELS / "tests" / "cuda_on_cpu.cpp"
FLAGS = ["-std=c++17", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-Wno-unknown-pragmas"]
FLAGS += [f"-I{KERNELS / 'include'}"]
ASCENDING, DESCENDING = 0, 1  # orders of the threads; any other number is the seed of a random one


def compiler() -> str:
    found = shutil.which(os.environ.get("CXX", "c++"))
    if found is None:
        pytest.skip("no C++ compiler to build the CUDA kernels for the CPU with")
    return found


@functools.cache
def library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "libcuda_on_cpu.so"
        subprocess.run([compiler(), *FLAGS, "-fPIC", "-shared", str(SOURCE), "-o", str(built)], check=True)
        loaded = ctypes.CDLL(str(built))
    u64 = ctypes.c_uint64
    loaded.shim_launch.argtypes = (ctypes.c_char_p, ctypes.c_void_p, u64, u64, u64, ctypes.c_uint32)
    loaded.shim_launch.restype = ctypes.c_int
    return loaded


def run(
    name: str,
    arguments: tuple[cuda_launch.Argument, ...],
    *,
    grid: int = 1,
    blocks: range | None = None,
    order: int = ASCENDING,
) -> int:
    """Run a kernel, or some blocks of its grid. 0: done; 2: a barrier was not reached by all threads."""
    cells = [
        ctypes.c_float(value) if isinstance(value, np.float32) else ctypes.c_uint64(value)  # type: ignore[arg-type]
        for value in arguments
    ]
    pointers = (ctypes.c_void_p * len(cells))(*(ctypes.addressof(cell) for cell in cells))
    chosen = range(grid) if blocks is None else blocks
    status: int = library().shim_launch(name.encode(), pointers, grid, chosen.start, chosen.stop, order)
    assert status != 1, f"no kernel {name}"
    return status


class Launches:
    """`cuda_launch.launch` for CPU tensors: grids and thread orders at random, kernels and grids kept."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.kernels: list[str] = []

    def __call__(
        self, device: torch.device, name: str, blocks: int, arguments: tuple[cuda_launch.Argument, ...]
    ) -> None:
        assert device.type == "cpu" and blocks >= 1
        self.kernels.append(name)
        grid = min(blocks, self.random.choice((1, 2, 3, 7)))
        assert run(name, arguments, grid=grid, order=self.random.randrange(6)) == 0


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """Make `backends.cuda` take CPU tensors and run its kernels on them."""
    launches = Launches(seed=7)
    monkeypatch.setattr(cuda_launch, "launch", launches)
    monkeypatch.setattr(cuda_launch, "why_unavailable", lambda _: "")
    return launches
