"""Training: what trains, what is left, the same bytes again, and after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import qlformat
from qlformat.errors import QlfError
from qlformat.finetune import checkpointing, metrics, sft
from qlformat.finetune.trainer import FinetuneReport, finetune, prepare

ROOT = Path(__file__).resolve().parents[2]
ADAPTER = "adapter_model.safetensors"


def options(base: Path, data: Path, **more: Any) -> dict[str, Any]:
    return {"base": str(base), "data": str(data), "seq_len": 128, "grad_accum": 2, "rank": 4, "max_steps": 6,
            "save_steps": 2, "packing": False, **more}  # fmt: skip


def train(base: Path, data: Path, out: Path, *, resume: bool = False, **more: Any) -> FinetuneReport:
    return finetune(prepare(options(base, data, **more)), out, resume=resume)


@pytest.fixture(scope="module")
def trained(tiny_base: Path, chats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "adapter"
    train(tiny_base, chats, out, eval_split=0.1, eval_steps=4)
    return out


def test_exactly_these_files_are_left(trained: Path) -> None:
    assert {path.name for path in trained.iterdir()} == {
        "README.md", "adapter_config.json", ADAPTER, "finetune.yaml", "loss.png", "metrics.jsonl", "qlf.json",
    }  # fmt: skip
    assert not checkpointing.work_directory(trained).exists()


def test_plain_peft_loads_the_adapter_without_qlformat(trained: Path, tiny_base: Path) -> None:
    script = f"""
import sys; sys.modules["qlformat"] = None
import peft, transformers
base = transformers.AutoModelForCausalLM.from_pretrained({str(tiny_base)!r})
model = peft.PeftModel.from_pretrained(base, {str(trained)!r})
print(sum(p.abs().sum().item() for n, p in model.named_parameters() if "lora_B" in n) > 0)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_the_manifest_pins_the_base_and_says_how_it_was_made(trained: Path, tiny_base: Path) -> None:
    found = json.loads((trained / "qlf.json").read_bytes())
    base = json.loads((tiny_base / "qlf.json").read_bytes())
    assert found["kind"] == "adapter" and found["base"]["fingerprint"] == base["fingerprint"]
    assert found["base_recipe"] == base["recipe"]
    assert found["options"]["rank"] == 4 and found["options"]["seed"] == 0
    assert len(found["data"]["train"]["files"][0]["sha256"]) == 64
    assert found["versions"]["trl"] and found["result"]["eval_loss"] > 0
    assert qlformat.load_model(tiny_base, adapter=trained).qlf_notes == ()


