"""Several processes for real, on a CPU with gloo: data parallel, cut off and resumed, and FSDP2 over the 4-bit base."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import qlformat
from qlformat.errors import QlfError
from qlformat.finetune import checkpointing, metrics, processes
from qlformat.finetune.trainer import finetune, prepare

ROOT = Path(__file__).resolve().parents[2]
ADAPTER = "adapter_model.safetensors"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d",
            "--rdzv-endpoint=localhost:0"]  # fmt: skip
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2",
              "--main_process_port=0", "--mixed_precision=no", "--dynamo_backend=no", "--num_machines=1"]  # fmt: skip
OPTIONS = {"seq_len": 128, "rank": 4, "max_steps": 8, "save_steps": 2, "packing": False, "grad_accum": 2}


def start(launcher: list[str], base: Path, data: Path, out: Path, *words: str, **env: str) -> subprocess.Popen[str]:
    given = [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items() if name != "packing"]
    program = [] if launcher[-1].endswith(".py") else ["-m", "qlf"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "cli"), os.environ.get("PYTHONPATH", "")])
    command = [
        *launcher,
        *program,
        "finetune",
        str(base),
        "--data",
        str(data),
        "-o",
        str(out),
        "--no-packing",
        "--quiet",
    ]
    return subprocess.Popen(
        [*command, *given, *words],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **env}, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> tuple[int, str, list[str]]:
    """(exit code, stdout, the lines of qlf on stderr)."""
    try:
        out, err = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, out, [line for line in err.splitlines() if line.startswith(("qlf: ", "sharded "))]


def wait_for_checkpoint(process: subprocess.Popen[str], out: Path, least: int) -> Path:
    work = checkpointing.work_directory(out)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        found = checkpointing.checkpoints(work)
        if found and found[-1][0] >= least:
            return found[-1][1]
        time.sleep(0.01)
    raise AssertionError(process.communicate())


def workers(launcher: int) -> list[int]:
    """Processes that the launcher started, by their rank."""
    found: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if int((path / "stat").read_text().rpartition(")")[2].split()[1]) == launcher:
                rank = re.search(rb"(?:^|\0)RANK=(\d+)", (path / "environ").read_bytes())
                if rank:
                    found[int(rank[1])] = int(path.name)
        except OSError:
            continue
    return [found[rank] for rank in sorted(found)]


@pytest.fixture(scope="module")
def whole(tiny_base: Path, chats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes that nothing disturbed, by accelerate launch."""
    out = tmp_path_factory.mktemp("processes") / "whole"
    code, printed, said = finish(start(ACCELERATE, tiny_base, chats, out))
    assert code == 0, said
    assert printed.count("Wrote ") == printed.count("tokens/s") == 1  # of one process alone
    assert not [line for line in said if "error" in line]
    return out


