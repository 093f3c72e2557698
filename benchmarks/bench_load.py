"""Decode a 4-bit checkpoint while loading, against loading the 16-bit one and against transformers + bitsandbytes.

    python benchmarks/bench_load.py [--workdir DIR] [--repeats N] [--peer-repeats N] [--cleanup]

A random 1.1B bfloat16 Llama in two shards and its conversion to NF4, both on the CPU:

    warm          load_state_dict of the 4-bit repository to bfloat16, against every tensor of the 16-bit one read by
                  safetensors and cloned, so that both end with 2.2 GB in memory of their own
    cold          the same, the files dropped from the page cache before (posix_fadvise) and read from the disk
    transformers  warm, against from_pretrained of the 4-bit repository followed by model.dequantize()

Every run is a process of its own, and they take turns; imports are not counted, opening and checking the files is. The
system clears fresh memory when it is touched first: on a virtual machine that gives free memory back to its host, times
vary by a factor of two and more between runs, on both sides. Needs 4 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import ROOT, BenchmarkError, goal, qlf_command, record, run_process

CHILD = """
import glob, json, os, resource, sys, time
directory, cold = sys.argv[1], sys.argv[2] == "cold"
{imports}
for path in glob.glob(directory + "/*.safetensors"):
    descriptor = os.open(path, os.O_RDONLY)
    if cold:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    else:
        while os.read(descriptor, 1 << 24):
            pass
    os.close(descriptor)
start = time.perf_counter()
{load}
seconds = time.perf_counter() - start
size = sum(tensor.nbytes for tensor in state.values())
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print(json.dumps({{"seconds": seconds, "bytes": size, "peak_rss": peak}}))
"""
OURS = CHILD.format(
    imports="""
import torch, qlformat, qlformat.loader, qlformat.native
if not qlformat.native.available():
    sys.exit("the native kernels are missing: " + qlformat.native.why_unavailable())
""",
    load="state = qlformat.load_state_dict(directory, dtype=torch.bfloat16)",
)
SAFETENSORS = CHILD.format(
    imports="import torch; from safetensors import safe_open",
    load="""
state = {}
for path in sorted(glob.glob(directory + "/*.safetensors")):
    with safe_open(path, "pt") as file:
        for name in file.keys():
            state[name] = file.get_tensor(name).clone()
""",
)
TRANSFORMERS = CHILD.format(
    imports="import torch, bitsandbytes, accelerate; from transformers import LlamaForCausalLM as Model",
    load="state = Model.from_pretrained(directory).dequantize().state_dict()",
)
Run = dict[str, float]
GOALS = {"warm": 1.0, "cold": 2.0, "transformers": 5.0}


def timed(script: str, directory: Path, cache: str) -> Run:
    """One process: seconds of the load, bytes loaded, peak memory."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", script, str(directory), cache]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no message"
        raise BenchmarkError(f"a run ended with code {done.returncode}: {last}")
    run: Run = json.loads(done.stdout.splitlines()[-1])
    return run


def models(workdir: Path) -> tuple[Path, Path]:
    """The 16-bit model and its conversion, made on first use."""
    source, quantized = workdir / "random-llama-1b-bfloat16", workdir / "random-llama-1b-nf4"
    if not (source / "config.json").is_file():
        print(f"writing {source}", flush=True)
        run_process([sys.executable, ROOT / "benchmarks" / "make_random_llama.py", source, "--dtype", "bfloat16"])
    if not (quantized / "config.json").is_file():
        print(f"writing {quantized}", flush=True)
        run_process([*qlf_command(), "convert", source, quantized, "--shard-size", "500MB", "--quiet"])
    return source, quantized


def summary(runs: list[Run]) -> dict[str, float]:
    """Median, fastest and slowest time, and the largest peak."""
    seconds = [run["seconds"] for run in runs]
    times = {"seconds": statistics.median(seconds), "fastest": min(seconds), "slowest": max(seconds)}
    return {
        **{name: round(value, 4) for name, value in times.items()},
        "peak_rss": max(run["peak_rss"] for run in runs),
    }


def compare(name: str, ours: Path, peer_script: str, peer: Path, repeats: int) -> dict[str, Any]:
    """Measure both in turns and print the row."""
    cache = "cold" if name == "cold" else "warm"
    found: list[Run] = []
    theirs: list[Run] = []
    for _ in range(repeats):
        theirs.append(timed(peer_script, peer, cache))
        found.append(timed(OURS, ours, cache))
    if found[0]["bytes"] != theirs[0]["bytes"]:
        raise BenchmarkError(f"{name}: loaded {found[0]['bytes']} bytes, the peer {theirs[0]['bytes']}")
    figures: dict[str, Any] = {"qlformat": summary(found), "peer": summary(theirs)}
    figures["ratio"] = round(figures["peer"]["seconds"] / figures["qlformat"]["seconds"], 2)
    print(f"{name}: {found[0]['bytes'] / 1e9:.2f} GB of bfloat16")
    for side in ("qlformat", "peer"):
        row = figures[side]
        spread = f"{row['fastest']:.2f} to {row['slowest']:.2f}"
        print(f"  {side:10}{row['seconds']:8.2f} s ({spread})   peak RSS {row['peak_rss'] / 1e6:6.0f} MB")
    print(f"  {figures['ratio']} times as fast; {goal(f'{GOALS[name]}', figures['ratio'] >= GOALS[name])}", flush=True)
    return figures


def main() -> int:
    """Measure, print, record; 1 when a command failed."""
    parser = argparse.ArgumentParser(description="Measure load_state_dict on the CPU.")
    default = Path(tempfile.gettempdir()) / "qlf-benchmark"
    parser.add_argument("--workdir", type=Path, default=default, help=f"for the models (default {default})")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--peer-repeats", type=int, default=3, help="of the row against transformers, which is slow")
    parser.add_argument("--cleanup", action="store_true", help="remove the models at the end")
    options = parser.parse_args()
    options.workdir.mkdir(parents=True, exist_ok=True)
    try:
        source, quantized = models(options.workdir)
        figures = {
            "warm": compare("warm", quantized, SAFETENSORS, source, options.repeats),
            "cold": compare("cold", quantized, SAFETENSORS, source, options.repeats),
            "transformers": compare("transformers", quantized, TRANSFORMERS, quantized, options.peer_repeats),
        }
        record("load", figures)
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        if options.cleanup:
            for model in ("random-llama-1b-bfloat16", "random-llama-1b-nf4"):
                shutil.rmtree(options.workdir / model, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
