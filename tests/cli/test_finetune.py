"""`qlf finetune`: what it prints and leaves, and one line for each thing that can be wrong."""

from __future__ import annotations

import importlib.util
import json
import os
import pty
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from qlf import finetune as command

from qlformat import free_memory
from qlformat.finetune import budget, checkpointing, options, recipes
from qlformat.free_memory import FreeMemory
from tests.builders import edit_json
from tests.cli.conftest import Result, Run
from tests.finetune.conftest import chats, tiny_base, tiny_source

__all__ = ["chats", "tiny_base", "tiny_source"]

# One thread: on a busy machine, threads wait for each other longer than these layers take.
FAST = ("--seq-len", 64, "--rank", 4, "--grad-accum", 1, "--no-packing", "--max-steps", 2, "--threads", 1)
Train = Callable[..., Result]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """Give the other tests their threads back."""
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


@pytest.fixture
def train(qlf: Run, tiny_base: Path, chats: Path, tmp_path: Path) -> Train:
    """Run `qlf finetune` with small numbers; what is given comes last and wins."""

    def run(*more: object, base: Path | str = tiny_base, data: Path | str = chats, out: Path | None = None) -> Result:
        return qlf("finetune", base, "--data", data, "-o", out or tmp_path / "out", *FAST, *more)

    return run


@pytest.fixture
def copied(tiny_base: Path, tmp_path: Path) -> Path:
    """A copy of the base, to be broken."""
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


def nothing_left(directory: Path) -> bool:
    return not [path for path in directory.iterdir() if path.name.startswith((".", "out"))]


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello to you, my friend"}]}


def test_a_run_and_what_it_prints(train: Train, tmp_path: Path) -> None:
    result = train("--eval-split", 0.1)
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert lines[0].startswith("  data    36 rows (messages), 36 sequences of up to 64 tokens")
    assert "held    4 rows for evaluation" in lines[1]
    assert f"Wrote {tmp_path / 'out'}" in lines
    text = "\n".join(lines)
    assert "note: on a CPU: float32 compute and plain AdamW (paged 8-bit AdamW needs CUDA)" in text
    assert "8.2 k parameters trained and no others, 0.25 % of the base's 3.2 M" in text
    assert "held    loss 10." in text and "tokens/s" in text
    assert not checkpointing.work_directory(tmp_path / "out").exists()


def test_json_is_one_object(train: Train, tmp_path: Path) -> None:
    found = train("--json").json
    assert found["steps"] == 2 and found["trainable"] == 8192 and found["out"] == str(tmp_path / "out")
    assert found["train_loss"] > 0 and found["eval_loss"] is None


def test_what_was_in_force_is_recorded_and_replays(train: Train, qlf: Run, tmp_path: Path) -> None:
    assert train("--recipe", "guanaco", "--rank", 2, "--warmup", 0.1).code == 0
    out, again = tmp_path / "out", tmp_path / "again"
    saved = options.read_yaml(out / "finetune.yaml")
    assert set(saved) == set(options.NAMES)
    assert (saved["rank"], saved["alpha"], saved["dropout"], saved["warmup"]) == (2, 16, 0.1, 0.1)
    assert (saved["optimizer"], saved["compute_dtype"]) == ("adamw_torch", "float32")  # not "auto"
    sources = json.loads((out / "qlf.json").read_bytes())["options_from"]
    assert sources["rank"] == "command line" and sources["optimizer"] == "auto on a CPU"
    assert sources["alpha"].startswith("recipe guanaco: QLoRA, arXiv 2305.14314")
    assert qlf("finetune", "--config", out / "finetune.yaml", "-o", again).code == 0
    for name in ("adapter_model.safetensors", "adapter_config.json", "finetune.yaml"):
        assert (again / name).read_bytes() == (out / name).read_bytes()