@pytest.mark.slow
def test_the_first_loss_is_that_of_one_process(tiny_base: Path, chats: Path, whole: Path, tmp_path: Path) -> None:
    """Dropout draws in each process its own numbers, so it is left out."""
    code, _, said = finish(start(TORCHRUN, tiny_base, chats, tmp_path / "two", "--dropout=0", "--max-steps=2"))
    assert code == 0, said
    given = {**OPTIONS, "base": str(tiny_base), "data": str(chats), "dropout": 0.0, "max_steps": 2, "grad_accum": 4}
    finetune(prepare(given), tmp_path / "one")
    one, two = (metrics.read(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert one[0]["loss"] == pytest.approx(two[0]["loss"], abs=1e-4)
    assert one[0]["grad_norm"] == pytest.approx(two[0]["grad_norm"], rel=1e-3)
    assert one[1]["loss"] == pytest.approx(two[1]["loss"], abs=1e-3)
    assert {path.name for path in whole.iterdir()} == {path.name for path in (tmp_path / "one").iterdir()}


@pytest.mark.slow
def test_cut_off_twice_and_resumed_it_ends_with_the_same_bytes(
    tiny_base: Path, chats: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "cut"
    process = start(TORCHRUN, tiny_base, chats, out)
    wait_for_checkpoint(process, out, 2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the launcher and all processes
    code, _, said = finish(process)
    assert code != 0 and not out.exists()
    assert said[0] == "qlf: stopping after this pass" and len(said) == 2, said
    assert re.fullmatch(r"qlf: interrupted; saved at step \d; run the same command with --resume to go on", said[1])

    given = {**OPTIONS, "base": str(tiny_base), "data": str(chats)}
    with pytest.raises(QlfError, match="found 1 processes, the run to resume has 2; start as many"):
        finetune(prepare(given), out, resume=True)

    saved = checkpointing.checkpoints(checkpointing.work_directory(out))[-1][0]
    process = start(TORCHRUN, tiny_base, chats, out, "--resume")
    wait_for_checkpoint(process, out, saved + 1)
    os.kill(workers(process.pid)[1], signal.SIGKILL)
    code, _, said = finish(process)
    assert code != 0 and not out.exists()
    assert said in (
        [],
        ["qlf: error: another process of the run is gone (killed, or out of memory?); go on with --resume"],
    )

    code, _, said = finish(start(TORCHRUN, tiny_base, chats, out, "--resume"))
    assert code == 0, said
    assert (out / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes()
    assert [line["step"] for line in metrics.read(out / "metrics.jsonl")] == list(range(1, 9))


@pytest.mark.slow
def test_an_error_is_said_once_and_ends_all(tiny_base: Path, chats: Path, whole: Path) -> None:
    before = (whole / ADAPTER).read_bytes()
    began = time.monotonic()
    code, _, said = finish(start(TORCHRUN, tiny_base, chats, whole))
    assert code != 0 and time.monotonic() - began < 120
    assert len(said) == 1 and "the directory exists and is not empty" in said[0], said
    assert (whole / ADAPTER).read_bytes() == before
    assert not checkpointing.work_directory(whole).exists()


FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer"}  # fmt: skip


@pytest.mark.slow
def test_fsdp2_shards_the_base_and_trains_like_one_process(tiny_base: Path, chats: Path, tmp_path: Path) -> None:
    launcher = [*TORCHRUN, str(ROOT / "tests" / "finetune" / "fsdp_on_cpu.py")]
    words = ["--dropout=0", "--compute-dtype=bfloat16", "--max-steps=3"]
    code, _, said = finish(start(launcher, tiny_base, chats, tmp_path / "two", *words, **FSDP))
    assert code == 0, said
    shards = [line.split() for line in said if line.startswith("sharded")]
    assert [line[1:4] for line in shards] == [["14", "of", "14:"]] * 2
    assert all(int(line[4]) * 2 == int(line[6]) for line in shards)
    given = {**OPTIONS, "base": str(tiny_base), "data": str(chats), "dropout": 0.0, "max_steps": 3, "grad_accum": 4}
    finetune(prepare({**given, "compute_dtype": "bfloat16"}), tmp_path / "one")
    one, two = (metrics.read(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert two[0]["loss"] == pytest.approx(one[0]["loss"], abs=2e-3)  # bfloat16: FSDP rounds LoRA's weights, too
    left, right = (load_file(tmp_path / name / ADAPTER) for name in ("one", "two"))
    assert {name: t.shape for name, t in left.items()} == {name: t.shape for name, t in right.items()}
    assert max(float((left[name] - right[name]).abs().max()) for name in left) < 2e-3
    assert any(float(t.abs().max()) > 0 for name, t in right.items() if "lora_B" in name)
    qlformat.load_model(tiny_base, adapter=tmp_path / "two")


def test_what_fsdp_would_destroy_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    assert processes.storage(torch.bfloat16) == "uint8"
    for name, value in FSDP.items():
        monkeypatch.setenv(name, value)
    assert processes.storage(torch.bfloat16) == "bfloat16" and processes.storage(torch.float32) == "float32"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(QlfError, match="mixed precision bf16 with compute_dtype float32"):
        processes.storage(torch.float32)
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(QlfError, match="found FSDP version 1, needed 2"):
        processes.storage(torch.bfloat16)


def test_an_evaluation_never_packs_the_base_anew(tiny_base: Path) -> None:
    import torch
    from bitsandbytes.nn.modules import Linear4bit

    from qlformat.finetune import base

    model: Any = base.load_for_training(base.open_base(str(tiny_base)), torch.device("cpu"), torch.float32)
    assert not any(m.support_avx512bf16_for_cpu for m in model.modules() if isinstance(m, Linear4bit))
