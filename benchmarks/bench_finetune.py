"""`qlf finetune` against a plain script (finetune_plain.py): speed, memory, and what is learnt, on the CPU.

    python benchmarks/bench_finetune.py [--workdir DIR] [--updates N] [--cleanup]

SmolLM2-135M-Instruct in NF4 on the first chitchat conversations: rank 16 on all linear layers, rows cut to 512 tokens,
one batch in an update, float32, gradient checkpointing, AdamW, the same schedule. Ours packs rows into 3 sequences of
512 for a batch; the script pads 4 rows, in random order, which hold about as many tokens. So both learn from the same
number of tokens in the same number of updates, or one more. Tokens are those of the rows, prompts included and padding
not; the rate is that of the training loop, without imports and load. The peak is that of the whole process. One process
at a time; the two sides read the same rows, tokenized and masked alike. The held-out loss of both adapters comes from
one plain transformers + peft process. First both train one update on the same 4 rows: their first losses must agree.
Takes 10 minutes on 2 cores.
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

from bench_convert import smollm2, warm
from bench_load_model import four_bit
from common import ROOT, BenchmarkError, goal, qlf_command, record, run_process

SEQ_LEN = 512
BATCH, PACKED_BATCH = 4, 3
TRAIN_ROWS, HELD_OUT_ROWS = 200, 16
GOAL_RATIO, GOAL_WORSE, GOAL_FIRST = 1.3, 0.01, 1e-3
HOME = "finetune-benchmark"

TOKENIZE = """
import json, sys
from pathlib import Path
import transformers
from qlformat.finetune.dataset import load_rows, tokenize
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
for name in sys.argv[3:]:
    data, _ = tokenize(load_rows(name), tokenizer, int(sys.argv[2]), packing=False)
    rows = ({"input_ids": row["input_ids"], "labels": row["labels"]} for row in data)
    Path(name).with_suffix(".tokens").write_text("".join(json.dumps(row) + "\\n" for row in rows))
"""
EVALUATE = """
import json, sys
from pathlib import Path
import peft, torch, transformers
base, data, out, *adapters = sys.argv[1:]
rows = [json.loads(line) for line in Path(data).read_text().splitlines()]
model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, device_map="cpu")
for module in model.modules():
    if hasattr(module, "compute_type_is_set"):
        module.compute_dtype, module.compute_type_is_set = torch.float32, True
def loss():
    total = count = 0
    for row in rows:
        labels = torch.tensor(row["labels"])[1:]
        with torch.no_grad():
            logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
        count += int((labels != -100).sum())
    return total / count
model.train(False)
losses = [loss()]
for number, adapter in enumerate(adapters):
    if number:
        model.load_adapter(adapter, str(number))
        model.set_adapter(str(number))
    else:
        model = peft.PeftModel.from_pretrained(model, adapter, "0")
    losses.append(loss())
Path(out).write_text(json.dumps(losses))
"""


def prepare(workdir: Path, base: Path) -> int:
    """Write the rows of both sides below `workdir`; returns the tokens of the training rows."""
    fetch = [sys.executable, str(ROOT / "tools" / "fetch_models.py"), "chitchat"]
    done = subprocess.run(fetch, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchmarkError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "cannot fetch chitchat")
    chats = Path(done.stdout.splitlines()[-1]) / "chat.jsonl"
    with chats.open(encoding="utf-8") as file:
        lines = [line for line, _ in zip(file, range(TRAIN_ROWS + HELD_OUT_ROWS), strict=False)]
    parts = {"train": lines[:TRAIN_ROWS], "held-out": lines[TRAIN_ROWS:], "batch": lines[:BATCH]}
    for name, part in parts.items():
        (workdir / f"{name}.jsonl").write_text("".join(part), encoding="utf-8")
    run_process([sys.executable, "-c", TOKENIZE, base, str(SEQ_LEN), *(workdir / f"{name}.jsonl" for name in parts)])
    rows = (workdir / "train.tokens").read_text(encoding="utf-8").splitlines()
    return sum(len(json.loads(row)["input_ids"]) for row in rows)


def ours(base: Path, workdir: Path, name: str, updates: int, batch: int, *more: str) -> dict[str, Any]:
    """One `qlf finetune` on the rows `name`: tokens, seconds, losses of the updates, and the peak."""
    out = workdir / f"{name}-qlf"
    command = [*qlf_command(), "finetune", base, "--data", workdir / f"{name}.jsonl", "-o", out, "--quiet"]
    command += ["--overwrite", "--seq-len", str(SEQ_LEN), "--batch-size", str(batch), "--grad-accum", "1"]
    command += ["--max-steps", str(updates), "--save-steps", str(updates), "--compute-dtype", "float32", *more]
    usage = run_process(command)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    logs = [line for line in lines if "loss" in line]
    rate, seconds = logs[-1]["tokens_per_second"], logs[-1]["seconds"]
    return {
        "tokens": round(rate * seconds), "seconds": seconds, "tokens_per_second": rate,
        "losses": [line["loss"] for line in logs], "peak_rss": usage.peak_rss, "process_seconds": usage.seconds,
    }  # fmt: skip


def plain(base: Path, workdir: Path, name: str, updates: int) -> dict[str, Any]:
    """The same by the plain script."""
    out = workdir / f"{name}-plain"
    shutil.rmtree(out, ignore_errors=True)
    script = ROOT / "benchmarks" / "finetune_plain.py"
    data = workdir / f"{name}.tokens"
    usage = run_process([sys.executable, script, base, data, str(SEQ_LEN), str(BATCH), str(updates), out])
    found: dict[str, Any] = json.loads((out / "figures.json").read_text(encoding="utf-8"))
    return {**found, "peak_rss": usage.peak_rss, "process_seconds": usage.seconds}


def held_out(base: Path, workdir: Path) -> list[float]:
    """Loss of the base, of our adapter and of the script's."""
    out = workdir / "held-out.json"
    adapters = [workdir / "train-qlf", workdir / "train-plain"]
    run_process([sys.executable, "-c", EVALUATE, base, workdir / "held-out.tokens", out, *adapters])
    found: list[float] = json.loads(out.read_text(encoding="utf-8"))
    return found


