"""docs/publishing.md: every block is run, in its order, against a hub of its own, and prints what its comments say."""

from __future__ import annotations

import importlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import qlformat
from tests.docs.test_finetuning import assert_in_order, execute, promised
from tests.finetune.conftest import tiny_base, tiny_source
from tests.local_hub_fixture import LocalHub, serve, write_tokens
from tests.merge.conftest import save_adapter

__all__ = ["tiny_base", "tiny_source"]

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "publishing.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def workplace(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a small base and an adapter under the names that the text uses."""
    directory = tmp_path_factory.mktemp("docs")
    shutil.copytree(tiny_base, directory / "smol-nf4")
    qlformat.export(tiny_base, directory / "exact", dtype="float32")
    save_adapter(directory / "exact", directory / "my-adapter")
    return directory


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """A hub, and the environment of a user of it."""
    with serve(tmp_path / "hub", token_file=write_tokens(tmp_path / "tokens")) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.setenv("HF_TOKEN", running.token)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        monkeypatch.delenv("HF_HUB_OFFLINE")
        yield running


@pytest.mark.slow
def test_every_block(workplace: Path, hub: LocalHub) -> None:
    assert {language for language, _ in BLOCKS} == {"sh", "python"}
    for language, code in BLOCKS:
        needed = promised(code)
        assert needed
        assert_in_order(needed, execute(language, code, workplace))


def test_the_options_that_the_text_names_are_there() -> None:
    commands = [importlib.import_module(f"qlf.{name}").command for name in ("push", "pull", "verify")]
    flags = {flag for command in commands for param in command.params for flag in (*param.opts, *param.secondary_opts)}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", TEXT)) <= flags
