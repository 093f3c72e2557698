"""docs/evaluation.md: every block is run, in its order, and prints what its comments say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import qlformat

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
QLF = f"""set -e
qlf() {{ '{sys.executable}' -m qlf "$@"; }}
"""


@pytest.fixture(scope="module")
def workplace(stories_dir: Path, texts_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the models and the text that the blocks talk about."""
    directory = tmp_path_factory.mktemp("docs")
    (directory / "stories15M").symlink_to(stories_dir)
    qlformat.convert(stories_dir, directory / "stories-nf4")
    (directory / "story.txt").write_bytes((texts_dir / "tiny.utf8").read_bytes()[:1000])
    return directory


def execute(language: str, code: str, directory: Path) -> str:
    """What a block prints."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT}/cli"}
    command = [sys.executable, "-c", code] if language == "python" else ["sh", "-c", QLF + code]
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_block(workplace: Path, number: int) -> None:
    language, code = BLOCKS[number]
    assert language in ("sh", "python")
    found = execute(language, code, workplace)
    promised = [text for line in re.findall(r" # -> (.+)$", code, re.MULTILINE) for text in line.split(" # -> ")]
    assert promised
    position = 0
    for text in promised:
        assert text in found[position:], f"{text!r} is not in {found[position:]!r}"
        position = found.index(text, position) + len(text)
    if "--picture" in code:
        assert (workplace / "layers.png").read_bytes().startswith(b"\x89PNG")
