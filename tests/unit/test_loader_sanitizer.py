"""Loading under AddressSanitizer: hostile checkpoints end in values or in one line, never outside of a buffer.

The library's own kernels, instrumented, under the real loader. NumPy's buffers come from the sanitizer's allocator, so
every read or write beyond one ends the process.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qlformat.layout import Recipe
from tests.builders import Checkpoint, Tensor, make_checkpoint
from tests.unit.test_sanitizers import KERNELS, sources

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["-std=c++17", "-O0", "-g", "-ffp-contract=off", "-fsanitize=address", "-fPIC", f"-I{KERNELS / 'include'}"]
SHAPES = {"model.a.weight": (70, 301), "model.b.weight": (131, 151), "model.c.weight": (7,)}
RECIPES = (Recipe(), Recipe("fp4", 32, True), Recipe("nf4", 128, False))

LOAD = """
import sys
from pathlib import Path
import qlformat.numpy
from qlformat import native
from qlformat.errors import QlfError
assert native.available(), native.why_unavailable()
loaded = refused = 0
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        for dtype in ("float32", "bfloat16"):
            qlformat.numpy.load_state_dict(path, dtype, threads=2)
        with qlformat.numpy.open(path) as checkpoint:
            for name in checkpoint:
                if checkpoint[name].shape:
                    checkpoint[name][1:3], checkpoint[name][-1]
        loaded += 1
    except QlfError:
        refused += 1
print(loaded, refused)
"""
OUTSIDE = """
import ctypes, os
import numpy as np
library = ctypes.CDLL(os.environ["QLF_NATIVE_LIB"])
packed, absmax, out = np.zeros(3200, np.uint8), np.zeros(99, np.float32), np.zeros(6400, np.float32)
address = lambda array: ctypes.c_void_p(array.ctypes.data)
library.qlf_dequantize(address(packed), address(absmax), ctypes.c_size_t(6400), 0, 64, 0, address(out), 1, 0)
"""


def flipped(data: bytes, chosen: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(4):
        changed[chosen.randrange(len(data))] ^= 1 << chosen.randrange(8)
    return bytes(changed)


CHANGES: dict[str, Callable[[Tensor, random.Random], Tensor]] = {
    "largest": lambda t, _: Tensor(t.dtype, t.shape, b"\xff" * len(t.data)),
    "random": lambda t, chosen: Tensor(t.dtype, t.shape, chosen.randbytes(len(t.data))),
    "flipped": lambda t, chosen: Tensor(t.dtype, t.shape, flipped(t.data, chosen)),
    "half": lambda t, _: Tensor(
        t.dtype, (t.shape[0] // 2, *t.shape[1:]), t.data[: len(t.data) // t.shape[0] * (t.shape[0] // 2)]
    ),
}


def hostile(recipe: Recipe) -> list[Checkpoint]:
    """Each stored tensor of a weight changed in each way, and scales that no encoder writes but every rule allows."""
    chosen, found = random.Random(5), []

    def build() -> Checkpoint:
        return make_checkpoint(quantized=SHAPES, plain={}, recipe=recipe, manifest=False)

    for name in [name for name in build().tensors if name.startswith("model.a.weight")]:
        for change in CHANGES.values():
            built = build()
            built.tensors[name] = change(built.tensors[name], chosen)
            found.append(built)
    built = build()
    for name in ["model.a.weight.nested_absmax" if recipe.double_quant else "model.a.weight.absmax"]:
        tensor = built.tensors[name]
        built.tensors[name] = Tensor("F32", tensor.shape, np.full(tensor.shape, 3e38, dtype="<f4").tobytes())
    return [*found, built]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of a Python whose allocator is AddressSanitizer's and whose kernels are watched by it."""
    directory, compiler = tmp_path_factory.mktemp("sanitizer"), os.environ.get("CXX", "c++")
    try:
        asked = [compiler, "-print-file-name=libasan.so"]
        runtime = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except OSError:
        pytest.skip("no C++ compiler to build the kernels with AddressSanitizer")
    if sys.platform != "linux" or not Path(runtime).is_absolute():
        pytest.skip("this compiler has no AddressSanitizer that can be loaded before Python")
    files = {path: flags for path, flags in sources().items() if path.name != "driver.cpp"}
    objects = [directory / f"{path.stem}.o" for path in files]
    jobs = [
        subprocess.Popen([compiler, *FLAGS, *flags, "-c", str(path), "-o", str(target)])
        for (path, flags), target in zip(files.items(), objects, strict=True)
    ]
    assert [job.wait() for job in jobs] == [0] * len(jobs)
    built = directory / "libqlf_cpu.so"
    subprocess.run([compiler, "-shared", "-fsanitize=address", *objects, "-o", built, "-pthread"], check=True)
    settings = {"LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0", "PYTHONMALLOC": "malloc"}
    return {**os.environ, **settings, "QLF_NATIVE_LIB": str(built), "PYTHONPATH": str(ROOT)}


def run(script: str, environment: dict[str, str], *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_hostile_checkpoints(tmp_path: Path, environment: dict[str, str]) -> None:
    checkpoints = [built for recipe in RECIPES for built in hostile(recipe)]
    for number, built in enumerate(checkpoints):
        built.write(tmp_path / str(number))
    done = run(LOAD, environment, tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    loaded, refused = map(int, done.stdout.split())
    assert loaded + refused == len(checkpoints) > 50
    assert min(loaded, refused) > 10


def test_a_read_outside_would_be_seen(environment: dict[str, str]) -> None:
    done = run(OUTSIDE, environment)
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr
    assert "qlf_dequantize" in done.stderr
