"""How much of a fine-tune's gain `qlf merge` keeps, by target: real adapters, real data, held-out loss by `qlf eval`.

    python benchmarks/bench_retention.py [--workdir DIR] [--models smollm2,stories15m] [--steps train,bfloat16,...]
                                         [--cleanup]

SmolLM2-135M-Instruct learns from the first chitchat conversations and is measured on the last ones (the assistant's
tokens); stories15M learns from the first half of the `technical` text and is measured on the end of it. Both adapters
come from a short `qlf finetune` on the NF4 base: rank 8 on all linear layers. Feedback rounding is calibrated on the
rows the adapter was trained on, rendered as the model reads them. Retention is (base - merged) / (base - adapter), base
and live adapter on the NF4 checkpoint.

Every step is done once and kept below the working directory, so a run can be taken apart by --steps and goes on where
another stopped, within the training too; the figures are recorded when all steps of all models are there. 1.5 GB of
disk, half an hour on 2 cores.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_calibration import fetched
from common import BenchmarkError, goal, qlf_command, record, run_process

RENDER = """
import json, sys
from pathlib import Path
import transformers
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
rows = [json.loads(line)["messages"] for line in Path(sys.argv[2]).read_text().splitlines()]
texts = [tokenizer.apply_chat_template(row, tokenize=False) for row in rows]
Path(sys.argv[3]).write_text("".join(texts))
"""
HELD_OUT_CHARACTERS = 24_000
TRAIN_CHARACTERS = 240_000


@dataclass(frozen=True)
class Subject:
    """A model, how it is trained, and what its rows are called."""

    window: int
    steps: int
    rate: str
    data: Callable[[Path, Path], None]


@dataclass(frozen=True)
class Target:
    """A merge: its options, and the least retention."""

    to: str
    least: float | None
    source: bool = False
    calibration: bool = False


TARGETS = {
    "bfloat16": Target("bfloat16", 0.99),
    "source-nearest": Target("nf4", None, source=True),
    "source-feedback": Target("nf4", 1.0, source=True, calibration=True),
    "base-nearest": Target("nf4", None),
    "base-feedback": Target("nf4", 0.8, calibration=True),
}
STEPS = ("train", "evaluate", *TARGETS)


def conversations(model: Path, home: Path) -> None:
    """Rows of chitchat: the first to train on, the last held out."""
    lines = (fetched("chitchat") / "chat.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (home / "train.jsonl").write_text("".join(_up_to(lines, TRAIN_CHARACTERS)), encoding="utf-8")
    (home / "held-out.jsonl").write_text("".join(_up_to(lines[::-1], HELD_OUT_CHARACTERS)), encoding="utf-8")
    run_process([sys.executable, "-c", RENDER, model, home / "train.jsonl", home / "train.txt"])


def technical(_: Path, home: Path) -> None:
    """Rows of text, a paragraph or more each: the first to train on, the last held out."""
    text = (fetched("texts") / "technical.utf8").read_text(encoding="utf-8")
    train, held_out = text[: len(text) // 2], text[-HELD_OUT_CHARACTERS:]
    for name, part in (("train", train), ("held-out", held_out)):
        rows = [part[at : at + 800] for at in range(0, len(part), 800)]
        lines = "".join(json.dumps({"text": row}) + "\n" for row in rows)
        (home / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    (home / "train.txt").write_text(train, encoding="utf-8")


SUBJECTS = {
    "smollm2": Subject(window=256, steps=30, rate="2e-4", data=conversations),
    "stories15m": Subject(window=256, steps=30, rate="2e-4", data=technical),
}


def _up_to(lines: list[str], characters: int) -> list[str]:
    taken, size = [], 0
    for line in lines:
        size += len(line)
        if size > characters:
            break
        taken.append(line)
    return taken


class Retention:
    """The steps of one model; what is done is in `state.json`."""

    def __init__(self, name: str, workdir: Path) -> None:
        self.name, self.subject = name, SUBJECTS[name]
        self.home = workdir / f"retention-{name}"
        self.home.mkdir(parents=True, exist_ok=True)
        self._state = self.home / "state.json"
        self.figures: dict[str, Any] = json.loads(self._state.read_text()) if self._state.is_file() else {}

    def run(self, step: str) -> None:
        """Do a step unless it is done."""
        if step in self.figures:
            return
        if step != "train" and "train" not in self.figures:
            self.run("train")
        done = {"train": self.train, "evaluate": self.evaluate}
        self.figures[step] = done[step]() if step in done else self.merge(TARGETS[step])
        self._save()
        print(f"{self.name} {step}: {self.figures[step]}", flush=True)

    def _save(self) -> None:
        self._state.write_text(json.dumps(self.figures, indent=2) + "\n", encoding="utf-8")

    def train(self) -> dict[str, float]:
        """Convert the model and train its adapter."""
        source = fetched(self.name)
        if not (self.home / "base" / "qlf.json").is_file():
            run_process([*qlf_command(), "convert", source, self.home / "base", "--quiet", "--overwrite"])
        if not (self.home / "train.txt").is_file():
            self.subject.data(source, self.home)
        if (self.home / "adapter").is_dir():  # complete: it appears under its name only then
            return {}
        command = [*qlf_command(), "finetune", self.home / "base", "--data", self.home / "train.jsonl", "--quiet"]
        command += ["-o", self.home / "adapter", "--overwrite", "--rank", "8", "--alpha", "16", "--batch-size", "2"]
        command += ["--grad-accum", "1", "--max-steps", str(self.subject.steps), "--lr", self.subject.rate]
        command += ["--seq-len", str(self.subject.window), "--save-steps", "5"]
        command += ["--resume"] if (self.home / ".adapter.qlf-partial").is_dir() else []
        return {"seconds": round(run_process(command).seconds, 1)}

    def evaluate(self) -> dict[str, float]:
        """Held-out losses of the base and of the live adapter."""
        losses = {}
        for side, more in (("base", []), ("adapter", ["--adapter", str(self.home / "adapter")])):
            part = f"evaluate {side}"
            if part not in self.figures:
                self.figures[part] = self._loss(self.home / "base", *more)
                self._save()
            losses[side] = self.figures[part]
        return losses

    def merge(self, target: Target) -> dict[str, float]:
        """Merge, measure the held-out loss, and remove the merged model again."""
        out = self.home / "merged"
        command = [*qlf_command(), "merge", self.home / "base", "--adapter", self.home / "adapter", "-o", out]
        command += ["--to", target.to, "--quiet", "--overwrite"]
        command += ["--source", fetched(self.name)] if target.source else []
        command += ["--calibration", self.home / "train.txt"] if target.calibration else []
        usage = run_process(command)
        try:
            return {"merged": self._loss(out), "seconds": round(usage.seconds, 1)}
        finally:
            shutil.rmtree(out, ignore_errors=True)

    def _loss(self, model: Path, *more: str) -> float:
        command = [*qlf_command(), "eval", str(model), "--data", str(self.home / "held-out.jsonl"), "--quiet", "--json"]
        command += ["--window", str(self.subject.window), *more]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            raise BenchmarkError(f"qlf eval {model.name}: {done.stderr.strip().splitlines()[-1:]}")
        return float(json.loads(done.stdout)["loss"])

    def show(self) -> dict[str, Any]:
        """Print and return what is kept by each target that is done."""
        if "evaluate" not in self.figures:
            return {}
        base, adapter = (self.figures["evaluate"][side] for side in ("base", "adapter"))
        print(f"{self.name}: held-out loss {base:.4f}, with the adapter {adapter:.4f}")
        found: dict[str, Any] = {"base": round(base, 4), "adapter": round(adapter, 4)}
        for name, target in TARGETS.items():
            if name not in self.figures:
                continue
            merged = self.figures[name]["merged"]
            kept = (base - merged) / (base - adapter)
            told = "" if target.least is None else f"; {goal(f'{target.least:g}', kept >= target.least)}"
            print(f"  {name:16} loss {merged:.4f}, retention {kept:.3f}{told}", flush=True)
            found[name] = {"loss": round(merged, 4), "retention": round(kept, 4)}
        return found


def main() -> int:
    """Measure, print, record; 1 when a command failed."""
    parser = argparse.ArgumentParser(description="Measure what qlf merge keeps of a fine-tune.")
    default = Path(tempfile.gettempdir()) / "qlf-benchmark"
    parser.add_argument("--workdir", type=Path, default=default, help=f"for models and adapters (default {default})")
    parser.add_argument("--models", default=",".join(SUBJECTS), help="of smollm2, stories15m")
    parser.add_argument("--steps", default=",".join(STEPS), help=f"of {', '.join(STEPS)}")
    parser.add_argument("--cleanup", action="store_true", help="remove models and adapters at the end")
    options = parser.parse_args()
    workdir: Path = options.workdir
    try:
        subjects = [Retention(name, workdir) for name in options.models.split(",")]
        for subject in subjects:
            for step in options.steps.split(","):
                subject.run(step)
        figures = {subject.name: subject.show() for subject in subjects}
        if figures.keys() == SUBJECTS.keys() and all(len(found) == len(TARGETS) + 2 for found in figures.values()):
            record("retention", figures)
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        if options.cleanup:
            for name in SUBJECTS:
                shutil.rmtree(workdir / f"retention-{name}", ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
