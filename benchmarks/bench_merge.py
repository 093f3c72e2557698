"""`qlf merge` against peft's merge_and_unload and save_pretrained: whole processes, in turns, on the CPU.

    python benchmarks/bench_merge.py [--workdir DIR] [--repeats N] [--cleanup] [--no-peer]

The base is a random 1.1B Llama in float16, the adapter a random LoRA of rank 16 on every linear layer. Three merges:
float16 to float16, where the peer does the same; the base converted to 4 bits to bfloat16, and to nf4, where there is
no peer (peft merges into 4-bit layers by rounding again, and transformers does not save the result). The clock includes
the interpreter's start, all imports, and for qlf the flush to the disk and the measured report. Files read are in the
page cache. 8 GB of disk.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench_convert import random_llama, show, warm
from common import BenchmarkError, Usage, goal, qlf_command, record, run_process, summarize

ADAPTER = """
import json, math, sys
from pathlib import Path
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file
source, out = map(Path, sys.argv[1:])
rng = np.random.default_rng(0)
tensors = {}
for file in sorted(source.glob("*.safetensors")):
    with safe_open(file, "np") as opened:
        for name in opened.keys():
            shape = opened.get_slice(name).get_shape()
            if ".layers." in name and len(shape) == 2:
                module = "base_model.model." + name.removesuffix(".weight")
                for half, size in (("A", (16, shape[1])), ("B", (shape[0], 16))):
                    values = rng.standard_normal(size, dtype=np.float32) * np.float32(0.02)
                    tensors[f"{module}.lora_{half}.weight"] = values
out.mkdir()
save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 16, "lora_alpha": 32, "target_modules": targets}
(out / "adapter_config.json").write_text(json.dumps(config))
"""
PEER = """
import sys
import torch, transformers
from peft import PeftModel
base, adapter, out = sys.argv[1:]
model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
"""
GOAL_RATIO = 10.0
GOAL_RSS = 500_000_000


def prepared(workdir: Path) -> tuple[Path, Path, Path]:
    """The float16 base, its 4-bit checkpoint and the adapter, each made on first use."""
    base = random_llama(workdir, "1b")
    quantized, adapter = workdir / "merge-1b-nf4", workdir / "merge-adapter"
    if not (quantized / "qlf.json").is_file():
        run_process([*qlf_command(), "convert", base, quantized, "--quiet", "--overwrite"])
    if not (adapter / "adapter_config.json").is_file():
        shutil.rmtree(adapter, ignore_errors=True)
        run_process([sys.executable, "-c", ADAPTER, base, adapter])
    return base, quantized, adapter


def once(command: Sequence[str | Path], out: Path) -> Usage:
    """One run; its output is removed."""
    shutil.rmtree(out, ignore_errors=True)
    try:
        return run_process(command)
    finally:
        shutil.rmtree(out, ignore_errors=True)


def measure(workdir: Path, repeats: int, peer: bool) -> dict[str, Any]:
    """All merges; prints and returns the figures."""
    base, quantized, adapter = prepared(workdir)
    out = workdir / "merge-out"
    commands: dict[str, list[str | Path]] = {
        name: [*qlf_command(), "merge", source, "--adapter", adapter, "-o", out, "--to", to, "--quiet"]
        for name, source, to in (
            ("float16 to float16", base, "float16"),
            ("nf4 to bfloat16", quantized, "bfloat16"),
            ("nf4 to nf4", quantized, "nf4"),
        )
    }
    if peer:
        commands["peft"] = [sys.executable, "-c", PEER, base, adapter, out]
    runs: dict[str, list[Usage]] = {name: [] for name in commands}
    for _ in range(repeats):
        for name, command in commands.items():
            for model in (base, quantized, adapter):
                warm(model)
            runs[name].append(once(command, out))
    found = {name: summarize(usages) for name, usages in runs.items()}
    figures: dict[str, Any] = {name: summary.as_json() for name, summary in found.items()}
    for name, summary in found.items():
        show(name, summary)
    for name in ("float16 to float16", "nf4 to bfloat16"):
        if peer:
            ratio = found["peft"].seconds / found[name].seconds
            figures[f"ratio, {name}"] = round(ratio, 2)
            print(f"  {name}: {ratio:.2f} times as fast; {goal(f'{GOAL_RATIO:g} times', ratio >= GOAL_RATIO)}")
        print(f"  {name}: {goal('peak RSS of 0.5 GB', found[name].peak_rss <= GOAL_RSS)}")
    return figures


def main() -> int:
    """Measure, print, record; 1 when a command failed."""
    parser = argparse.ArgumentParser(description="Measure qlf merge against peft's merge_and_unload.")
    default = Path(tempfile.gettempdir()) / "qlf-benchmark"
    parser.add_argument("--workdir", type=Path, default=default, help=f"for the models (default {default})")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-peer", action="store_true", help="measure qlf alone; nothing is recorded")
    parser.add_argument("--cleanup", action="store_true", help="remove the models at the end")
    options = parser.parse_args()
    workdir: Path = options.workdir
    workdir.mkdir(parents=True, exist_ok=True)
    try:
        figures = measure(workdir, options.repeats, not options.no_peer)
        if not options.no_peer:
            record("merge", figures)
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        if options.cleanup:
            for name in ("merge-1b-nf4", "merge-adapter", "random-llama-1b"):
                shutil.rmtree(workdir / name, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
