"""The CUDA kernels against a device-to-device copy and bitsandbytes, and loading onto the GPU, in one run.

    python benchmarks/bench_cuda.py [--rows 8192] [--repeats 30] [--no-load] [--scratch DIR] [--json]

Times are CUDA events around one call each; contenders take turns, and the medians are compared. Before each call a
large buffer is written: no input is left in the L2 cache, and the GPU is still busy while the host prepares the call,
so that the GPU's work alone is timed (quantization waits for its result, so there the host counts). GB/s of a decoder
count what it must move: packed codes, absmax and nested absmax in, bfloat16 out; those of the copy, bytes read plus
bytes written. Loading is timed as a whole, page cache warm, with a synchronization at its end; the checkpoint is a
random 1.1B Llama that is written to the scratch directory (5 GB) and removed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import ROOT, goal, machine, record

sys.path.insert(0, str(ROOT))

import qlformat
from qlformat import ops
from qlformat.backends import cuda

L2_FLUSH = 1 << 30


def device_facts() -> dict[str, Any]:
    """The GPU and the software that a figure belongs to."""
    properties = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.memory", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    return {
        "gpu": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "driver": done.stdout.strip() or "unknown",
        "torch_cuda": torch.version.cuda,
        "kernels": cuda.why_unavailable() or "qlformat's own",
    }


def event_seconds(run: Callable[[], object], flush: torch.Tensor) -> float:
    """Seconds of GPU time of one call, with a cold L2 cache."""
    flush.zero_()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def theirs(weight: torch.Tensor) -> Callable[[], object] | None:
    """bitsandbytes' dequantization of its own NF4 + DQ encoding, or None where it does not run."""
    try:
        from bitsandbytes import functional

        packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        functional.dequantize_4bit(packed, state)
    except Exception as error:
        print(f"bitsandbytes cannot be measured: {' '.join(str(error).split())[:200]}", file=sys.stderr)
        return None
    return lambda: functional.dequantize_4bit(packed, state)


def measure_kernels(rows: int, repeats: int) -> dict[str, Any]:
    """Median GPU seconds and GB/s of each contender on a rows x rows weight."""
    generator = torch.Generator(device="cuda").manual_seed(0)
    weight = (torch.randn(rows, rows, device="cuda", generator=generator) * 0.02).bfloat16()
    packed, codes, nested, state = ops.quantize_weight(weight)
    n = weight.numel()
    moved = packed.numel() + codes.numel() + 4 * (0 if nested is None else nested.numel()) + 2 * n
    target = torch.empty_like(weight)
    contenders: dict[str, tuple[Callable[[], object], int]] = {
        "copy": (lambda: target.copy_(weight), 4 * n),
        "dequantize": (lambda: ops.dequantize_weight(packed, codes, state, nested), moved),
        "quantize": (lambda: ops.quantize_weight(weight), moved),
    }
    bitsandbytes = theirs(weight)
    if bitsandbytes is not None:
        contenders["bitsandbytes dequantize_4bit"] = bitsandbytes, moved
    flush = torch.empty(L2_FLUSH, dtype=torch.uint8, device="cuda")
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(repeats + 3):
        for name, (run, _) in contenders.items():
            taken = event_seconds(run, flush)
            if repeat >= 3:  # the first rounds compile, allocate and raise the clocks
                seconds[name].append(taken)
    figures = {
        name: {"seconds": statistics.median(times), "gb_per_s": contenders[name][1] / statistics.median(times) / 1e9}
        for name, times in seconds.items()
    }
    ratios = {"share of the copy's bandwidth": figures["dequantize"]["gb_per_s"] / figures["copy"]["gb_per_s"]}
    if bitsandbytes is not None:
        ratios["speed against bitsandbytes"] = (
            figures["bitsandbytes dequantize_4bit"]["seconds"] / figures["dequantize"]["seconds"]
        )
    return {"shape": [rows, rows], "repeats": repeats, "contenders": figures, "ratios": ratios}


