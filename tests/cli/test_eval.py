"""`qlf eval`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import qlformat
from tests.cli.conftest import Run


@pytest.fixture(scope="module")
def stories(stories_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stories15M in 4 bits."""
    out = tmp_path_factory.mktemp("eval") / "stories"
    qlformat.convert(stories_dir, out)
    return out


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text("Once upon a time, there was a little girl named Lily. She loved to play outside in the park. " * 3)
    return path


def test_a_text(qlf: Run, stories: Path, text: Path) -> None:
    result = qlf("eval", stories, "--text", text, "--window", 32)
    assert result.code == 0 and result.err == ""
    lines = result.out.splitlines()
    assert lines[0] == str(stories)
    assert [line[2:14].strip() for line in lines[1:]] == [
        "loss", "perplexity", "top-1", "counted", "windows", "computed",
    ]  # fmt: skip
    assert "of up to 32 tokens, stride 16, each begins with BOS" in result.out
    assert "in float32 on cpu" in result.out


def test_json_says_how_it_was_measured(qlf: Run, stories: Path, stories_dir: Path, text: Path) -> None:
    words = ["eval", stories, "--text", text, "--window", 32, "--stride", 8, "--seed", 7, "--max-tokens", 50]
    found = qlf(*words, "--dtype", "bfloat16", "--no-bos", "--against", stories_dir, "--json").json
    facts = {"window": 32, "stride": 8, "seed": 7, "max_tokens": 50, "dtype": "bfloat16", "bos": False, "kind": "text"}
    assert facts.items() <= found.items()
    assert (found["text_tokens"], found["tokens"]) == (50, 49)
    assert found["loss"] > 0 and set(found["versions"]) == {"torch", "transformers"}
    against = found["against"]
    assert against["model"] == str(stories_dir) and against["kl_divergence"] > 0
    assert against["loss_difference"] == pytest.approx(found["loss"] - against["loss"], abs=1e-9)
    assert 0 < against["top1_agreement"] <= 1


def test_against(qlf: Run, stories: Path, stories_dir: Path, text: Path) -> None:
    result = qlf("eval", stories, "--text", text, "--against", stories_dir)
    assert result.code == 0
    assert f"against      {stories_dir}" in result.out
    assert "difference   +0." in result.out and "(worse)" in result.out
    assert "% of the likeliest tokens are the same" in result.out
    same = qlf("eval", stories, "--text", text, "--against", stories).out
    assert "difference   +0.0000 nats a token (equal)" in same and "agreement    100.00 %" in same


def test_data(qlf: Run, stories: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "Once upon", "completion": " a time"}, {"prompt": "The cat", "completion": " sat"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = qlf("eval", stories, "--data", tmp_path / "rows.jsonl", "--json").json
    assert (found["kind"], found["windows"], found["stride"]) == ("data", 2, None)
    assert found["data"]["format"] == "prompt-completion" and 0 < found["tokens"] < found["text_tokens"]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "give one of --text and --data"),
        (["--text", "x", "--data", "y"], "give one of --text and --data"),
        (["--text", ""], "it is empty"),
        (["--data", "x", "--stride", "4"], "belong to --text"),
        (["--data", "x", "--no-bos"], "belong to --text"),
        (["--text", "x", "--against-adapter", "y"], "--against-adapter needs --against"),
        (["--text", "x", "--window", "0"], "0 is not in the range"),
        (["--text", "x", "--dtype", "int8"], "'int8' is not one of"),
    ],
)
def test_wrong_usage(qlf: Run, words: list[str], text: str) -> None:
    result = qlf("eval", "model", *words)
    assert result.code == 2 and text in result.error


def test_bad_input_is_one_line(qlf: Run, stories: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_bytes(b"")
    for words, message in {
        (stories, "--text", tmp_path / "empty.txt"): "found 0 tokens, needed at least 2",
        (stories, "--text", text, "--window", 300): "the model's context is 256",
        (stories, "--text", tmp_path / "missing"): "the text cannot be read",
        (tmp_path / "missing", "--text", text): "found no directory",
    }.items():
        result = qlf("eval", *words)
        assert result.code == 1 and message in result.error and result.out == ""