def test_the_manifest_has_everything(train: Train, tiny_base: Path, tmp_path: Path) -> None:
    assert train("--eval-split", 0.1, "--seed", 5).code == 0
    found = json.loads((tmp_path / "out" / "qlf.json").read_bytes())
    assert found["kind"] == "adapter" and found["base_recipe"]["quant_type"] == "nf4"
    assert found["base"]["fingerprint"] == json.loads((tiny_base / "qlf.json").read_bytes())["fingerprint"]
    assert {"repo_id", "revision"} <= set(found["base"])
    assert set(found["options"]) == set(options.NAMES) and found["seeds"] == {"seed": 5}
    assert found["hardware"] == {"device": "cpu", "processes": 1, "sequences_per_update": 1}
    assert all(found["versions"][name] for name in ("qlformat", "torch", "peft", "trl", "transformers", "bitsandbytes"))
    assert found["result"]["eval_loss"] < found["result"]["eval_loss_at_start"]
    for part in ("train", "held_out"):
        assert len(found["data"][part]["rows_sha256"]) == 64
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert len(modes) == 1  # safetensors would keep its file to the owner


def test_the_card_is_valid(train: Train, tmp_path: Path) -> None:
    import huggingface_hub

    assert train().code == 0
    card = huggingface_hub.ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.library_name == "peft" and card.data.pipeline_tag == "text-generation"
    assert card.data.base_model is None  # the Hub takes repositories alone, and this base was made of a directory
    assert str(tmp_path) not in (tmp_path / "out" / "README.md").read_text().partition("## Options")[0]


