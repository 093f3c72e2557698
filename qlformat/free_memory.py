"""How much memory a process may still take: on this machine, under its control group, or on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_UNLIMITED = 1 << 60
"""A version 1 control group without a limit says a number near 2**63."""


@dataclass(frozen=True)
class FreeMemory:
    """Bytes that can still be taken, and of what: "this machine", "the control group's limit", "GPU 0"."""

    size: int
    of: str


def on_gpu(index: int) -> FreeMemory:
    """Free memory of a CUDA device."""
    import torch

    free, _ = torch.cuda.mem_get_info(index)
    return FreeMemory(int(free), f"GPU {index}")


def on_host(root: Path = Path("/")) -> FreeMemory | None:
    """The least of what Linux calls available and of what every control group above the process leaves.

    Args:
        root: where proc and sys are mounted.

    Returns:
        None where neither can be read, as on macOS.
    """
    available = [FreeMemory(size, "this machine") for size in _meminfo(root, "MemAvailable")]
    found = [*available, *_left_by_groups(root)]
    return min(found, key=lambda free: free.size, default=None)


def swap(root: Path = Path("/")) -> int:
    """Free bytes of swap; 0 where the system does not say."""
    return sum(_meminfo(root, "SwapFree"))


def _meminfo(root: Path, wanted: str) -> Iterator[int]:
    for line in _text(root / "proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        if name == wanted:
            yield int(value.split()[0]) * 1024


def _left_by_groups(root: Path) -> Iterator[FreeMemory]:
    """What the process's control group (version 1 or 2) and those above it leave."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        if number == "0":
            base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            base, names = root / "sys/fs/cgroup/memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        # In a container the path may be that of the host, of which nothing but the top is mounted.
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(parts) + 1):
            directory = base.joinpath(*parts[:depth])
            limit, used = (_text(directory / name).strip() for name in names)
            if limit.isdigit() and used.isdigit() and int(limit) < _UNLIMITED:
                left = int(limit) - int(used) + _file_cache(directory / "memory.stat")
                yield FreeMemory(max(0, min(left, int(limit))), "the control group's limit")


def _file_cache(path: Path) -> int:
    """Bytes of the group's page cache, which is given up when memory is needed."""
    counts = dict(line.split(maxsplit=1) for line in _text(path).splitlines() if len(line.split()) == 2)
    prefix = "total_" if "total_inactive_file" in counts else ""
    return sum(int(counts.get(f"{prefix}{name}", 0)) for name in ("inactive_file", "active_file"))


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
