"""The demo: a real model becomes a verified 4-bit checkpoint, learns from conversations, and is published.

`make demo` runs it.

Every step is a command that a user would type; each is printed before it runs.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "build" / "demo"
CHECKPOINT = OUT / "SmolLM2-135M-Instruct-nf4"
PICTURE = OUT / "quantization-error.png"
ADAPTER = OUT / "chitchat-adapter"
CHATS, HELD_OUT = OUT / "chats.jsonl", OUT / "held-out.jsonl"
TRAINED_ON, HELD = 400, 8
"""Conversations: many more than the updates read, and as many as an evaluation reads in seconds."""
HUB, ELSEWHERE = OUT / "hub", OUT / "elsewhere"
QUESTION = "Hi! What did you do this weekend?"
LIMITS = ("--max-new-tokens", "40", "--temperature", "0.7", "--top-p", "0.9", "--seed", "1")
QLF = Path(sys.executable).with_name("qlf")


class StepError(RuntimeError):
    """A step of the demo failed; what it printed is already on the screen."""


def shown(word: str | Path) -> str:
    """A word of a command as a person in the repository's root would type it."""
    if isinstance(word, str):
        return shlex.quote(word)
    path = word
    if path.is_relative_to(ROOT):
        return shlex.quote(str(path.relative_to(ROOT)))
    home = Path.home()
    return f"~/{shlex.quote(str(path.relative_to(home)))}" if path.is_relative_to(home) else shlex.quote(str(path))


def step(title: str, program: str, *args: str | Path) -> None:
    """Print a step's title and its command line, and run it in the repository's root."""
    print(f"\n{title}\n$" if title else "$", program, *map(shown, args), flush=True)
    command = [str(QLF)] if program == "qlf" else [sys.executable]
    words = [arg.relative_to(ROOT) if isinstance(arg, Path) and arg.is_relative_to(ROOT) else arg for arg in args]
    if subprocess.run([*command, *map(str, words)], check=False, cwd=ROOT).returncode:
        raise StepError(title)


def fetch(name: str) -> Path:
    """A model or data set of tools/fetch_models.py, fetched on first use."""
    command = [sys.executable, str(ROOT / "tools" / "fetch_models.py"), name]
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            lines.append(line.rstrip())
            if line.startswith(("fetching", "building", " ")):
                print(line, end="", flush=True)
    if process.returncode:
        raise StepError(f"fetching {name}")
    return Path(lines[-1])


def share_out(chats: Path) -> None:
    """Put the first conversations into one file, to train on, and the last into another, never trained on."""
    lines = chats.read_text(encoding="utf-8").splitlines(keepends=True)
    CHATS.write_text("".join(lines[:TRAINED_ON]), encoding="utf-8")
    HELD_OUT.write_text("".join(lines[-HELD:]), encoding="utf-8")


def learn() -> None:
    """Fine-tune on conversations of people, and ask the same question without and with what was learnt."""
    share_out(fetch("chitchat") / "chat.jsonl")
    step("5. Fine-tune it: a LoRA adapter on the 4-bit weights, from conversations of people", "qlf", "finetune",
         CHECKPOINT, "--data", CHATS, "--eval-data", HELD_OUT, "-o", ADAPTER, "--max-steps", "24", "--eval-steps", "6",
         "--save-steps", "24", "--seq-len", "512", "--grad-accum", "1", "--lr", "5e-4", "--overwrite")  # fmt: skip
    ask = ("--prompt", QUESTION, *LIMITS)
    step("6. Ask the base, then the base with its adapter", "qlf", "generate", CHECKPOINT, *ask)
    step("", "qlf", "generate", CHECKPOINT, "--adapter", ADAPTER, *ask)


