"""docs/loading.md: every block is run, in its order, and prints what its comments say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import qlformat

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "loading.md").read_text(encoding="utf-8")
SECTIONS = {part.partition("\n")[0]: part for part in TEXT.split("\n## ")[1:]}
# Sections that are for projects which have never heard of qlformat.
FOREIGN = {"Plain transformers", "peft", "bitsandbytes by hand", "vLLM"}
# Where nothing of torch may be imported.
WITHOUT_TORCH = {"NumPy, without torch"}


def blocks(section: str, language: str = "python") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", SECTIONS[section], re.MULTILINE | re.DOTALL)


def promised(code: str) -> list[str]:
    """What the comments say that is printed."""
    return re.findall(r"# -> (.+)$", code, re.MULTILINE)


def assert_in_order(needed: list[str], found: str) -> None:
    position = 0
    for text in needed:
        assert text in found[position:], f"{text!r} is not in {found[position:]!r}"
        position = found.index(text, position) + len(text)


@pytest.fixture(scope="module")
def workplace(smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the checkpoint that the text talks about; sections leave their files here."""
    directory = tmp_path_factory.mktemp("docs")
    qlformat.convert(smollm2_dir, directory / "smol-nf4")
    return directory


def run(code: str, directory: Path, *, foreign: bool = False, python: str = sys.executable) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if foreign:
        code = f"import sys; sys.modules['qlformat'] = None\n{code}"
    else:
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "cli")])
    (directory / "block.py").write_text(code, encoding="utf-8")
    done = subprocess.run(
        [python, "block.py"], cwd=directory, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_section_is_tested() -> None:
    special = {"vLLM", "On a GPU", "From the shell"}
    assert {name for name in SECTIONS if blocks(name)} == {*PLAIN, *special} - {"From the shell"}
    assert set(SECTIONS) == {*PLAIN, *special}
    assert set(SECTIONS) >= FOREIGN | WITHOUT_TORCH


def test_the_table_links_to_every_section() -> None:
    anchors = {re.sub(r"[^\w -]", "", name).lower().replace(" ", "-") for name in SECTIONS}
    linked = set(re.findall(r"\]\(#([^)]+)\)", TEXT))
    assert linked <= anchors
    assert anchors - linked == {"on-a-gpu"}


PLAIN = [name for name in SECTIONS if name not in ("vLLM", "On a GPU", "From the shell")]


@pytest.mark.parametrize("section", PLAIN)
def test_section(workplace: Path, section: str) -> None:
    if "my-adapter" in SECTIONS[section] and section != "peft" and not (workplace / "my-adapter").exists():
        run(blocks("peft")[0], workplace, foreign=True)  # this test alone was asked for
    for code in blocks(section):
        needed = promised(code)
        assert needed or section == "peft"
        if section in WITHOUT_TORCH:
            code += "\nimport sys\nassert 'torch' not in sys.modules\n"
        assert_in_order(needed, run(code, workplace, foreign=section in FOREIGN))


def test_vllm(workplace: Path) -> None:
    (code,) = blocks("vLLM")
    compile(code, "vLLM", "exec")
    python = os.environ.get("QLF_VLLM_PYTHON")
    if not python:
        pytest.skip("set QLF_VLLM_PYTHON to a Python with vLLM; tests/interop/test_other_loaders.py tests its rules")
    assert_in_order(promised(code), run(code, workplace, foreign=True, python=python))


def test_a_gpu(workplace: Path) -> None:
    import torch

    (code,) = blocks("On a GPU")
    if torch.cuda.is_available():
        run(code, workplace)
        return
    calls = [line.partition("#")[0].strip() for line in code.splitlines() if "(" in line]
    assert len(calls) == 2
    for call in calls:
        found = run(
            f"import qlformat\ntry:\n    {call}\nexcept qlformat.QlfError as error:\n    print(error)\n", workplace
        )
        assert "was asked for, found" in found and found.count("\n") == 1


def test_the_shell(workplace: Path) -> None:
    if not (workplace / "my-adapter").exists():
        run(blocks("peft")[0], workplace, foreign=True)
    (code,) = blocks("From the shell", "sh")
    for line in code.splitlines():
        script = line.replace("qlf ", f"'{sys.executable}' -m qlf ", 1)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "cli")])}
        done = subprocess.run(
            ["sh", "-c", script], cwd=workplace, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert_in_order(promised(line), done.stdout)
