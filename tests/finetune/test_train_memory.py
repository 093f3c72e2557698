"""The estimate against the peak of a real run: how memory grows with the length of the sequences."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qlformat.training_memory import finetune_memory

ROOT = Path(__file__).resolve().parents[2]

PEAKS = """
import ctypes, sys
from pathlib import Path
libc = ctypes.CDLL(None)
libc.mallopt(-3, 1 << 20)  # as the command does: freed blocks go back to the system
libc.mallopt(-8, 1)
from qlformat.finetune.trainer import finetune, prepare

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

for seq_len in (64, 128, 512):  # the first run fills caches and loads libraries
    given = {"base": sys.argv[1], "data": sys.argv[2], "seq_len": seq_len, "batch_size": 2, "grad_accum": 1, "rank": 4,
             "max_steps": 2, "save_steps": 9}
    prepared = prepare(given)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    finetune(prepared, Path(sys.argv[3]) / str(seq_len))
    print(seq_len, status("VmHWM"))
"""


@pytest.mark.slow
def test_peaks_grow_as_estimated(tiny_base: Path, tmp_path: Path) -> None:
    data = tmp_path / "text.jsonl"  # text trains every token: the output layer computes the trained ones alone
    data.write_text("".join(json.dumps({"text": " ".join(map(str, range(n, n + 300)))}) + "\n" for n in range(12)))
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PEAKS, str(tiny_base), str(data), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    peaks = {int(a): int(b) for a, b in (line.split() for line in done.stdout.splitlines() if line[:1].isdigit())}
    config = json.loads((tiny_base / "config.json").read_bytes())
    options = {"rank": 4, "batch_size": 2, "optimizer": "adamw_torch"}
    few, many = (
        finetune_memory(config, seq_len=length, compute_bytes=4, plain_bytes=4, on_cpu=True, **options).total
        for length in (128, 512)
    )
    assert peaks[512] - peaks[128] == pytest.approx(many - few, rel=0.2)
