"""Speed of the CPU kernels as ratios against bitsandbytes and a plain copy, measured side by side in one run.

    python benchmarks/bench_kernels.py [--elements N] [--repeats R] [--threads T] [--json]

Contenders take turns within each repeat, so a busy machine slows all of them; the medians are compared. GB/s count the
bytes of the 16-bit tensor. Our buffers and the copy's are allocated and touched before the clock starts. bitsandbytes
cannot decode into a given buffer on the CPU; it is timed on tensors small enough for the allocator to reuse memory that
is touched already, which favours it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from qlformat import native

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch
from bitsandbytes import functional

SMALL = 1 << 23


def weights(n: int) -> Any:
    """bfloat16 tensor of n Gaussian weights."""
    part = torch.randn(min(n, SMALL), generator=torch.Generator().manual_seed(0)) * 0.02
    return part.bfloat16().repeat(-(-n // part.numel()))[:n].contiguous()


def contenders(n: int, threads: int, isa: str | None) -> dict[str, tuple[Callable[[], object], int]]:
    """name -> (one run, elements it handles). Buffers live in the closures."""
    tensor = weights(n)
    bits = tensor.view(torch.int16).numpy().view(np.uint16)
    small = tensor[: min(n, SMALL)].clone()
    nb = -(-n // 64)
    moments = np.zeros((nb, 3), dtype=np.float32)
    packed, absmax = native.quantize(bits, dtype="bfloat16", moments=moments, threads=threads, isa=isa)
    codes, nested, offset = native.double_quantize(absmax, threads=threads)
    out = torch.zeros(n, dtype=torch.bfloat16)
    out_bits = out.view(torch.int16).numpy().view(np.uint16)
    theirs, state = functional.quantize_4bit(small, quant_type="nf4", compress_statistics=True)

    def encode(sums: Any) -> None:
        native.quantize(bits, dtype="bfloat16", packed=packed, absmax=absmax, moments=sums, threads=threads, isa=isa)
        native.double_quantize(absmax, threads=threads)

    how: dict[str, Any] = {"dtype": "bfloat16", "out": out_bits, "threads": threads, "isa": isa}
    return {
        "bitsandbytes quantize_4bit": (
            lambda: functional.quantize_4bit(small, quant_type="nf4", compress_statistics=True),
            small.numel(),
        ),
        "quantize + DQ": (lambda: encode(None), n),
        "quantize + DQ + moments": (lambda: encode(moments), n),
        "bitsandbytes dequantize_4bit": (lambda: functional.dequantize_4bit(theirs, state), small.numel()),
        "copy (torch)": (lambda: out.copy_(tensor), n),
        "copy (numpy)": (lambda: np.copyto(out_bits, bits), n),
        "dequantize": (lambda: native.dequantize(packed, absmax, n, **how), n),
        "dequantize nested": (lambda: native.dequantize_nested(packed, codes, nested, offset, n, **how), n),
    }


def measure(runs: dict[str, tuple[Callable[[], object], int]], repeats: int) -> dict[str, float]:
    """Median GB/s of bfloat16 of each contender."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, (run, _) in runs.items():
            start = time.perf_counter()
            run()
            if repeat:  # the first round warms caches, threads and lazy imports
                seconds[name].append(time.perf_counter() - start)
    return {name: 2 * elements / statistics.median(seconds[name]) / 1e9 for name, (_, elements) in runs.items()}


def ratios(speed: dict[str, float]) -> dict[str, float]:
    """The figures that the project sets goals for."""
    copy = max(speed["copy (torch)"], speed["copy (numpy)"])
    encoder, decoder = speed["bitsandbytes quantize_4bit"], speed["bitsandbytes dequantize_4bit"]
    return {
        "quantize + DQ / bitsandbytes": speed["quantize + DQ"] / encoder,
        "quantize + DQ + moments / bitsandbytes": speed["quantize + DQ + moments"] / encoder,
        "dequantize / bitsandbytes": speed["dequantize"] / decoder,
        "dequantize nested / bitsandbytes": speed["dequantize nested"] / decoder,
        "dequantize / fastest copy": speed["dequantize"] / copy,
        "dequantize nested / fastest copy": speed["dequantize nested"] / copy,
        "extra time for the moments": speed["quantize + DQ"] / speed["quantize + DQ + moments"] - 1,
    }


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=1 << 27, help="bfloat16 elements (default 2**27: 256 MiB)")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=native.default_threads())
    parser.add_argument("--isa", choices=list(native.ISA_LEVELS), help="default: the best of this processor")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    speed = measure(contenders(arguments.elements, arguments.threads, arguments.isa), arguments.repeats)
    result = {
        "machine": platform.machine(),
        "threads": arguments.threads,
        "isa": arguments.isa or "best of " + ", ".join(native.isa_levels()),
        "elements": arguments.elements,
        "gigabytes_per_second": speed,
        "ratios": ratios(speed),
    }
    if arguments.json:
        print(json.dumps(result))
        return
    print(f"{result['isa']}, {result['threads']} threads, {arguments.elements} bfloat16 elements, blocksize 64")
    for name, value in speed.items():
        print(f"  {name:<40}{value:9.3f} GB/s")
    for name, value in ratios(speed).items():
        print(f"  {name:<40}{value:9.2f}")


if __name__ == "__main__":
    main()
