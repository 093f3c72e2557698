"""docs/finetuning.md: every block is run, in its order, and prints what its comments say."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qlformat.finetune import options, recipes
from tests.finetune.conftest import tiny_base, tiny_source

__all__ = ["tiny_base", "tiny_source"]

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "finetuning.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
FOREIGN = "from peft import"
"""Begins the block that is for projects which have never heard of qlformat."""
QLF = f"""set -e
qlf() {{ '{sys.executable}' -m qlf "$@"; }}
"""


@pytest.fixture(scope="module")
def workplace(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a small model under the name that the text uses; the blocks leave their files here."""
    directory = tmp_path_factory.mktemp("docs")
    shutil.copytree(tiny_base, directory / "smol-nf4")
    return directory


def execute(language: str, code: str, directory: Path) -> str:
    """What a block prints."""
    foreign = code.startswith(FOREIGN)
    if foreign:
        code = f"import sys; sys.modules['qlformat'] = None\n{code}"
    # The layers are so small that threads would only wait for each other.
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": "" if foreign else f"{ROOT}{os.pathsep}{ROOT}/cli",
    }
    command = [sys.executable, "-c", code] if language == "python" else ["sh", "-c", QLF + code]
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def assert_in_order(needed: list[str], found: str) -> None:
    position = 0
    for text in needed:
        assert text in found[position:], f"{text!r} is not in {found[position:]!r}"
        position = found.index(text, position) + len(text)


def promised(code: str) -> list[str]:
    """What the comments say that is printed."""
    lines = re.findall(r"  # -> (.+)$", code, re.MULTILINE)
    return [text for line in lines for text in line.split(" # -> ")]


@pytest.mark.slow
def test_every_block(workplace: Path) -> None:
    assert {language for language, _ in BLOCKS} == {"sh", "python", "yaml"}
    for language, code in BLOCKS:
        if language == "yaml":
            (workplace / "run.yaml").write_text(code)
            continue
        needed = promised(code)
        assert needed or "chats.jsonl <<" in code
        assert_in_order(needed, execute(language, code, workplace))


def test_the_recipe_in_the_table_is_that_of_the_library() -> None:
    rows = dict(re.findall(r"^\| ([a-z0-9, ]+) \| ([^|]+) \|", TEXT.partition("| 7B, 13B |")[2], re.MULTILINE))
    small, large = (
        {name: s.value for name, s in recipes.RECIPES["guanaco"](n).items()} for n in (7 * 10**9, 65 * 10**9)
    )
    assert rows["rank, alpha"] == f"{small['rank']}, {small['alpha']}"
    assert f"| dropout | {small['dropout']} | {large['dropout']} |" in TEXT
    assert rows["learning rate, schedule"] == f"2e-4, {small['schedule']}" and small["lr"] == 2e-4
    assert large["lr"] == 1e-4 and "| 1e-4, constant |" in TEXT
    batch = small["batch_size"] * small["grad_accum"]
    assert rows["batch, updates, tokens"] == f"{batch}, {small['max_steps']:,}, {small['seq_len']}"
    assert rows["beta2, gradient norm"] == f"{small['beta2']}, {small['grad_norm']}"


def test_the_options_that_the_text_names_are_there() -> None:
    from qlf.finetune import command

    flags = {flag for param in command.params for flag in (*param.opts, *param.secondary_opts)}
    words = set(re.findall(r"(?<![\w-])--[a-z][\w-]+", TEXT))
    named = {word for word in words if "_" not in word}  # with _ they are accelerate's
    assert named - {"--gpu", "--nproc-per-node"} <= flags  # of `qlf estimate` and torchrun
    assert {"seq_len", "max_steps", "target"} <= set(options.NAMES)
