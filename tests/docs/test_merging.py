"""docs/merging.md: every block is run, in its order, and prints what its comments say."""

from __future__ import annotations

import importlib
import re
import shutil
from pathlib import Path

import pytest

import qlformat
from qlformat.merge.combining import METHODS
from tests.docs.test_finetuning import assert_in_order, execute, promised
from tests.finetune.conftest import tiny_base, tiny_source
from tests.merge.conftest import save_adapter
from tests.merge.test_retention import TEXT as HELD_OUT
from tests.merge.test_retention import train

__all__ = ["tiny_base", "tiny_source"]

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "merging.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def workplace(tiny_base: Path, tiny_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with small models and adapters under the names that the text uses."""
    directory = tmp_path_factory.mktemp("docs")
    shutil.copytree(tiny_base, directory / "smol-nf4")
    shutil.copytree(tiny_source, directory / "smol-fp16")
    qlformat.export(tiny_base, directory / "exact", dtype="float32")
    train(directory / "exact", directory / "my-adapter")
    save_adapter(directory / "exact", directory / "other-adapter", seed=2)
    (directory / "held-out.txt").write_text(HELD_OUT)
    return directory


def test_every_block(workplace: Path) -> None:
    assert {language for language, _ in BLOCKS} == {"sh", "python"}
    for language, code in BLOCKS:
        needed = promised(code)
        assert needed
        assert_in_order(needed, execute(language, code, workplace))


def test_options_and_methods_are_those_of_the_command() -> None:
    command = importlib.import_module("qlf.merge").command
    flags = {flag for param in command.params for flag in param.opts}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", TEXT)) <= flags
    assert [method for method in METHODS if f"`{method}`" not in TEXT] == []
