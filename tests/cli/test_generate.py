"""`qlf generate`."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from qlf import generate as command
from transformers import AutoModelForCausalLM, AutoTokenizer

import qlformat
from qlformat import generator
from qlformat.generator import Generator, Sampling
from qlformat.layout import Recipe
from tests.cli.conftest import Run

QUESTION = "What is the capital of France?"


@pytest.fixture(scope="module")
def smol(smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 in 4 bits, with a chat template."""
    out = tmp_path_factory.mktemp("generate") / "smol"
    qlformat.convert(smollm2_dir, out)
    return out


@pytest.fixture(scope="module")
def stories(stories_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stories15M in 4 bits, without a chat template."""
    out = tmp_path_factory.mktemp("generate") / "stories"
    qlformat.convert(stories_dir, out, recipe=Recipe(compute_dtype="float32"))
    return out


def write_stdin(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))


def test_an_answer(qlf: Run, smol: Path) -> None:
    result = qlf("generate", smol, "--prompt", QUESTION, "--max-new-tokens", 12)
    assert result.code == 0
    assert "Paris" in result.out and result.out.endswith("\n")
    assert "12 tokens, " in result.err and " tokens/s, the first after " in result.err
    assert "cut at --max-new-tokens (load " in result.err and "; cpu, float16)" in result.err


def test_json_and_the_same_text_as_transformers(qlf: Run, smol: Path, tmp_path: Path) -> None:
    result = qlf("generate", smol, "--prompt", QUESTION, "--system", "Be brief.", "--max-new-tokens", 10, "--json")
    assert result.code == 0 and result.err == ""
    qlformat.export(smol, tmp_path / "plain", dtype="float16")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path / "plain"), AutoTokenizer.from_pretrained(smol)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    count = inputs["input_ids"].shape[1]
    tokens = model.generate(**inputs, max_new_tokens=10, do_sample=False)[0, count:]
    found = result.json
    assert found["text"] == tokenizer.decode(tokens, skip_special_tokens=True)
    assert (found["prompt_tokens"], found["new_tokens"], found["finish"]) == (count, 10, "length")
    assert (found["device"], found["dtype"], found["four_bit"], found["notes"]) == ("cpu", "float16", False, [])
    assert found["tokens_per_second"] > 0 and found["first_token_seconds"] > 0 and found["load_seconds"] > 0


def test_four_bits_on_the_cpu(qlf: Run, stories: Path) -> None:
    words = ["--prompt", "Once upon a time", "--raw", "--max-new-tokens", 8, "--json"]
    packed = qlf("generate", stories, *words, "--keep-4bit").json
    model, tokenizer = AutoModelForCausalLM.from_pretrained(stories), AutoTokenizer.from_pretrained(stories)
    inputs = tokenizer("Once upon a time", return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert packed["text"] == tokenizer.decode(tokens, skip_special_tokens=True)
    assert (packed["four_bit"], packed["dtype"]) == (True, "float32")
    dense = qlf("generate", stories, *words).json
    assert dense["four_bit"] is False and dense["text"] == packed["text"]


def test_four_bits_compute_in_one_dtype(smol: Path) -> None:
    loaded = Generator(smol, keep_4bit=True)
    assert loaded.model.dtype == torch.bfloat16  # what the layers compute in; the model itself is float16
    loaded = Generator(smol, keep_4bit=True, dtype="float32")
    assert loaded.model.dtype == torch.float32
    assert loaded.model.model.layers[0].mlp.up_proj.compute_dtype == torch.float32


def test_text_comes_piece_by_piece(stories: Path) -> None:
    pieces: list[str] = []
    answer = Generator(stories).answer("Once upon a time", sampling=Sampling(24), on_text=pieces.append)
    assert len(pieces) > 5
    assert "".join(pieces) == answer.text


def test_sampling_follows_the_seed(qlf: Run, stories: Path) -> None:
    def text(*more: object) -> str:
        words = ["--prompt", "Once upon a time", "--max-new-tokens", 12, "--json"]
        return str(qlf("generate", stories, *words, *more).json["text"])

    warm = ["--temperature", 1.5]
    assert text(*warm, "--seed", 1) == text(*warm, "--seed", 1)
    assert text(*warm, "--seed", 1) != text(*warm, "--seed", 2)
    # So little probability is left that one token makes it up: greedy.
    assert text(*warm, "--top-p", 1e-6) == text()


def test_the_prompt_from_stdin(qlf: Run, stories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--max-new-tokens", 3, "--json"]
    write_stdin(monkeypatch, b"Once upon a time")
    piped = qlf("generate", stories, "--prompt", "-", *words).json
    given = qlf("generate", stories, "--prompt", "Once upon a time", *words).json
    assert piped["text"] == given["text"] and piped["prompt_tokens"] == given["prompt_tokens"]


@pytest.mark.parametrize(
    ("data", "text"),
    [(b"\xff\xfe", "stdin is not UTF-8"), (b" \n", "the prompt is empty"), (b"", "the prompt is empty")],
)
def test_stdin_that_is_no_prompt(
    qlf: Run, stories: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, text: str
) -> None:
    write_stdin(monkeypatch, data)
    result = qlf("generate", stories, "--prompt", "-")
    assert result.code == 2 and text in result.error and result.out == ""


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--prompt", ""], "the prompt is empty"),
        ([], "missing option '--prompt'"),
        (["--prompt", "x", "--raw", "--system", "y"], "--system needs the chat template"),
        (["--prompt", "x", "--temperature", "-1"], "-1.0 is not in the range"),
        (["--prompt", "x", "--top-p", "0"], "0.0 is not in the range"),
        (["--prompt", "x", "--max-new-tokens", "0"], "0 is not in the range"),
        (["--prompt", "x", "--dtype", "int8"], "'int8' is not one of"),
    ],
)
def test_wrong_usage(qlf: Run, stories: Path, words: list[str], text: str) -> None:
    result = qlf("generate", stories, *words)
    assert result.code == 2 and text in result.error


def test_no_template_for_a_system_message(qlf: Run, stories: Path) -> None:
    result = qlf("generate", stories, "--prompt", "x", "--system", "y")
    assert result.code == 1 and "no chat template" in result.error


def test_what_cannot_be_loaded(qlf: Run, stories: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(stories, tmp_path / "copy", ignore=shutil.ignore_patterns("tokenizer*", "special*"))
    assert "found no tokenizer that loads" in qlf("generate", copy, "--prompt", "x").error
    assert "found no directory" in qlf("generate", tmp_path / "nothing", "--prompt", "x").error
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    assert "found an adapter, needed a base" in qlf("generate", tmp_path / "adapter", "--prompt", "x").error
    assert "found a file" in qlf("generate", stories / "model.safetensors", "--prompt", "x").error
    result = qlf("generate", stories, "--prompt", "x", "--device", "cuda:99")
    assert result.code == 1 and "device 'cuda:99' was asked for" in result.error


def test_an_adapter(qlf: Run, stories: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(stories)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    words = ["--prompt", "Once upon a time", "--max-new-tokens", 6]
    result = qlf("generate", stories, "--adapter", tmp_path / "adapter", *words, "--json")
    plain = qlf("generate", stories, *words, "--json").json
    assert result.json["text"] != plain["text"]
    assert result.json["notes"] == ["the adapter adapter is not pinned to a base; only names and shapes were compared"]
    assert "note: the adapter adapter is not" in qlf("generate", stories, "--adapter", tmp_path / "adapter", *words).err
    pin: dict[str, Any] = {"format_version": 1, "kind": "adapter", "must_understand": [], "writer": "x"}
    pin["base"] = {"repo_id": None, "revision": None, "fingerprint": "0" * 64}
    (tmp_path / "adapter" / "qlf.json").write_text(json.dumps(pin))
    result = qlf("generate", stories, "--adapter", tmp_path / "adapter", *words)
    assert result.code == 1 and "belongs to the base with fingerprint 0000" in result.error


def test_too_little_memory_keeps_four_bits(stories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generator, "_available_memory", lambda: 1000)
    loaded = Generator(stories)
    assert loaded.four_bit
    assert loaded.notes[0].startswith("kept in 4 bits, which is slow on a CPU: dequantized it needs 0.1 GB")


def test_the_context_ends(stories: Path) -> None:
    loaded = Generator(stories)
    loaded.model.config.max_position_embeddings = 10
    answer = loaded.answer("Once upon a time", sampling=Sampling(50))
    assert answer.prompt_tokens + answer.new_tokens == 10
    assert answer.notes == (f"stops after {answer.new_tokens} tokens, where the context of 10 ends",)
    with pytest.raises(qlformat.QlfError, match="the model's context 10; shorten the prompt"):
        loaded.answer("Once upon a time there was a little girl named Lily who")


def test_threads(qlf: Run, stories: Path) -> None:
    before = torch.get_num_threads()
    try:
        assert qlf("generate", stories, "--prompt", "x", "--max-new-tokens", 1, "--threads", 1).code == 0
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_control_characters_do_not_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    command._show("tab\tline\nbell\x07 esc\x1b[31m c1\x9b é\u3000\u200d")
    assert capsys.readouterr().out == "tab\tline\nbell\\x07 esc\\x1b[31m c1\\x9b é\u3000\u200d"
