"""`qlformat.load_model` against transformers' from_pretrained of the same 4-bit repository, on the CPU.

    python benchmarks/bench_load_model.py [--workdir DIR] [--repeats N] [--cleanup]

Each load is the first of a process of its own, in turns. The clock runs inside it, after every import that the load
needs. Recorded: the peak of resident memory after the load, and what is resident after one forward pass over 8
tokens when the heap has given back what was freed (its peak is that of bitsandbytes' temporary layers, and differs
from run to run). Both sides map the file; the pages of it that were touched count, though all processes share them.
The file is in the page cache. The models: SmolLM2-135M-Instruct and a random 1.1B Llama, converted on first use; 3
GB of disk.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench_convert import random_llama, smollm2, warm
from common import BenchmarkError, Summary, Usage, goal, qlf_command, record, run_process, summarize

# Both sides import the same packages before the clock starts, ours those of qlformat as well.
LOAD = """
import ctypes, json, os, resource, sys, time
import accelerate, bitsandbytes, safetensors, torch, transformers
import transformers.integrations.bitsandbytes, transformers.models.llama.modeling_llama
from transformers import AutoModelForCausalLM
side, repository, forward = sys.argv[1:]
if side == "qlformat":
    import qlformat.model_loader
    load = qlformat.load_model
else:
    load = AutoModelForCausalLM.from_pretrained
unit = 1 if sys.platform == "darwin" else 1024
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
before = peak()
start = time.perf_counter()
model = load(repository, device_map="cpu")
seconds = time.perf_counter() - start
loaded = peak()
used = 0
if forward == "forward" and sys.platform == "linux":
    with torch.inference_mode():
        model(torch.arange(8)[None] + 100)
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    used = int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
print(json.dumps({"seconds": seconds, "before": before, "loaded": loaded, "used": used}))
"""
GOAL_RATIO = 2.0


def load_once(side: str, repository: Path, forward: bool) -> dict[str, float]:
    """Seconds of one load, the peaks before and after it, and what is resident after a forward pass; bytes."""
    command = [sys.executable, "-c", LOAD, side, str(repository), "forward" if forward else "-"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise BenchmarkError(f"{side} could not load {repository}: {lines[-1] if lines else 'no message'}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def four_bit(source: Path, workdir: Path, name: str) -> Path:
    """The 4-bit checkpoint of a model, converted on first use."""
    out = workdir / f"load-{name}-nf4"
    if not (out / "qlf.json").is_file():
        run_process([*qlf_command(), "convert", source, out, "--quiet", "--overwrite"])
    return out


def measure(repository: Path, repeats: int) -> dict[str, Any]:
    """Both sides in turns; prints and returns the figures."""
    warm(repository)
    runs: dict[str, list[dict[str, float]]] = {"qlformat": [], "transformers": []}
    for number in range(repeats):
        for side, found in runs.items():
            found.append(load_once(side, repository, forward=number == 0))  # a forward pass takes far longer
    figures: dict[str, Any] = {}
    for side, found in runs.items():
        summary: Summary = summarize([Usage(run["seconds"], int(run["loaded"])) for run in found])
        more = {key: int(max(run[key] for run in found)) for key in ("before", "used")}
        figures[side] = {**summary.as_json(), "peak_before": more["before"], "resident_after_forward": more["used"]}
        spread = f"{summary.fastest:.3f} to {summary.slowest:.3f}"
        peaks = f"{summary.peak_rss / 1e6:.0f} MB after the load, {more['used'] / 1e6:.0f} MB after a forward pass"
        before = f"{more['before'] / 1e6:.0f} MB before"
        print(f"  {side:13} {summary.seconds:6.3f} s ({spread})   peak RSS {peaks} ({before})", flush=True)
    ratio = figures["transformers"]["seconds"] / figures["qlformat"]["seconds"]
    figures["ratio"] = round(ratio, 2)
    ours, theirs = (figures[side]["peak_rss"] for side in ("qlformat", "transformers"))
    print(f"  {ratio:.2f} times as fast; {goal(f'{GOAL_RATIO} times', ratio >= GOAL_RATIO)}")
    print(f"  {goal('peak RSS no higher', ours <= theirs)}")
    return figures


def main() -> int:
    """Measure, print, record; 1 when a command failed."""
    parser = argparse.ArgumentParser(description="Measure qlformat.load_model against from_pretrained.")
    default = Path(tempfile.gettempdir()) / "qlf-benchmark"
    parser.add_argument("--workdir", type=Path, default=default, help=f"for the models (default {default})")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cleanup", action="store_true", help="remove the models at the end")
    options = parser.parse_args()
    workdir: Path = options.workdir
    workdir.mkdir(parents=True, exist_ok=True)
    try:
        figures = {}
        for title, name, source in (
            ("SmolLM2-135M", "smollm2", smollm2),
            ("1.1B", "1b", lambda: random_llama(workdir, "1b")),
        ):
            repository = four_bit(source(), workdir, name)
            print(
                f"{title}: {sum(p.stat().st_size for p in repository.glob('*.safetensors')) / 1e9:.2f} GB", flush=True
            )
            figures[title] = measure(repository, options.repeats)
        record("load_model", figures)
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        if options.cleanup:
            for name in ("load-smollm2-nf4", "load-1b-nf4", "random-llama-1b"):
                shutil.rmtree(workdir / name, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
