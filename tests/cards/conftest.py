"""Real things that cards are written for: a base, an adapter that was trained on it, merged models."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from qlformat.finetune.trainer import finetune, prepare
from qlformat.merge.merger import merge
from qlformat.merge.options import AdapterSpec, MergeOptions
from tests.finetune.conftest import chats, tiny_base, tiny_source

__all__ = ["chats", "tiny_base", "tiny_source"]

Copy = Callable[[Path], Path]


@pytest.fixture(scope="session")
def trained(tiny_base: Path, chats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of `qlf finetune`."""
    out = tmp_path_factory.mktemp("trained") / "tiny-counts"
    given = {"base": str(tiny_base), "data": str(chats), "seq_len": 128, "grad_accum": 2, "rank": 4, "max_steps": 4,
             "save_steps": 4, "packing": False, "eval_split": 0.1, "eval_steps": 2}  # fmt: skip
    finetune(prepare(given), out)
    return out


@pytest.fixture(scope="session")
def merged(tiny_base: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The adapter in the weights of its base, in 16 and in 4 bits."""
    root = tmp_path_factory.mktemp("merged")
    for to in ("bfloat16", "nf4"):
        merge(tiny_base, [AdapterSpec(trained)], root / f"tiny-{to}", MergeOptions(to))
    return {to: root / f"tiny-{to}" for to in ("bfloat16", "nf4")}


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    """A copy of a directory, under its name, to write a card into."""

    def make(directory: Path) -> Path:
        return Path(shutil.copytree(directory, tmp_path / "work" / directory.name))

    return make
