"""Test and measure the CUDA kernels on this machine, and write one JSON file: `make gpu-check`.

    python tools/gpu_check.py [--out gpu-check.json] [--no-load]

Runs on a checkout, without an installation: Python 3.11 or newer, torch with CUDA, pytest, cuda-core (qlformat[cuda]),
bitsandbytes for the comparison, numpy, safetensors. Exit status: 0 when all tests passed, 1 when not, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    "torch",
    "cuda-core",
    "cuda-bindings",
    "nvidia-cuda-nvrtc",
    "nvidia-cuda-nvrtc-cu12",
    "bitsandbytes",
    "numpy",
)

TESTS = ("tests/gpu", "tests/ops", "tests/unit/test_loader_device.py")
"""What holds tests marked gpu, and what needs no more packages than they do."""


def versions() -> dict[str, str]:
    """Versions of the packages that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def environment() -> dict[str, str]:
    """The checkout comes first; a machine without a network asks no hub."""
    paths = [str(ROOT), str(ROOT / "cli"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path), "HF_HUB_OFFLINE": "1"}


def build_native(folder: Path) -> dict[str, str]:
    """Build the CPU kernels where they are not installed, since the benchmark converts a model. {} or their path."""
    ready = "import sys; from qlformat import native; sys.exit(not native.available())"
    if not subprocess.run([sys.executable, "-c", ready], env=environment(), check=False).returncode:
        return {}
    try:
        for step in (["-S", str(ROOT / "kernels"), "-B", str(folder)], ["--build", str(folder), "--parallel"]):
            subprocess.run(["cmake", *step], check=True, stdout=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"the CPU kernels cannot be built ({error}); converting the model will be slow", file=sys.stderr)
        return {}
    return {"QLF_NATIVE_LIB": str(next(folder.glob("libqlf_cpu.*")))}


def output(*command: str) -> str:
    """What a command printed, or "unknown"."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def run_tests(native: dict[str, str]) -> dict[str, Any]:
    """Every test marked gpu, and those of the same kernels on the CPU: outcome and seconds of each."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junit-xml={report}"]
        done = subprocess.run([*command, *TESTS], cwd=ROOT, env=environment() | native, check=False)
        if not report.is_file():
            return {"exit_status": done.returncode, "passed": 0, "failed": 1, "tests": {}}
        tests = {}
        for case in ElementTree.parse(report).getroot().iter("testcase"):
            bad = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
            outcome = "passed" if bad is None else bad.tag
            entry: dict[str, Any] = {"outcome": outcome, "seconds": float(case.get("time", "0"))}
            if bad is not None:
                entry["message"] = (bad.get("message") or "")[:1000]
            tests[f"{case.get('classname')}::{case.get('name')}"] = entry
    outcomes = [entry["outcome"] for entry in tests.values()]
    return {
        "exit_status": done.returncode,
        "passed": outcomes.count("passed"),
        "skipped": outcomes.count("skipped"),
        "failed": outcomes.count("failure") + outcomes.count("error"),
        "tests": tests,
    }


def run_benchmark(load: bool, native: dict[str, str]) -> dict[str, Any]:
    """benchmarks/bench_cuda.py, or why it failed."""
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_cuda.py"), "--json"]
    done = subprocess.run(
        [*command, *([] if load else ["--no-load"])],
        capture_output=True,
        text=True,
        env=environment() | native,
        check=False,
    )
    if done.returncode:
        return {"error": done.stderr.strip()[-2000:]}
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {**figures, "messages": done.stderr.strip()[-2000:]}


def main() -> int:
    """Run both and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-check.json"), help="JSON file, or a directory for it")
    parser.add_argument("--no-load", action="store_true", help="leave out loading the 1.1B model (5 GB of disk)")
    arguments = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("no CUDA device: nothing was tested or measured", file=sys.stderr)
        return 2
    result: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": output("git", "rev-parse", "HEAD"),
        "changes": output("git", "status", "--short", "--untracked-files=no"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": versions(),
        "gpu": output("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"),
    }
    with tempfile.TemporaryDirectory() as folder:
        native = build_native(Path(folder))
        result["tests"] = run_tests(native)
        result["benchmark"] = run_benchmark(not arguments.no_load, native)
    out = arguments.out / "gpu-check.json" if arguments.out.is_dir() else arguments.out
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    tests = result["tests"]
    print(f"{tests['passed']} passed, {tests['failed']} failed, {tests.get('skipped', 0)} skipped; {out}")
    print(json.dumps(result["benchmark"], indent=2))
    return 1 if tests["exit_status"] or "error" in result["benchmark"] else 0


if __name__ == "__main__":
    sys.exit(main())
