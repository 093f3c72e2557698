"""docs/cards.md: every block is run, in its order, against a hub of its own, and prints what its comments say."""

from __future__ import annotations

import importlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import qlformat
from qlformat.adapter import AdapterManifest, BasePin, file_entries
from tests.docs.test_finetuning import assert_in_order, execute, promised
from tests.finetune.conftest import tiny_base, tiny_source
from tests.hub.published import fingerprint, make_base
from tests.local_hub_fixture import LocalHub, serve, write_tokens
from tests.merge.conftest import save_adapter

__all__ = ["tiny_base", "tiny_source"]

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "cards.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


@pytest.fixture
def workplace(tiny_base: Path, tmp_path: Path) -> Path:
    """A base, another one, and a pinned adapter, under the names that the text uses."""
    directory = tmp_path / "docs"
    shutil.copytree(tiny_base, directory / "smol-nf4")
    make_base(directory / "other-nf4")
    qlformat.export(tiny_base, directory / "exact", dtype="float32")
    made = save_adapter(directory / "exact", directory / "my-adapter")
    pin = BasePin(fingerprint(tiny_base))
    (made / "qlf.json").write_bytes(AdapterManifest("qlformat tests", pin, files=file_entries(made)).to_json())
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
    assert {language for language, _ in BLOCKS} == {"sh"}
    for language, code in BLOCKS:
        assert_in_order(promised(code), execute(language, code, workplace))


def test_the_options_that_the_text_names_are_there() -> None:
    commands = [importlib.import_module(f"qlf.{name}").command for name in ("adapters", "card", "verify")]
    flags = {flag for command in commands for param in command.params for flag in param.opts}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", TEXT)) <= flags