def test_the_dry_run(train: Train, tmp_path: Path) -> None:
    result = train("--dry-run")
    assert result.code == 0 and result.err == ""
    found = dict(line.split(maxsplit=1) for line in result.out.splitlines() if line[:1].isalpha() and " " in line)
    assert found["data"].startswith("40 rows") and found["format"] == "messages: chat messages (role, content)"
    assert "in 40 sequences of up to 64" in found["tokens"] and "median" in found["lengths"]
    assert "of the rows lose" in found["cut"]
    assert "weights" in found["memory"] and "activations" in found["memory"]
    assert found["free"].endswith("enough")
    assert "  | Count to 1.<|im_end|>" in result.out and ">>1<|im_end|>" in result.out
    assert (tmp_path / "out-lengths.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "out").exists()


def test_the_dry_run_as_json(train: Train) -> None:
    found = train("--dry-run", "--json").json
    assert found["data"]["format"] == "messages" and found["tokenized"]["sequences"] == 40
    assert 0 < found["tokenized"]["truncated_share"] < 1
    memory = found["memory"]
    assert memory["fits"] is True and memory["needed"] == memory["estimate"]["total"]
    trained = "".join(piece["text"] for piece in found["example"] if piece["trained"])
    assert trained.startswith("1<|im_end|>")


def low_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(free_memory, "on_host", lambda: FreeMemory(300_000_000, "this machine"))


def test_too_little_memory_is_said_before_the_load(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlformat.finetune import base

    def loaded(*args: object) -> None:
        raise AssertionError("the base was loaded")

    low_memory(monkeypatch)
    monkeypatch.setattr(base, "load_for_training", loaded)
    result = train("--seq-len", 512, "--batch-size", 16)
    assert result.code == 1
    said = r"found 0\.3 GB of memory left on this machine, needed about \d\.\d GB; try --batch-size \d+ \(0\.[012] GB\)"
    assert re.search(said, result.error)
    assert nothing_left(tmp_path)
    shown = train("--dry-run", "--seq-len", 512, "--batch-size", 16)
    assert shown.code == 1 and "TOO LITTLE" in shown.out and "would do: --" in shown.out


def test_an_architecture_without_an_estimate_is_trained_all_the_same(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlformat.errors import QlfError

    def unknown(config: object) -> None:
        raise QlfError("model type 'x' is not known to the estimate")

    low_memory(monkeypatch)
    monkeypatch.setattr(budget, "describe", unknown)
    result = train("--max-steps", 1)
    assert result.code == 0 and "no memory estimate: model type 'x'" in result.out


# -- bad input -------------------------------------------------------------------------------------------------------


def test_a_16_bit_base(train: Train, tiny_source: Path, tmp_path: Path) -> None:
    error = train(base=tiny_source).error
    assert "found a model of float16, needed a 4-bit base; convert it first: qlf convert" in error
    assert nothing_left(tmp_path)


def test_an_adapter_as_base(train: Train, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "ORG/BASE"}')
    assert "found an adapter, needed a base; its base is 'ORG/BASE'" in train(base=adapter).error
    assert nothing_left(tmp_path)


def test_a_base_that_was_changed(train: Train, copied: Path, tmp_path: Path) -> None:
    shard = copied / "model.safetensors"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    result = train(base=copied)
    assert result.code == 1 and "the weights were changed" in result.error and "qlf verify" in result.error
    assert nothing_left(tmp_path)


def test_no_base_and_no_data(train: Train, qlf: Run, tmp_path: Path) -> None:
    assert "missing" in train(base=tmp_path / "missing").error
    assert "found no data, needed one" in qlf("finetune", "x", "-o", tmp_path / "out").error
    assert "found no file" in train(data=tmp_path / "nothing.jsonl").error
    assert nothing_left(tmp_path)


@pytest.mark.parametrize("text", ["", "\n\n", "[]"])
def test_empty_data(train: Train, tmp_path: Path, text: str) -> None:
    data = tmp_path / "data.json"
    data.write_text(text)
    result = train(data=data)
    assert result.code == 1 and ("is empty" in result.error or "found no rows" in result.error)
    assert "data.json" in result.error
    assert nothing_left(tmp_path)


def test_rows_longer_than_the_context(train: Train, tmp_path: Path) -> None:
    error = train("--seq-len", 4096).error
    assert "seq_len is 4096, the model's context is 512; give --seq-len 512 or less" in error
    assert nothing_left(tmp_path)
    long = {"messages": [CHAT["messages"][0], {"role": "assistant", "content": "word " * 2000}]}
    result = train("--dry-run", "--seq-len", 512, data=write(tmp_path / "long.jsonl", CHAT, long))
    assert result.code == 0
    assert "1 rows (50.0%) are longer than the model's context of 512 tokens and lose their end" in result.out


def test_the_default_length_is_cut_to_the_context(qlf: Run, tiny_base: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "d.jsonl", CHAT, CHAT)
    result = qlf("finetune", tiny_base, "--data", data, "-o", tmp_path / "out", "--dry-run", "--json")
    shown = json.loads(result.out)
    assert (shown["options"]["seq_len"], shown["options_from"]["seq_len"]) == (512, "the model's context")
    assert "sequences have at most 512 tokens, which is the model's context" in shown["notes"]


def test_rows_of_which_nothing_is_left(train: Train, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "word " * 500}, {"role": "assistant", "content": "yes"}]
    error = train(data=write(tmp_path / "d.jsonl", {"messages": messages})).error
    assert "no row has anything to train on within 64 tokens" in error


def test_no_chat_template(train: Train, copied: Path, tmp_path: Path) -> None:
    (copied / "chat_template.jinja").unlink()
    edit_json(copied / "tokenizer_config.json", lambda config: config.pop("chat_template", None))
    result = train(base=copied)
    assert result.code == 1 and "the base's tokenizer has no chat template" in result.error
    assert nothing_left(tmp_path)


def test_unknown_targets(train: Train, tmp_path: Path) -> None:
    error = train("--target", "q_proj,wqkv").error
    assert "found no layer wqkv in the model" in error
    assert "the linear layers are down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in error
    assert nothing_left(tmp_path)


def test_some_targets(train: Train) -> None:
    found = train("--target", "q_proj,v_proj", "--json").json
    assert found["trainable"] == 2 * 4 * ((64 + 64) + (64 + 32))


def test_a_loss_of_nan(train: Train, tmp_path: Path) -> None:
    result = train("--lr", 0.1, "--alpha", "1e20", "--schedule", "constant", "--max-steps", 8, "--save-steps", 1)
    assert result.code == 1
    assert "training stopped, the last good checkpoint is" in result.error and "in step " in result.error
    assert not (tmp_path / "out").exists()
    assert checkpointing.checkpoints(checkpointing.work_directory(tmp_path / "out"))


def test_nothing_is_kept_when_there_is_nothing_to_go_on_from(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlformat.errors import QlfError
    from qlformat.finetune import layers

    def refuse(*args: object) -> None:
        raise QlfError("refused")

    monkeypatch.setattr(layers, "add_lora", refuse)
    assert train().error == "qlf: error: refused"
    assert nothing_left(tmp_path)


def test_a_malformed_row(train: Train, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", CHAT, "{broken", {"messages": 3}, CHAT)
    error = train(data=data).error
    assert "rows.jsonl: line 2: found no valid JSON" in error and "--skip-bad-rows" in error
    assert nothing_left(tmp_path)
    result = train("--skip-bad-rows", "--json", data=data)
    assert result.code == 0, result.err
    assert any(
        "2 malformed rows were skipped; the first: rows.jsonl, line 2: found no" in n for n in result.json["notes"]
    )
    recorded = json.loads((tmp_path / "out" / "qlf.json").read_bytes())["data"]["train"]
    assert (recorded["rows"], recorded["skipped_rows"]) == (2, 2)


def test_unknown_columns(train: Train, tmp_path: Path) -> None:
    error = train(data=write(tmp_path / "rows.jsonl", {"question": "a", "answer": "b"})).error
    assert "question, answer" in error and "prompt + completion" in error and "line 1" in error


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rnak: 8", "found no option 'rnak'; did you mean rank?"),
        ("rank: eight", "rank is 'eight', needed a whole number"),
        ("rank: 0", "rank is 0, needed 1 or more"),
        ("packing: 3", "packing is 3, needed true or false"),
        ("dropout: 1.5", "dropout is 1.5, needed 0 or more and less than 1"),
        ("recipe: best", "recipe is 'best', needed one of qlora, guanaco"),
        ("- rank", "needed options, one 'name: value' on a line"),
        ("a: b: c", "not valid YAML"),
    ],
)
def test_a_bad_config(qlf: Run, tmp_path: Path, text: str, expected: str) -> None:
    config = tmp_path / "options.yaml"
    config.write_text(text)
    result = qlf("finetune", "base", "--data", "data", "-o", tmp_path / "out", "--config", config)
    assert result.code == 1 and expected in result.error
    assert nothing_left(tmp_path)


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--config", "gone.yaml"], "gone.yaml: No such file or directory; give a YAML file of options"),
        (["--init", "loftq"], "give --source"),
        (["--eval-data", "a", "--eval-split", "0.1"], "found eval_data and eval_split, needed one of them"),
        (["--eval-split", "1"], "eval_split is 1.0, needed 0 or more and less than 1"),
        (["--lr", "0"], "lr is 0.0, needed a positive number up to 1000"),
        (["--lr", "nan"], "lr is nan, needed a positive number up to 1000"),
        (["--optimizer", "adamw_torhc"], "optimizer is 'adamw_torhc', did you mean adamw_torch?"),
        (["--optimizer", "paged_adamw_8bit"], "needs CUDA, found a CPU; give --optimizer adamw_torch"),
        (["--report-to", "teletype"], "report_to is 'teletype', needed some of"),
        (["--recipe", "guanaco", "--packing"], "found group_by_length with packing"),
    ],
)
def test_bad_options(train: Train, tmp_path: Path, args: list[str], expected: str) -> None:
    result = train(*args)
    assert result.code == 1 and expected in result.error
    assert nothing_left(tmp_path)


def test_a_logger_that_is_not_installed(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "wandb" else real(name, *rest))
    assert "report_to is 'wandb', which is not installed; pip install wandb" in train("--report-to", "wandb").error


def test_training_libraries_that_are_not_installed(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "trl" else real(name, *rest))
    assert "found no trl; install what training needs: pip install 'qlformat[finetune]'" in train().error


def test_qalora_is_refused_since_peft_ignores_it_on_these_layers(train: Train, tmp_path: Path) -> None:
    """peft 0.21 has it for GPTQ layers alone; on bitsandbytes' it would train plain LoRA without a word."""
    error = train("--qalora").error
    assert "QA-LoRA for GPTQ layers alone, not for 4-bit ones" in error
    assert nothing_left(tmp_path)


def test_the_variants_that_peft_has_for_these_layers(train: Train, tmp_path: Path) -> None:
    assert train("--dora", "--rslora", "--max-steps", 1).code == 0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_bytes())
    assert config["use_dora"] is True and config["use_rslora"] is True


