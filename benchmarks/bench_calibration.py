"""`qlf convert --calibration` against plain NF4: how much of the perplexity lost is won back, and what it costs.

    python benchmarks/bench_calibration.py [--workdir DIR] [--models smollm2,stories15m] [--steps convert,source,...]
                                           [--max-tokens N] [--cleanup]

Real models, real text: calibrated on c4, code, technical and wiki, measured on the last third of the short stories of
`tiny`, which neither the calibration nor the choice of its settings saw. All three perplexities (16 bit, plain NF4 +
DQ, calibrated) come from `qlf eval` with the same windows. The clock of the conversion is that of the whole process.

Every step is done once and kept below the working directory, so a run can be taken apart by --steps and goes on where
another stopped; the figures are recorded when all steps of all models are there. 0.6 GB of disk.
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
KINDS = ("source", "plain", "calibrated")
STEPS = ("convert", *KINDS)
GOAL_SHARE = 0.5
GOAL_SECONDS = 600.0


def fetched(name: str) -> Path:
    """The directory of a model or of the texts."""
    command = [sys.executable, str(ROOT / "tools" / "fetch_models.py"), name]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise BenchmarkError(f"{name} could not be fetched")
    return Path(done.stdout.splitlines()[-1])


def last_third(text: Path, out: Path) -> Path:
    """The last third of a text, in a file of its own."""
    content = text.read_text(encoding="utf-8")
    out.write_text(content[-(len(content) // 3) :], encoding="utf-8")
    return out


def perplexity(model: Path, text: Path, window: int, max_tokens: int) -> float:
    """Of the first tokens of a text, by `qlf eval`."""
    size = ["--window", str(window), "--max-tokens", str(max_tokens), "--quiet", "--json"]
    command = [*qlf_command(), "eval", str(model), "--text", str(text), *size]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise BenchmarkError(f"qlf eval {model.name}: {done.stderr.strip().splitlines()[-1:]}")
    return float(json.loads(done.stdout)["perplexity"])


class Subject:
    """The steps of one model; what is done is in `state.json`."""

    def __init__(self, name: str, workdir: Path, max_tokens: int) -> None:
        self.name, self._max_tokens = name, max_tokens
        self.home = workdir / f"calibration-{name}"
        self.home.mkdir(parents=True, exist_ok=True)
        self._state = self.home / "state.json"
        self.figures: dict[str, Any] = json.loads(self._state.read_text()) if self._state.is_file() else {}
        if self.figures.setdefault("max_tokens", max_tokens) != max_tokens:
            raise BenchmarkError(f"{self._state} is of {self.figures['max_tokens']} tokens; remove {self.home}")

    def run(self, step: str) -> None:
        """Do a step unless it is done."""
        if step in self.figures:
            return
        self.figures[step] = self.convert() if step == "convert" else self.evaluate(step)
        self._state.write_text(json.dumps(self.figures, indent=2) + "\n", encoding="utf-8")
        print(f"{self.name} {step}: {self.figures[step]}", flush=True)

    def convert(self) -> dict[str, float]:
        """Convert the model with calibration."""
        texts = self.home / "texts"
        texts.mkdir(exist_ok=True)
        for part in CALIBRATION:
            shutil.copyfile(fetched("texts") / f"{part}.utf8", texts / f"{part}.utf8")
        source, out = fetched(self.name), self.home / "calibrated"
        cost = run_process(
            [*qlf_command(), "convert", source, out, "--quiet", "--overwrite", "--calibration", texts]
        )  # fmt: skip
        return {"seconds": round(cost.seconds, 2), "peak_rss": cost.peak_rss}

    def evaluate(self, kind: str) -> float:
        """Perplexity of one of the three models."""
        model = fetched(self.name) if kind == "source" else self.home / kind
        if kind == "plain" and not (model / "qlf.json").is_file():
            run_process([*qlf_command(), "convert", fetched(self.name), model, "--quiet", "--overwrite"])
        if kind == "calibrated":
            self.run("convert")
        text = last_third(fetched("texts") / f"{TEST}.utf8", self.home / "test.txt")
        return round(perplexity(model, text, WINDOWS[self.name], self._max_tokens), 4)

    def show(self) -> dict[str, Any]:
        """Print and return what was measured, if all is there."""
        if not all(step in self.figures for step in STEPS):
            return {}
        source, plain, calibrated = (self.figures[kind] for kind in KINDS)
        share = (plain - calibrated) / (plain - source)
        print(f"{self.name}: perplexity {source:.3f}, plain {plain:.3f}, calibrated {calibrated:.3f}")
        print(f"  {share:.0%} of the gap closed; {goal(f'{GOAL_SHARE:.0%}', share >= GOAL_SHARE)}")
        cost = self.figures["convert"]
        time = goal(f"{GOAL_SECONDS:.0f} s", cost["seconds"] < GOAL_SECONDS)
        print(f"  {cost['seconds']:.1f} s, peak RSS {cost['peak_rss'] / 1e6:.0f} MB; {time}", flush=True)
        return {"source": source, "plain": plain, "calibrated": calibrated, "closed": round(share, 4), **cost}


def main() -> int:
    """Measure, print, record; 1 when a command failed."""
    parser = argparse.ArgumentParser(description="Measure qlf convert --calibration.")
    default = Path(tempfile.gettempdir()) / "qlf-benchmark"
    parser.add_argument("--workdir", type=Path, default=default, help=f"for the results (default {default})")
    parser.add_argument("--models", default=",".join(WINDOWS), help="of smollm2, stories15m")
    parser.add_argument("--steps", default=",".join(STEPS), help=f"of {', '.join(STEPS)}")
    parser.add_argument("--max-tokens", type=int, default=12288, help="of the text that is evaluated on")
    parser.add_argument("--cleanup", action="store_true", help="remove the results at the end")
    options = parser.parse_args()
    workdir: Path = options.workdir
    try:
        subjects = [Subject(name, workdir, options.max_tokens) for name in options.models.split(",")]
        for subject in subjects:
            for step in options.steps.split(","):
                subject.run(step)
        figures = {subject.name: subject.show() for subject in subjects}
        if figures.keys() == WINDOWS.keys() and all(figures.values()):
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
