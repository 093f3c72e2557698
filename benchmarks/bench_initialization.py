"""The held-out loss that an adapter begins with: `--init loftq` and `--init pissa` against the default.

    python benchmarks/bench_initialization.py [--workdir DIR] [--rank N] [--rows N] [--cleanup]

Each start is a `qlf finetune` of its own that evaluates before its first update; the 16-bit source is evaluated by
plain transformers on the same tokens. SmolLM2-135M-Instruct on conversations of chitchat-dataset, the loss of the
assistant's turns alone; its source was decoded from a 4-bit GGUF file (Q4_1), in blocks of 32 other than NF4's.
stories15M, which was never quantized before, on stories that it was trained to write, the loss of all tokens.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import ROOT, BenchmarkError, goal, qlf_command, record, run_process

INITS = ("default", "loftq", "pissa")

# The loss as Trainer takes it: the mean over the rows of their mean over tokens.
SOURCE_LOSS = """
import json, sys
import torch, transformers
from qlformat.finetune.dataset import load_rows, tokenize
source, held, seq_len = sys.argv[1:]
tokenizer = transformers.AutoTokenizer.from_pretrained(source)
if tokenizer.pad_token is None:
    tokenizer.pad_token = tokenizer.eos_token
rows, _ = tokenize(load_rows(held), tokenizer, int(seq_len), packing=False)
model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
losses = []
for row in rows:
    with torch.no_grad():
        logits = model(torch.tensor([list(row["input_ids"])])).logits[0, :-1]
    labels = torch.tensor(list(row["labels"])[1:])
    losses.append(torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100).item())
tokens = sum(sum(label != -100 for label in list(row["labels"])[1:]) for row in rows)
print(json.dumps({"loss": sum(losses) / len(losses), "rows": len(rows), "tokens": tokens}))
"""


def fetched(name: str) -> Path:
    """A directory of tools/fetch_models.py."""
    command = [sys.executable, str(ROOT / "tools" / "fetch_models.py"), name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchmarkError((done.stderr.strip().splitlines() or ["fetch_models.py failed"])[-1])
    return Path(done.stdout.splitlines()[-1])


def printed_json(command: list[str]) -> dict[str, Any]:
    """The JSON object that a command prints last; BenchmarkError with its last line when it fails."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchmarkError((done.stderr.strip().splitlines() or [f"{command[0]} failed"])[-1])
    text = done.stdout[done.stdout.index("{") :]
    found: dict[str, Any] = json.loads(text)
    return found


def conversations(workdir: Path, rows: int) -> tuple[Path, Path]:
    """(training, held-out) conversations: the last `rows` are held out."""
    lines = (fetched("chitchat") / "chat.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    return written(workdir / "chats", lines[:8], lines[-rows:])


def stories(workdir: Path, rows: int) -> tuple[Path, Path]:
    """(training, held-out) stories: the first `rows` are held out."""
    text = (fetched("texts") / "tiny.utf8").read_text(encoding="utf-8")
    lines = [json.dumps({"text": story.strip()}) + "\n" for story in text.split("<|endoftext|>") if story.strip()]
    return written(workdir / "stories", lines[-8:], lines[:rows])


def written(path: Path, train: list[str], held: list[str]) -> tuple[Path, Path]:
    """Write both parts beside each other."""
    files = path.with_suffix(".train.jsonl"), path.with_suffix(".held.jsonl")
    for file, lines in zip(files, (train, held), strict=True):
        file.write_text("".join(lines), encoding="utf-8")
    return files


def start(base: Path, source: Path, data: tuple[Path, Path], seq_len: int, rank: int, init: str) -> dict[str, Any]:
    """The loss before the first update, what the command says about the start, and its seconds."""
    out = base.with_name(f"{base.name}-{init}")
    words = ["--init", init, "--rank", str(rank), "--alpha", str(2 * rank), "--seq-len", str(seq_len), "--no-packing"]
    words += ["--eval-data", str(data[1]), "--max-steps", "1", "--grad-accum", "1", "--overwrite", "--json"]
    words += [] if init == "default" else ["--source", str(source)]
    began = time.perf_counter()
    report = printed_json([*qlf_command(), "finetune", str(base), "--data", str(data[0]), "-o", str(out), *words])
    seconds = time.perf_counter() - began
    shutil.rmtree(out)
    note = next((note for note in report["notes"] if note.startswith(("LoftQ", "PiSSA"))), "")
    return {"loss": report["eval_start"], "note": note, "seconds": round(seconds, 1)}


def measure(title: str, source: Path, data: tuple[Path, Path], seq_len: int, rank: int, workdir: Path) -> Any:
    """All starts of one model; prints and returns the figures."""
    base = workdir / f"initialization-{source.name}-nf4"
    run_process([*qlf_command(), "convert", source, base, "--quiet", "--overwrite"])
    top = printed_json([sys.executable, "-c", SOURCE_LOSS, str(source), str(data[1]), str(seq_len)])
    print(f"{title}, rank {rank}: {top['rows']} rows, {top['tokens']} tokens scored")
    print(f"  16-bit source {top['loss']:.4f}", flush=True)
    figures: dict[str, Any] = {"source": top, "rank": rank}
    for init in INITS:
        found = figures[init] = start(base, source, data, seq_len, rank, init)
        print(f"  {init:13} {found['loss']:.4f}   {found['seconds']} s in all   {found['note']}", flush=True)
    plain = figures["default"]["loss"]
    for init in INITS[1:]:
        share = (plain - figures[init]["loss"]) / (plain - top["loss"])
        figures[init]["share_of_loss"] = round(share, 4)
        below = goal("below the default's", figures[init]["loss"] < plain)
        print(f"  {init}: {share:.1%} of the loss that quantization added; {below}")
    return figures


def main() -> int:
    """Measure, print, record; 1 when a command failed."""
    parser = argparse.ArgumentParser(description="Measure the loss that an adapter begins with.")
    default = Path(tempfile.gettempdir()) / "qlf-benchmark"
    parser.add_argument("--workdir", type=Path, default=default, help=f"for the models (default {default})")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rows", type=int, default=48, help="held-out rows")
    parser.add_argument("--cleanup", action="store_true", help="remove the models at the end")
    options = parser.parse_args()
    workdir: Path = options.workdir
    workdir.mkdir(parents=True, exist_ok=True)
    try:
        figures = {}
        for title, name, texts, seq_len in (
            ("stories15M", "stories15m", stories, 256),
            ("SmolLM2-135M-Instruct", "smollm2", conversations, 512),
        ):
            data = texts(workdir, options.rows)
            figures[title] = measure(title, fetched(name), data, seq_len, options.rank, workdir)
        record("initialization", figures)
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        if options.cleanup:
            for path in workdir.glob("initialization-*-nf4"):
                shutil.rmtree(path, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
