"""`qlf convert --calibration` against plain NF4: how much of the perplexity lost is won back, and what it costs.

    python benchmarks/bench_calibration.py [--workdir DIR] [--models smollm2,stories15m] [--max-tokens N] [--cleanup]

Real models, real text: calibrated on c4, code, technical and wiki, measured on the short stories of `tiny`, which the
calibration never saw. All three perplexities (16 bit, plain NF4 + DQ, calibrated) come from `qlf eval` with the same
windows. The clock of the conversion is that of the whole process. 0.6 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import ROOT, BenchmarkError, goal, qlf_command, record, run_process

WINDOWS = {"smollm2": 512, "stories15m": 256}
CALIBRATION = ("c4", "code", "technical", "wiki")
TEST = "tiny"
GOAL_SHARE = 0.5
GOAL_SECONDS = 600.0


def fetched(name: str) -> Path:
    """The directory of a model or of the texts."""
    command = [sys.executable, str(ROOT / "tools" / "fetch_models.py"), name]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise BenchmarkError(f"{name} could not be fetched")
    return Path(done.stdout.splitlines()[-1])


def perplexity(model: Path, text: Path, window: int, max_tokens: int) -> float:
    """Of the first tokens of a text, by `qlf eval`."""
    size = ["--window", str(window), "--max-tokens", str(max_tokens), "--quiet", "--json"]
    command = [*qlf_command(), "eval", str(model), "--text", str(text), *size]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise BenchmarkError(f"qlf eval {model.name}: {done.stderr.strip().splitlines()[-1:]}")
    return float(json.loads(done.stdout)["perplexity"])


def measure(name: str, workdir: Path, max_tokens: int) -> dict[str, Any]:
    """Convert one model both ways, evaluate and print it."""
    model, texts = fetched(name), fetched("texts")
    calibration = workdir / "calibration-texts"
    calibration.mkdir(exist_ok=True)
    for part in CALIBRATION:
        shutil.copyfile(texts / f"{part}.utf8", calibration / f"{part}.utf8")
    plain, calibrated = workdir / f"calibration-{name}-plain", workdir / f"calibration-{name}"
    run_process([*qlf_command(), "convert", model, plain, "--quiet", "--overwrite"])
    cost = run_process(
        [*qlf_command(), "convert", model, calibrated, "--quiet", "--overwrite", "--calibration", calibration]
    )
    found = {
        kind: perplexity(path, texts / f"{TEST}.utf8", WINDOWS[name], max_tokens)
        for kind, path in (("source", model), ("plain", plain), ("calibrated", calibrated))
    }
    share = (found["plain"] - found["calibrated"]) / (found["plain"] - found["source"])
    print(f"{name}: perplexity {found['source']:.3f}, plain {found['plain']:.3f}, calibrated {found['calibrated']:.3f}")
    print(f"  {share:.0%} of the gap closed; {goal(f'{GOAL_SHARE:.0%}', share >= GOAL_SHARE)}")
    time = goal(f"{GOAL_SECONDS:.0f} s", cost.seconds < GOAL_SECONDS)
    print(f"  {cost.seconds:.1f} s, peak RSS {cost.peak_rss / 1e6:.0f} MB; {time}", flush=True)
    figures = {kind: round(value, 4) for kind, value in found.items()}
    return {**figures, "closed": round(share, 4), "seconds": round(cost.seconds, 2), "peak_rss": cost.peak_rss}


def main() -> int:
    """Measure, print, record; 1 when a command failed."""
    parser = argparse.ArgumentParser(description="Measure qlf convert --calibration.")
    default = Path(tempfile.gettempdir()) / "qlf-benchmark"
    parser.add_argument("--workdir", type=Path, default=default, help=f"for the results (default {default})")
    parser.add_argument("--models", default=",".join(WINDOWS), help="of smollm2, stories15m")
    parser.add_argument("--max-tokens", type=int, default=12288, help="of the text that is evaluated on")
    parser.add_argument("--cleanup", action="store_true", help="remove the results at the end")
    options = parser.parse_args()
    workdir: Path = options.workdir
    workdir.mkdir(parents=True, exist_ok=True)
    try:
        figures = {name: measure(name, workdir, options.max_tokens) for name in options.models.split(",")}
        record("calibration", figures)
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        if options.cleanup:
            for path in workdir.glob("calibration-*"):
                shutil.rmtree(path, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