def measure(base: Path, workdir: Path, updates: int) -> dict[str, Any]:
    """Both sides; prints and returns the figures."""
    tokens = prepare(workdir, base)
    warm(base)
    first = [ours(base, workdir, "batch", 1, BATCH, "--no-packing"), plain(base, workdir, "batch", 1)]
    off = abs(first[0]["losses"][0] - first[1]["losses"][0])
    said = " against ".join(f"{side['losses'][0]:.6f}" for side in first)
    print(f"  first loss on one batch: {said}; {goal(f'{GOAL_FIRST} apart', off <= GOAL_FIRST)}", flush=True)
    sides = {"qlf finetune": ours(base, workdir, "train", updates, PACKED_BATCH)}
    same = max(1, round(sides["qlf finetune"]["tokens"] / (tokens / TRAIN_ROWS) / BATCH))
    sides["plain script"] = plain(base, workdir, "train", same)
    losses = held_out(base, workdir)
    for (name, side), loss in zip(sides.items(), losses[1:], strict=True):
        side["held_out_loss"] = loss
        print(
            f"  {name}  {side['tokens_per_second']:6.1f} tokens/s ({side['tokens']} tokens in {len(side['losses'])} "
            f"updates)   peak RSS {side['peak_rss'] / 1e6:.0f} MB   held-out loss {losses[0]:.4f} -> {loss:.4f}"
        )
    our, their = sides.values()
    ratio = our["tokens_per_second"] / their["tokens_per_second"]
    worse = our["held_out_loss"] / their["held_out_loss"] - 1
    print(f"  {ratio:.2f} times as fast; {goal(f'{GOAL_RATIO} times', ratio >= GOAL_RATIO)}")
    print(f"  {goal('peak RSS no higher', our['peak_rss'] <= their['peak_rss'])}")
    print(f"  held-out loss {worse:+.2%}; {goal('no worse than 1 %', worse <= GOAL_WORSE)}")
    return {
        **sides, "ratio": round(ratio, 3), "held_out_loss_before": losses[0], "held_out_worse": round(worse, 5),
        "first_loss": [side["losses"][0] for side in first], "first_loss_apart": off, "gpu": "not measured",
        "seq_len": SEQ_LEN, "batch": BATCH, "packed_batch": PACKED_BATCH,
        "trained_rows": TRAIN_ROWS, "held_out_rows": HELD_OUT_ROWS,
    }  # fmt: skip


def main() -> int:
    """Measure, print, record; 1 when a command failed."""
    parser = argparse.ArgumentParser(description="Measure qlf finetune against a plain script.")
    default = Path(tempfile.gettempdir()) / "qlf-benchmark"
    parser.add_argument("--workdir", type=Path, default=default, help=f"for model and adapters (default {default})")
    parser.add_argument("--updates", type=int, default=8, help="of ours; the script gets as many tokens")
    parser.add_argument("--cleanup", action="store_true", help="remove the model and the adapters at the end")
    options = parser.parse_args()
    workdir: Path = options.workdir / HOME
    workdir.mkdir(parents=True, exist_ok=True)
    try:
        base = four_bit(smollm2(), options.workdir, "smollm2")
        print("SmolLM2-135M-Instruct, NF4 + DQ, float32 on the CPU", flush=True)
        record("finetune", measure(base, workdir, options.updates))
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        if options.cleanup:
            shutil.rmtree(workdir, ignore_errors=True)
            shutil.rmtree(options.workdir / "load-smollm2-nf4", ignore_errors=True)
    print("  on a GPU: not measured")
    return 0


if __name__ == "__main__":
    sys.exit(main())