def from_safetensors(source: Path) -> dict[str, Any]:
    """The 16-bit checkpoint onto the GPU the usual way."""
    from safetensors.torch import load_file

    state: dict[str, Any] = {}
    for shard in sorted(source.glob("*.safetensors")):
        state.update(load_file(shard, device="cuda"))
    return state


def bfloat16_copy(source: Path, target: Path) -> None:
    """The checkpoint in bfloat16, which is what is loaded in the end: no cast is timed."""
    from safetensors.torch import load_file, save_file

    target.mkdir()
    for shard in sorted(source.glob("*.safetensors")):
        save_file({name: tensor.bfloat16() for name, tensor in load_file(shard).items()}, target / shard.name)


def load_seconds(run: Callable[[], object]) -> float:
    """Seconds of one load, the device idle before and after; its result is freed outside the clock."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    state = run()
    torch.cuda.synchronize()
    taken = time.perf_counter() - start
    del state
    return taken


def measure_loading(scratch: Path, repeats: int) -> dict[str, Any]:
    """A random 1.1B Llama to bfloat16 on the GPU: from 4 bits, and from bfloat16 safetensors."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        source, dense, quantized = (Path(folder) / name for name in ("source", "dense", "quantized"))
        maker = ROOT / "benchmarks" / "make_random_llama.py"
        subprocess.run([sys.executable, str(maker), str(source)], check=True, stdout=subprocess.DEVNULL)
        bfloat16_copy(source, dense)
        qlformat.convert(source, quantized)
        contenders: dict[str, Callable[[], object]] = {
            "4-bit checkpoint": lambda: qlformat.load_state_dict(quantized, dtype=torch.bfloat16, device="cuda"),
            "bfloat16 safetensors": lambda: from_safetensors(dense),
        }
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for repeat in range(repeats + 1):
            for name, run in contenders.items():
                taken = load_seconds(run)
                if repeat:  # the first round fills the page cache and torch's pools
                    seconds[name].append(taken)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    ratio = medians["bfloat16 safetensors"] / medians["4-bit checkpoint"]
    return {"seconds": medians, "repeats": repeats, "ratios": {"speed against safetensors": ratio}}


def report(figures: dict[str, Any]) -> None:
    """Print the figures with their goals."""
    kernels = figures["kernels"]
    print(f"{figures['device']['gpu']}, driver {figures['device']['driver']}, kernels: {figures['device']['kernels']}")
    for name, values in kernels["contenders"].items():
        print(f"  {name:<32}{values['seconds'] * 1e6:10.1f} us {values['gb_per_s']:9.1f} GB/s")
    share = kernels["ratios"]["share of the copy's bandwidth"]
    print(f"  share of the copy's bandwidth   {share:10.3f}   {goal('0.90', share >= 0.9)}")
    against = kernels["ratios"].get("speed against bitsandbytes")
    if against is not None:
        print(f"  speed against bitsandbytes      {against:10.2f}   {goal('1.5', against >= 1.5)}")
    if "loading" in figures:
        for name, seconds in figures["loading"]["seconds"].items():
            print(f"  load 1.1B from {name:<21}{seconds:8.3f} s")
        ratio = figures["loading"]["ratios"]["speed against safetensors"]
        print(f"  speed against safetensors       {ratio:10.2f}   {goal('1.5', ratio >= 1.5)}")


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8192, help="of the square weight")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--no-load", action="store_true", help="measure the kernels only")
    parser.add_argument("--scratch", type=Path, help="directory for the checkpoints (default: the system's)")
    parser.add_argument("--json", action="store_true", help="print one JSON object and do not record it")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device: nothing to measure")
    figures: dict[str, Any] = {"device": device_facts()}
    figures["kernels"] = measure_kernels(arguments.rows, arguments.repeats)
    if not arguments.no_load:
        figures["loading"] = measure_loading(arguments.scratch or Path(tempfile.gettempdir()), repeats=5)
    if arguments.json:
        print(json.dumps({"machine": machine(), **figures}))
        return
    report(figures)
    record("cuda", figures)


if __name__ == "__main__":
    main()
