"""What the benchmarks share: timing whole processes, describing the machine, and keeping the figures."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results.json"
_REST_SECONDS = 1.0
"""A virtual disk that has just written much is slow for a while."""
PACKAGES = ("accelerate", "bitsandbytes", "numpy", "peft", "safetensors", "torch", "transformers")


class BenchmarkError(RuntimeError):
    """A measured command failed; the message is one line."""


@dataclass(frozen=True)
class Usage:
    """What one process cost, from its start to its exit: seconds, and peak resident memory in bytes."""

    seconds: float
    peak_rss: int


@dataclass(frozen=True)
class Summary:
    """Several runs of one command: the median time, its spread, and the largest peak."""

    seconds: float
    fastest: float
    slowest: float
    peak_rss: int

    def as_json(self) -> dict[str, float | int]:
        """The figures, rounded to what is meaningful."""
        times = {"seconds": self.seconds, "fastest": self.fastest, "slowest": self.slowest}
        return {**{name: round(value, 4) for name, value in times.items()}, "peak_rss": self.peak_rss}


def qlf_command() -> list[str]:
    """The installed `qlf` of this Python, or else `python -m qlf` (with PYTHONPATH set by the caller)."""
    script = Path(sys.executable).with_name("qlf")
    return [str(script)] if script.is_file() else [sys.executable, "-m", "qlf"]


def run_process(command: Sequence[str | Path]) -> Usage:
    """Run a command to its end and measure it; BenchmarkError with its last line when it fails.

    First, what earlier processes have left to be written and to be freed is waited for, and the disk gets a moment.

    The kernel counts the starting process's own memory into the child's peak until the child executes, so a
    benchmark that reports memory must itself stay small: it imports neither numpy nor torch.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # pip leaves byte code; a checkout gets its own in the first run
    os.sync()
    time.sleep(_REST_SECONDS)
    start = time.perf_counter()
    process = subprocess.Popen(
        [str(word) for word in command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=environment,
        text=True,
    )
    # The pipe is read to its end before waiting, so a talkative process cannot block on it.
    errors = process.stderr.read() if process.stderr else ""
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        last = errors.strip().splitlines()[-1] if errors.strip() else "no message"
        raise BenchmarkError(f"{Path(command[0]).name} ended with code {process.returncode}: {last}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Usage(seconds, usage.ru_maxrss * unit)


def summarize(runs: Sequence[Usage]) -> Summary:
    """Median, fastest and slowest time, and the largest peak."""
    times = [run.seconds for run in runs]
    return Summary(statistics.median(times), min(times), max(times), max(run.peak_rss for run in runs))


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str:
    """The commit that was measured, with `+changes` when tracked files differ from it."""
    git = ["git", "-C", str(ROOT)]
    done = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False)
    if done.returncode:
        return "unknown"
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], check=False).returncode
    return done.stdout.strip() + ("+changes" if changed else "")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """The machine and the software that a figure belongs to."""
    flags = Path("/proc/cpuinfo")
    words = set(flags.read_text(encoding="utf-8").split()) if flags.is_file() else set()
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "simd": [name for name in ("avx2", "avx512f", "avx512_bf16", "sha_ni") if name in words],
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "load_average": [round(value, 2) for value in os.getloadavg()],
    }


def record(name: str, figures: dict[str, Any]) -> None:
    """Put one benchmark's figures into results.json, with the machine, the commit and the date."""
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    results[name] = {"date": now, "commit": _commit(), "machine": machine(), "figures": figures}
    beside = RESULTS.with_suffix(".json.new")
    beside.write_text(json.dumps(results, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    beside.replace(RESULTS)


def goal(text: str, met: bool) -> str:
    """A goal and whether this run met it, for the end of a printed line."""
    return f"goal {text}: {'met' if met else 'NOT MET'}"
