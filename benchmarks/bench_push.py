"""`qlf push` and `qlf pull` against `hf upload` and `hf download`: whole processes, in turns, on a local hub.

    python benchmarks/bench_push.py [--workdir DIR] [--shape 1.6b] [--repeats N] [--xet] [--cleanup]

A random 1.6B Llama as a 4-bit checkpoint of 1.0 GB in four shards. Each upload goes to `qlf hub serve` with an empty
directory, started before the clock. `qlf push` verifies every byte of the checkpoint first and compares the hub's
hashes after; `hf upload` does neither. The card is left alone (--no-card), so that both send the same files.

Then, on the same hub: what a second push sends after one shard has changed, and what `qlf inspect` and
`qlf verify --headers` fetch of the repository. 8 GB of disk.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench_convert import random_llama, show, warm
from common import BenchmarkError, Usage, goal, qlf_command, record, run_process, summarize

GOAL_PUSH = 1.05
GOAL_INSPECT = 1_000_000
REPO = "lab/model"
SHARD_SIZE = "260MB"
CHANGED = "model.norm.weight"


@contextlib.contextmanager
def changed_norm(model: Path) -> Iterator[None]:
    """One small tensor of the model is another while the block runs."""
    for path in model.glob("*.safetensors"):
        with path.open("r+b") as file:
            length = int.from_bytes(file.read(8), "little")
            entry = json.loads(file.read(length)).get(CHANGED)
            if entry is None:
                continue
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            file.seek(begin)
            before = file.read(end - begin)
            try:
                file.seek(begin)
                file.write(before[2:] + bytes(2))
                file.flush()
                yield
            finally:
                file.seek(begin)
                file.write(before)
            return
    raise BenchmarkError(f"{model} has no {CHANGED}")


def prepared(workdir: Path, shape: str) -> tuple[Path, Path]:
    """The checkpoint, and the same with one tensor changed, each made on first use."""
    source = random_llama(workdir, shape)
    made = []
    for name, context in (("push", contextlib.nullcontext()), ("push-changed", changed_norm(source))):
        out = workdir / f"{name}-{shape}"
        if not (out / "qlf.json").is_file():
            with context:
                run_process([*qlf_command(), "convert", source, out, "--shard-size", SHARD_SIZE, "-q", "--overwrite"])
        made.append(out)
    return made[0], made[1]


class Hub:
    """`qlf hub serve` on a directory of its own."""

    def __init__(self, root: Path, xet: bool) -> None:
        self.root = root
        shutil.rmtree(root, ignore_errors=True)
        command = [*qlf_command(), "hub", "serve", "--root", str(root), "--port", "0"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line.startswith("Serving "):
            raise BenchmarkError("the hub did not start")
        self._environment = {
            "HF_ENDPOINT": line.split()[1],
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "0" if xet else "1",
            "HF_HOME": str(root / "client"),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }

    def timed(self, *command: str | Path) -> Usage:
        """A client's run, measured."""
        return run_process(["env", *(f"{key}={value}" for key, value in self._environment.items()), *command])

    def said(self, *command: str | Path) -> dict[str, Any]:
        """What a `qlf` command answers to --json."""
        words = [*qlf_command(), *map(str, command), "--json"]
        done = subprocess.run(
            words, env={**os.environ, **self._environment}, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise BenchmarkError(done.stderr.strip())
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def stored(self) -> int:
        """Bytes on the hub's disk, the client's own directory aside."""
        client = self.root / "client"
        files = (path for path in self.root.rglob("*") if path.is_file() and not path.is_relative_to(client))
        return sum(path.stat().st_size for path in files)

    def close(self) -> None:
        """End the hub and remove its directory."""
        self._process.send_signal(signal.SIGINT)
        self._process.wait()
        shutil.rmtree(self.root, ignore_errors=True)


def hf() -> str:
    """The `hf` command of this Python."""
    return str(Path(sys.executable).with_name("hf"))


def transfers(model: Path, workdir: Path, repeats: int, xet: bool) -> dict[str, list[Usage]]:
    """Uploads and downloads by both clients, in turns, each upload to an empty hub."""
    out = workdir / "push-out"
    ways: dict[str, tuple[Callable[[], list[str | Path]], Callable[[], list[str | Path]]]] = {
        "qlf": (
            lambda: [*qlf_command(), "push", model, REPO, "--no-card", "-q"],
            lambda: [*qlf_command(), "pull", REPO, out, "-q"],
        ),
        "hf": (lambda: [hf(), "upload", REPO, model], lambda: [hf(), "download", REPO, "--local-dir", out]),
    }
    runs: dict[str, list[Usage]] = {f"{who}, {what}": [] for what in ("upload", "download") for who in ways}
    for repeat in range(repeats):
        # They take turns in coming first.
        for who, (upload, download) in list(ways.items())[:: 1 if repeat % 2 else -1]:
            hub = Hub(workdir / "push-hub", xet)
            try:
                runs[f"{who}, upload"].append(hub.timed(*upload()))
                shutil.rmtree(out, ignore_errors=True)
                runs[f"{who}, download"].append(hub.timed(*download()))
            finally:
                hub.close()
                shutil.rmtree(out, ignore_errors=True)
    return runs


def amounts(model: Path, changed: Path, workdir: Path, xet: bool) -> dict[str, int]:
    """Bytes that a second push sends, and that the commands which read headers fetch."""
    hub = Hub(workdir / "push-hub", xet)
    try:
        first = hub.said("push", model, REPO, "--no-card")
        before = hub.stored()
        second = hub.said("push", changed, REPO, "--no-card")
        return {
            "checkpoint": sum(file["size"] for file in first["files"]),
            "second push, of files that changed": second["bytes_to_send"],
            "second push, new on the hub's disk": hub.stored() - before,
            "qlf inspect fetched": hub.said("inspect", REPO)["fetched_bytes"],
            "qlf verify --headers fetched": hub.said("verify", REPO, "--headers")["fetched_bytes"],
        }
    finally:
        hub.close()


def measure(workdir: Path, shape: str, repeats: int, xet: bool) -> dict[str, Any]:
    """Everything; prints and returns the figures."""
    model, changed = prepared(workdir, shape)
    warm(model)
    found = {name: summarize(usages) for name, usages in transfers(model, workdir, repeats, xet).items()}
    figures: dict[str, Any] = {name: summary.as_json() for name, summary in found.items()}
    for name, summary in found.items():
        show(name, summary)
    for what in ("upload", "download"):
        ratio = found[f"qlf, {what}"].seconds / found[f"hf, {what}"].seconds
        figures[f"ratio of times, {what}"] = round(ratio, 3)
        reached = f"; {goal(f'at most {GOAL_PUSH:g}', ratio <= GOAL_PUSH)}" if what == "upload" else ""
        print(f"  {what}: {ratio:.2f} of the time of hf{reached}")
    sizes = amounts(model, changed, workdir, xet)
    for name, size in sizes.items():
        print(f"  {name}: {size / 1e6:.2f} MB")
    fetched = sizes["qlf inspect fetched"]
    print(f"  qlf inspect: {goal('under 1 MB', fetched < GOAL_INSPECT)}")
    return {**figures, "sent by": "xet" if xet else "LFS", "bytes": sizes}


def main() -> int:
    """Measure, print, record; 1 when a command failed."""
    parser = argparse.ArgumentParser(description="Measure qlf push against hf upload on a local hub.")
    default = Path(tempfile.gettempdir()) / "qlf-benchmark"
    parser.add_argument("--workdir", type=Path, default=default, help=f"for the models (default {default})")
    parser.add_argument("--shape", default="1.6b", help="of make_random_llama.py; only 1.6b is recorded")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--xet", action="store_true", help="send by xet instead of LFS")
    parser.add_argument("--cleanup", action="store_true", help="remove the models at the end")
    options = parser.parse_args()
    workdir: Path = options.workdir
    workdir.mkdir(parents=True, exist_ok=True)
    try:
        figures = measure(workdir, options.shape, options.repeats, options.xet)
        if options.shape == "1.6b":
            record("push-xet" if options.xet else "push", figures)
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        if options.cleanup:
            for name in (f"push-{options.shape}", f"push-changed-{options.shape}", f"random-llama-{options.shape}"):
                shutil.rmtree(workdir / name, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
