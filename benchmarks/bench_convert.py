"""`qlf convert` against transformers + bitsandbytes: whole processes, in turns, time and peak memory.

    python benchmarks/bench_convert.py [--workdir DIR] [--repeats N] [--large deep|wide|both|none] [--cleanup]

The models: SmolLM2-135M-Instruct, a random 1.1B float16 Llama in two shards, and two with 4 times as many weights, one
with more layers and one with larger tensors (only `qlf`: is memory independent of the model's size?). The sources are
read once before the clock starts, so both sides find them in the page cache. `qlf` flushes its files to the disk before
it ends; the peer does not. Needs 14 GB of disk (a large model is removed before the next is written), 4 GB with
--large none.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import ROOT, BenchmarkError, Summary, Usage, goal, qlf_command, record, run_process, summarize

PEER = """
import sys
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
config = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
)
AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=config).save_pretrained(sys.argv[2])
"""
OUTPUTS = ("bench-output-qlf", "bench-output-peer")
LARGE = {"deep": ["4b-deep"], "wide": ["4b-wide"], "both": ["4b-deep", "4b-wide"]}
GOAL_RATIO = 20
GOAL_PEAK = 500_000_000
GOAL_GROWTH = 0.10
GOAL_SMALL_SECONDS = 1.0


def warm(model: Path) -> None:
    """Read the model, so that no run pays for the disk, whatever earlier ones have pushed out of the page cache."""
    with Path(os.devnull).open("wb") as sink:
        for path in sorted(model.glob("*.safetensors")):
            with path.open("rb") as file:
                shutil.copyfileobj(file, sink, 1 << 20)


def qlf_run(model: Path, out: Path) -> Usage:
    """One `qlf convert`; the result is removed."""
    usage = run_process([*qlf_command(), "convert", model, out, "--quiet"])
    shutil.rmtree(out)
    return usage


def peer_run(model: Path, out: Path) -> Usage:
    """One conversion by transformers and bitsandbytes; the result is removed."""
    usage = run_process([sys.executable, "-c", PEER, model, out])
    shutil.rmtree(out)
    return usage


def in_turns(model: Path, workdir: Path, repeats: int, peer: bool) -> tuple[Summary, Summary | None]:
    """Run ours and the peer's alternately, so that a busy machine slows both."""
    ours, theirs = [], []
    for _ in range(repeats):
        warm(model)
        ours.append(qlf_run(model, workdir / OUTPUTS[0]))
        if peer:
            warm(model)
            theirs.append(peer_run(model, workdir / OUTPUTS[1]))
    return summarize(ours), summarize(theirs) if theirs else None


def random_llama(workdir: Path, shape: str) -> Path:
    """A random model, written on first use by a process of its own (see common.run_process)."""
    out = workdir / f"random-llama-{shape}"
    if not (out / "config.json").is_file():
        print(f"writing {out}", flush=True)
        run_process([sys.executable, ROOT / "benchmarks" / "make_random_llama.py", out, "--shape", shape])
    return out


def clean(workdir: Path) -> None:
    """Remove what this script made in the work directory, and the directory when nothing else is in it."""
    for name in (*OUTPUTS, *(f"random-llama-{shape}" for shape in ("1b", *LARGE["both"]))):
        shutil.rmtree(workdir / name, ignore_errors=True)
    if not any(workdir.iterdir()):
        workdir.rmdir()


def smollm2() -> Path:
    """SmolLM2's float16 repository."""
    command = [sys.executable, str(ROOT / "tools" / "fetch_models.py"), "smollm2"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise BenchmarkError("SmolLM2 could not be fetched")
    return Path(done.stdout.splitlines()[-1])


def show(name: str, result: Summary) -> None:
    """Print one line of figures."""
    spread = f"{result.fastest:.2f} to {result.slowest:.2f}"
    print(f"  {name:22} {result.seconds:8.2f} s ({spread})   peak RSS {result.peak_rss / 1e6:7.0f} MB", flush=True)


def compare(name: str, model: Path, workdir: Path, repeats: int, peer: bool) -> dict[str, Any]:
    """Measure one model and print it."""
    print(f"{name}: {sum(path.stat().st_size for path in model.glob('*.safetensors')) / 1e9:.2f} GB", flush=True)
    ours, theirs = in_turns(model, workdir, repeats, peer)
    show("qlf convert", ours)
    figures: dict[str, Any] = {"qlf": ours.as_json()}
    if theirs is not None:
        show("transformers + bnb", theirs)
        figures |= {"peer": theirs.as_json(), "ratio": round(theirs.seconds / ours.seconds, 2)}
        print(f"  {figures['ratio']} times as fast, {theirs.peak_rss / ours.peak_rss:.1f} times less memory")
    return figures


def main() -> int:
    """Measure, print, record; 1 when a command failed."""
    parser = argparse.ArgumentParser(description="Measure `qlf convert` against transformers + bitsandbytes.")
    default = Path(tempfile.gettempdir()) / "qlf-benchmark"
    parser.add_argument("--workdir", type=Path, default=default, help=f"for models and results (default {default})")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--large", choices=[*LARGE, "none"], default="both", help="which of the 4 times larger models")
    parser.add_argument("--cleanup", action="store_true", help="remove the random models at the end")
    options = parser.parse_args()
    workdir: Path = options.workdir
    workdir.mkdir(parents=True, exist_ok=True)
    for left in OUTPUTS:
        shutil.rmtree(workdir / left, ignore_errors=True)
    try:
        figures = {"SmolLM2-135M": compare("SmolLM2-135M-Instruct", smollm2(), workdir, options.repeats, True)}
        seconds = figures["SmolLM2-135M"]["qlf"]["seconds"]
        print(f"  {goal(f'{GOAL_SMALL_SECONDS} s', seconds < GOAL_SMALL_SECONDS)}")
        base = figures["1.1B"] = compare(
            "random Llama 1.1B", random_llama(workdir, "1b"), workdir, options.repeats, True
        )
        peak = base["qlf"]["peak_rss"]
        print(f"  {goal(f'{GOAL_RATIO} times as fast', base['ratio'] >= GOAL_RATIO)}")
        print(f"  {goal(f'{GOAL_PEAK / 1e6:.0f} MB', peak <= GOAL_PEAK)}")
        for shape in LARGE.get(options.large, []):
            model = random_llama(workdir, shape)
            large = figures[shape] = compare(f"random Llama {shape}", model, workdir, options.repeats, False)
            growth = large["peak_growth"] = round(large["qlf"]["peak_rss"] / peak - 1, 4)
            print(f"  peak RSS {growth:+.1%} of the 1.1B model's; {goal(f'+{GOAL_GROWTH:.0%}', growth <= GOAL_GROWTH)}")
            shutil.rmtree(model)
        record("convert", figures)
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        if options.cleanup:
            clean(workdir)
    return 0


if __name__ == "__main__":
    sys.exit(main())