def test_an_existing_out(train: Train, tmp_path: Path) -> None:
    assert train("--max-steps", 1).code == 0
    before = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    error = train().error
    assert "the directory exists and is not empty" in error and "--overwrite" in error
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == before
    assert train("--overwrite", "--seed", 1).code == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() != before


def test_resuming_with_other_options(train: Train, tmp_path: Path) -> None:
    slow = ("--save-steps", 1, "--max-steps", 6)
    assert (
        train(*slow, "--lr", 0.1, "--alpha", "1e20", "--schedule", "constant").code == 1
    )  # ends with a loss of NaN, after a save
    work = checkpointing.work_directory(tmp_path / "out")
    assert checkpointing.checkpoints(work)
    assert "found an interrupted run that was saved at step" in train(*slow).error
    error = train(*slow, "--resume", "--rank", 8).error
    assert "the run to resume has" in error and "--overwrite" in error
    assert train(*slow, "--overwrite").code == 0
    assert not work.exists()


def test_help_is_quick_and_imports_nothing_heavy(child: Run) -> None:
    code = "import sys; from qlf.main import main; main(['finetune', '--help']); print(*sys.modules)"
    result = child("-c", code)
    assert result.code == 0 and "--seq-len N" in result.out
    loaded = {name.partition(".")[0] for name in result.out.splitlines()[-1].split()}
    assert not loaded & {"torch", "transformers", "peft", "trl", "datasets", "numpy", "rich", "matplotlib"}


