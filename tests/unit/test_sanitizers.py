"""The kernels and a driver under AddressSanitizer and UndefinedBehaviorSanitizer, with buffers of exact size."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
FLAGS = [
    "-std=c++17",
    "-O1",
    "-g",
    "-ffp-contract=off",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    f"-I{KERNELS / 'include'}",
]


def sources() -> dict[Path, list[str]]:
    """Each source with the flags that CMakeLists.txt gives it on this machine."""
    common = [KERNELS / "cpu" / f"{name}.cpp" for name in ("api", "merge", "nested", "sha256", "transpose", "scalar")]
    found: dict[Path, list[str]] = {path: [] for path in [*common, KERNELS / "tests" / "driver.cpp"]}
    if platform.machine() in ("x86_64", "AMD64"):
        avx2 = ["-mavx2", "-mf16c", "-mno-fma"]
        found[KERNELS / "cpu" / "avx2.cpp"] = avx2
        found[KERNELS / "cpu" / "sha256.cpp"] = ["-msha", "-msse4.1"]
        found[KERNELS / "cpu" / "merge_avx2.cpp"] = ["-mavx2", "-mf16c", "-mfma"]
        found[KERNELS / "cpu" / "avx512.cpp"] = [*avx2, *(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl"))]
    elif platform.machine() in ("aarch64", "arm64"):
        found[KERNELS / "cpu" / "neon.cpp"] = []
    return found


def test_kernels_are_clean_under_the_sanitizers(tmp_path: Path) -> None:
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler to build the kernels with the sanitizers")
    objects = {path: tmp_path / f"{path.stem}.o" for path in sources()}
    jobs = [
        subprocess.Popen([compiler, *FLAGS, *flags, "-c", str(path), "-o", str(objects[path])])
        for path, flags in sources().items()
    ]
    assert [job.wait() for job in jobs] == [0] * len(jobs)
    driver = tmp_path / "driver"
    subprocess.run([compiler, *FLAGS, *map(str, objects.values()), "-o", str(driver), "-pthread"], check=True)
    # Sanitizers refuse to run under a preloaded allocator; leaks cannot be looked for under a tracer.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    environment["ASAN_OPTIONS"] = "detect_leaks=0"
    found = subprocess.run([str(driver)], capture_output=True, text=True, env=environment, timeout=300)
    assert found.returncode == 0, found.stderr[-4000:]