@contextlib.contextmanager
def hub() -> Iterator[None]:
    """A hub of our own, empty, to which all commands talk while the block runs."""
    shutil.rmtree(HUB, ignore_errors=True)
    print("\n7. Publish both, on a hub of your own\n$ qlf hub serve --root", shown(HUB), "--port 0 &", flush=True)
    command = [str(QLF), "hub", "serve", "--root", str(HUB), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            line = server.stdout.readline() if server.stdout else ""
            if not line.startswith("Serving "):
                raise StepError("starting the hub")
            print(line, end="")
            url = line.split()[1]
            print(f"$ export HF_ENDPOINT={url}", flush=True)
            # A home of its own: the user's token is not for this hub, and nothing of it belongs in the user's cache.
            os.environ |= {"HF_ENDPOINT": url, "HF_HOME": str(HUB / "client"), "HF_HUB_OFFLINE": "0"}
            os.environ.pop("HF_TOKEN", None)
            yield
        finally:
            server.send_signal(signal.SIGINT)


def publish() -> None:
    """Push the base and the adapter to a hub, fetch them elsewhere, and ask again."""
    shutil.rmtree(ELSEWHERE, ignore_errors=True)
    base, adapter = f"demo/{CHECKPOINT.name}", f"demo/{ADAPTER.name}"
    with hub():
        step("", "qlf", "push", CHECKPOINT, base, "--license", "apache-2.0", "--tag", "v1")
        step("", "qlf", "card", ADAPTER, "--base", base, "--license", "apache-2.0")  # pinned to where the base is now
        step("", "qlf", "push", ADAPTER, adapter, "--license", "apache-2.0")
        step("8. Look at the base from elsewhere, fetch both, and ask again", "qlf", "verify", base, "--headers")
        step("", "qlf", "adapters", base)
        step("", "qlf", "pull", base, ELSEWHERE / "base", "--revision", "v1")
        step("", "qlf", "pull", adapter, ELSEWHERE / "adapter")
        step("", "qlf", "generate", ELSEWHERE / "base", "--adapter", ELSEWHERE / "adapter", "--prompt", QUESTION,
             *LIMITS)  # fmt: skip


def held_out_losses() -> tuple[float, float]:
    """The held-out loss before and after the fine-tuning, from the adapter's qlf.json."""
    result = json.loads((ADAPTER / "qlf.json").read_bytes())["result"]
    return result["eval_loss_at_start"], result["eval_loss"]


def inspect() -> dict[str, Any]:
    """What `qlf inspect --json` says about the checkpoint."""
    command = [str(QLF), "inspect", str(CHECKPOINT), "--json"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    summary: dict[str, Any] = json.loads(done.stdout)
    return summary


def draw() -> None:
    """Draw the quantization error of every layer, as the model card has it."""
    from qlformat import manifest  # not before main has found the installation
    from qlformat.cards import picture

    weights = manifest.parse((CHECKPOINT / manifest.FILE_NAME).read_bytes()).weights
    title = "SmolLM2-135M-Instruct in NF4 + double quantization, every layer"
    picture.draw(picture.errors_by_kind(weights), title, PICTURE)


def main() -> int:
    """Run the demo; 1 when a step failed."""
    print("qlformat demo: a float16 model becomes an NF4 checkpoint, is fine-tuned and published", flush=True)
    if not QLF.is_file():
        print(f"error: {QLF} is not there; run `make demo`, which installs it", file=sys.stderr)
        return 1
    OUT.mkdir(parents=True, exist_ok=True)
    try:
        source = fetch("smollm2")
        step("1. Convert", "qlf", "convert", source, CHECKPOINT, "--overwrite")
        step("2. Look at it: reads headers only", "qlf", "inspect", CHECKPOINT)
        step("3. Verify it, and quantize the source again to compare every byte", "qlf", "verify", CHECKPOINT,
             "--source", source)  # fmt: skip
        step("4. Use it: plain transformers, in a process that never imports qlformat", "python",
             ROOT / "tools" / "demo_plain_transformers.py", CHECKPOINT)  # fmt: skip
        learn()
        publish()
    except StepError as error:
        print(f"error: the demo stopped at: {error}", file=sys.stderr)
        return 1
    begin, end = held_out_losses()
    summary = inspect()
    before = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    draw()
    print("\nResult")
    print(f"  weights   {before / 1e6:.1f} MB -> {summary['stored_bytes'] / 1e6:.1f} MB")
    print(f"  4 bit     {summary['bits_per_weight']:.3f} bits per quantized weight")
    print(f"  picture   {shown(PICTURE)}: the quantization error of every layer")
    print(f"  held out  loss {begin:.3f} -> {end:.3f} nats a token, on conversations that were not trained on")
    print(f"  picture   {shown(ADAPTER / 'loss.png')}: the loss while it was trained")
    print(f"  published {shown(HUB)}: `qlf hub serve --root {shown(HUB)}` shows cards and lineage in a browser")
    if end >= begin:
        print("error: the held-out loss did not fall", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