def test_the_choices_are_those_of_the_library() -> None:
    assert set(command.RECIPES) == set(recipes.RECIPES)
    assert command.SCHEDULES == options.SCHEDULES
    assert command.INITS == options.INITS
    assert command.COMPUTE == options.COMPUTE_DTYPES


def test_the_bar_on_a_terminal(
    tiny_base: Path, chats: Path, tmp_path: Path, child_environment: Callable[..., dict[str, str]]
) -> None:
    """One bar with the step, the loss, tokens a second and the time left; nothing of it stays."""
    words = [str(word) for word in ("-m", "qlf", "finetune", tiny_base, "--data", chats, "-o", tmp_path / "out", *FAST)]
    shown = in_terminal([sys.executable, *words, "--max-steps", "4"], child_environment())
    assert "training" in shown and "2/4" in shown
    assert "loss 10." in shown and "tokens/s" in shown and " left" in shown
    assert shown.rstrip().splitlines()[-1].startswith("Next: ")
    assert "Traceback" not in shown and "Warning" not in shown


def in_terminal(arguments: list[str], environment: dict[str, str]) -> str:
    """What a command writes to a terminal of 100 columns."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(arguments, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    parts = []
    while True:
        try:
            part = os.read(ours, 1 << 16)
        except OSError:  # how Linux says that the other end is closed
            break
        if not part:
            break
        parts.append(part)
    os.close(ours)
    assert process.wait() == 0
    return b"".join(parts).decode()
