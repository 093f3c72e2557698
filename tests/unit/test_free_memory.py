"""Free memory, from files as Linux writes them, and from this machine's own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from qlformat.free_memory import FreeMemory, on_host

MEMINFO = "MemTotal:       24684024 kB\nMemFree:         1000000 kB\nMemAvailable:    8000000 kB\n"
HOST = FreeMemory(8_000_000 * 1024, "this machine")
GROUP = "the control group's limit"


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in {"proc/meminfo": MEMINFO, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_what_the_kernel_calls_available(tmp_path: Path) -> None:
    assert on_host(write(tmp_path, {})) == HOST


@pytest.mark.parametrize("path", ["/", "/user/job", "/not/mounted/in/this/container"])
def test_the_limit_of_a_container(tmp_path: Path, path: str) -> None:
    files = {
        "proc/self/cgroup": f"0::{path}\n",
        "sys/fs/cgroup/memory.max": "3000000000\n",
        "sys/fs/cgroup/memory.current": "1500000000\n",
        "sys/fs/cgroup/memory.stat": "anon 900000000\ninactive_file 500000000\nactive_file 100000000\n",
    }
    assert on_host(write(tmp_path, files)) == FreeMemory(2_100_000_000, GROUP)


def test_the_tightest_of_nested_groups_counts(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/a/b\n"}
    for group, limit, used in (("a", "5000000000", "1000000000"), ("a/b", "2000000000", "1900000000")):
        files |= {f"sys/fs/cgroup/{group}/memory.max": limit, f"sys/fs/cgroup/{group}/memory.current": used}
    assert on_host(write(tmp_path, files)) == FreeMemory(100_000_000, GROUP)


def test_no_limit(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n", "sys/fs/cgroup/memory.current": "5\n"}
    assert on_host(write(tmp_path, files)) == HOST


def test_version_1(tmp_path: Path) -> None:
    base = "sys/fs/cgroup/memory"
    files = {
        "proc/self/cgroup": "12:cpu,cpuacct:/x\n4:memory:/x\n",
        f"{base}/memory.limit_in_bytes": "9223372036854771712\n", f"{base}/memory.usage_in_bytes": "1\n",
        f"{base}/x/memory.limit_in_bytes": "1000000\n", f"{base}/x/memory.usage_in_bytes": "1200000\n",
        f"{base}/x/memory.stat": "inactive_file 1\ntotal_inactive_file 300000\ntotal_active_file 0\n",
    }  # fmt: skip
    assert on_host(write(tmp_path, files)) == FreeMemory(100_000, GROUP)


def test_nothing_to_read(tmp_path: Path) -> None:
    assert on_host(tmp_path) is None


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what is available")
def test_this_machine() -> None:
    found = on_host()
    assert found is not None and 1_000_000 < found.size < 1 << 50