def test_metrics_and_curves(trained: Path) -> None:
    lines = metrics.read(trained / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 4, 6]
    assert (trained / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_tensorboard_shows_the_same_losses(tiny_base: Path, chats: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "watched"
    train(tiny_base, chats, out, report_to=("tensorboard",))
    (events,) = {path.parent for path in (out / "runs").rglob("events.out.tfevents.*")}
    found = EventAccumulator(str(events))
    found.Reload()
    lines = [line for line in metrics.read(out / "metrics.jsonl") if "loss" in line]
    assert [scalar.step for scalar in found.Scalars("train/loss")] == [line["step"] for line in lines]
    assert [scalar.value for scalar in found.Scalars("train/loss")] == pytest.approx([line["loss"] for line in lines])


def test_what_was_in_force_replays_the_run(trained: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    finetune(prepare({}, trained / "finetune.yaml"), again)
    for name in (ADAPTER, "adapter_config.json", "qlf.json", "finetune.yaml"):
        left, right = (trained / name).read_bytes(), (again / name).read_bytes()
        if name == "qlf.json":  # "config file" instead of "command line"
            left, right = ({**json.loads(b), "options_from": 0} for b in (left, right))  # type: ignore[assignment]
        assert left == right, name


def test_another_seed_gives_another_adapter(trained: Path, tiny_base: Path, chats: Path, tmp_path: Path) -> None:
    train(tiny_base, chats, tmp_path / "other", eval_split=0.1, seed=1)
    assert (tmp_path / "other" / ADAPTER).read_bytes() != (trained / ADAPTER).read_bytes()


def start(base: Path, data: Path, out: Path) -> subprocess.Popen[bytes]:
    given = options(base, data, max_steps=60, save_steps=5)
    words = [f"--{name.replace('_', '-')}={value}" for name, value in given.items() if name not in ("base", "packing")]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "cli"), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-m", "qlf", "finetune", str(base), "-o", str(out), "--no-packing", *words],
        env={**os.environ, "PYTHONPATH": paths}, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["kill", "interrupt"])
def test_a_run_that_was_cut_off_ends_with_the_same_bytes(
    tiny_base: Path, chats: Path, tmp_path: Path, number: signal.Signals
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "cut"
    train(tiny_base, chats, whole, max_steps=60, save_steps=5)
    process = start(tiny_base, chats, out)
    work = checkpointing.work_directory(out)
    deadline = time.monotonic() + 120
    while not checkpointing.checkpoints(work) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    errors = process.communicate()[1].decode()
    assert process.returncode == (130 if number == signal.SIGINT else -9), errors
    assert not out.exists() and 5 <= checkpointing.checkpoints(work)[-1][0] < 60
    if number == signal.SIGINT:
        assert "--resume to go on" in errors
    with pytest.raises(QlfError, match="--resume"):
        train(tiny_base, chats, out, max_steps=60, save_steps=5)
    train(tiny_base, chats, out, max_steps=60, save_steps=5, resume=True)
    assert (out / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes()
    steps = [line["step"] for line in metrics.read(out / "metrics.jsonl")]
    assert steps == list(range(1, 61))


def test_resuming_with_other_options_is_refused(tiny_base: Path, chats: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(checkpointing.Interrupted):
        stop_after(tiny_base, chats, out, 7)
    with pytest.raises(QlfError, match="rank is 8, the run to resume has 4"):
        train(tiny_base, chats, out, rank=8, resume=True)


def stop_after(base: Path, data: Path, out: Path, asked: int) -> None:
    """Stop at the `asked`-th time that the run asks whether to."""
    left = iter([False] * asked)
    finetune(prepare(options(base, data)), out, should_stop=lambda: next(left, True))


def test_stopping_in_the_middle_of_a_step_changes_nothing(tiny_base: Path, chats: Path, tmp_path: Path) -> None:
    train(tiny_base, chats, tmp_path / "whole")
    for asked in (2, 3, 4, 5):  # between two passes of an update, and after an update
        out = tmp_path / f"stopped{asked}"
        with pytest.raises(checkpointing.Interrupted) as stopped:
            stop_after(tiny_base, chats, out, asked)
        assert stopped.value.step == checkpointing.checkpoints(checkpointing.work_directory(out))[-1][0]
        train(tiny_base, chats, out, resume=True)
        assert (out / ADAPTER).read_bytes() == (tmp_path / "whole" / ADAPTER).read_bytes()


def test_a_loss_of_nan_stops_before_the_update(
    tiny_base: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trl import SFTTrainer

    real, calls = SFTTrainer.compute_loss, iter(range(1000))

    def sick(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = real(self, *args, **kwargs)
        return loss * float("nan") if next(calls) == 7 else loss

    monkeypatch.setattr(SFTTrainer, "compute_loss", sick)
    out = tmp_path / "out"
    with pytest.raises(QlfError, match=r"the loss is nan in step 4; .*checkpoint-2"):
        train(tiny_base, chats, out)
    assert [step for step, _ in checkpointing.checkpoints(checkpointing.work_directory(out))] == [2]
    monkeypatch.undo()
    train(tiny_base, chats, tmp_path / "whole")
    train(tiny_base, chats, out, resume=True)
    assert (out / ADAPTER).read_bytes() == (tmp_path / "whole" / ADAPTER).read_bytes()


def test_a_full_disk_leaves_the_last_checkpoint_whole(
    tiny_base: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = transformers.Trainer._save_optimizer_and_scheduler, iter(range(100))

    def full(self: Any, output_dir: str) -> None:
        if next(calls) == 1:
            raise OSError(28, "No space left on device", output_dir)
        real(self, output_dir)

    monkeypatch.setattr(transformers.Trainer, "_save_optimizer_and_scheduler", full)
    out = tmp_path / "out"
    with pytest.raises(QlfError, match=r"disk is full.*checkpoint of step 2 is whole"):
        train(tiny_base, chats, out)
    work = checkpointing.work_directory(out)
    assert [step for step, _ in checkpointing.checkpoints(work)] == [2]
    assert not (work / checkpointing.PARTIAL).exists()
    train(tiny_base, chats, out, resume=True)
    assert (out / ADAPTER).is_file()


def test_only_lora_parameters_train(tiny_base: Path) -> None:
    from qlformat.finetune import layers
    from qlformat.finetune.options import make

    model: Any = qlformat.load_model(tiny_base, device_map="cpu", dtype="float32")
    model.requires_grad_(False)
    tuned = layers.add_lora(model, make({"base": "b", "data": "d", "rank": 4}), "b")
    found = layers.trainable(tuned)
    # r (d + k) for each of the 7 linear layers of each of the 2 blocks (paper: LoRA on all linear layers)
    block = sum(4 * (d + k) for d, k in [(64, 64), (64, 32), (64, 32), (64, 64), (64, 128), (64, 128), (128, 64)])
    assert found.params == 2 * block and found.layers == 14
    tuned.get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(QlfError, match="embed_tokens"):
        layers.trainable(tuned)


def test_the_adapter_stays_float32(trained: Path) -> None:
    from safetensors.torch import load_file

    state = load_file(trained / ADAPTER)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    a = next(tensor for name, tensor in state.items() if "lora_A" in name)
    assert not torch.equal(a, a.bfloat16().float())


def test_packed_rows_do_not_see_each_other(tiny_base: Path, chats: Path, tmp_path: Path) -> None:
    """The first loss with packing is that of the rows one by one: the same tokens, the same contexts."""
    whole = {"dropout": 0.0, "max_steps": 1, "epochs": 1.0}
    train(tiny_base, chats, tmp_path / "packed", packing=True, grad_accum=1000, **whole)
    train(tiny_base, chats, tmp_path / "single", packing=False, grad_accum=1000, **whole)
    packed, single = (metrics.read(tmp_path / name / "metrics.jsonl")[0] for name in ("packed", "single"))
    assert packed["loss"] == pytest.approx(single["loss"], abs=1e-5)
    assert packed["grad_norm"] == pytest.approx(single["grad_norm"], rel=1e-3)


def test_the_first_loss_is_that_of_a_plain_forward_pass(tiny_base: Path, chats: Path, tmp_path: Path) -> None:
    from qlformat.finetune.dataset import load_rows, tokenize

    train(tiny_base, chats, tmp_path / "out", dropout=0.0, max_steps=1, grad_accum=1000)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_base)
    data, _ = tokenize(load_rows(chats), tokenizer, 128, packing=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    for module in model.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype, module.compute_type_is_set = torch.float32, True
    total, count = 0.0, 0
    for row in data:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        with torch.no_grad():
            logits = model(ids).logits[0, :-1].double()
        total += torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
        count += int((labels != -100).sum())
    assert metrics.read(tmp_path / "out" / "metrics.jsonl")[0]["loss"] == pytest.approx(total / count, abs=1e-4)


def test_fast_dropout_drops_as_many_as_it_should_and_the_same_again() -> None:
    from qlformat.finetune.layers import _fast_dropout

    dropout = _fast_dropout()(0.1)
    x = torch.ones(1000, 1001, requires_grad=True)
    torch.manual_seed(3)
    y = dropout(x)
    torch.manual_seed(3)
    assert torch.equal(y, dropout(x))
    assert not torch.equal(y, dropout(x))
    zeros = (y == 0).double().mean().item()
    assert zeros == pytest.approx(0.1, abs=5 * (0.09 / x.numel()) ** 0.5 + 2**-16)
    assert y.max().item() == pytest.approx(1 / 0.9, rel=1e-4)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
    assert dropout.eval()(x) is x


def test_loftq_begins_nearer_to_the_source(tiny_base: Path, tiny_source: Path, chats: Path, tmp_path: Path) -> None:
    from qlformat.finetune import initialization, layers
    from qlformat.finetune.options import make

    model: Any = qlformat.load_model(tiny_base, device_map="cpu", dtype="float32")
    given = {"base": "b", "data": "d", "rank": 8, "init": "loftq", "source": str(tiny_source), "rslora": True}
    tuned = layers.add_lora(model, make(given), "b")
    share = initialization.loftq(tuned, tiny_base, str(tiny_source))
    source = transformers.AutoModelForCausalLM.from_pretrained(tiny_source, dtype=torch.float32)
    before = after = 0.0
    with qlformat.open(tiny_base) as checkpoint:
        for name, module in tuned.named_modules():
            if isinstance(module, peft.tuners.lora.LoraLayer):
                plain = name.removeprefix("base_model.model.")
                error = source.get_submodule(plain).weight.detach() - torch.from_numpy(
                    checkpoint.dequantize(f"{plain}.weight", "float32")
                )
                left = error - module.get_delta_weight("default")
                best = torch.linalg.svdvals(error.double())[8:].square().sum().item()
                assert left.square().sum().item() == pytest.approx(best, rel=1e-3)
                before, after = before + error.square().sum().item(), after + left.square().sum().item()
    assert share == pytest.approx(1 - after / before, rel=1e-3) and share > 0.2


def test_trl_has_the_switch_that_scores_trained_tokens_alone() -> None:
    from trl.trainer import utils

    sft.trainer_class()
    assert utils._use_triton(torch.device("cpu")) is True
