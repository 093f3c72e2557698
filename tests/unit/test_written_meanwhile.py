"""Somebody writes to a file, in place, while it is read: an error, and nothing is left of what mixes old and new."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

import qlformat
from qlformat.errors import QlfError
from qlformat.progress import Progress
from tests import builders
from tests.builders import LLAMA_PLAIN, LLAMA_QUANTIZED, build_checkpoint
from tests.sources import write_source
from tests.unit.test_torch_file import half, torch_source

WEIGHT = "model.layers.0.self_attn.q_proj.weight"


def write_to(path: Path) -> None:
    """Change the last byte in place, and the time of the last change whatever the clock's steps."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))


def spoiling(path: Path) -> Callable[[Progress], None]:
    """A listener that writes to the file when it first hears of progress."""
    done = []

    def listener(_: Progress) -> None:
        if not done:
            done.append(path)
            write_to(path)

    return listener


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_converting(tmp_path: Path, kind: str) -> None:
    make = write_source if kind.startswith("model") else lambda path: torch_source(path, half())
    source = make(tmp_path / "source")
    with pytest.raises(QlfError, match="changed while it was read") as caught:
        qlformat.convert(source, tmp_path / "out", progress=spoiling(source / kind))
    assert caught.value.file == kind
    assert os.listdir(tmp_path) == ["source"]


def test_exporting(tmp_path: Path) -> None:
    base = tmp_path / "base"
    build_checkpoint(base, quantized=LLAMA_QUANTIZED, plain=LLAMA_PLAIN)
    with pytest.raises(QlfError, match="changed while it was read"):
        qlformat.export(base, tmp_path / "out", dtype="float32", progress=spoiling(base / builders.SINGLE))
    assert os.listdir(tmp_path) == ["base"]


def test_reading_rows(tmp_path: Path) -> None:
    build_checkpoint(tmp_path, quantized=LLAMA_QUANTIZED, plain=LLAMA_PLAIN)
    with qlformat.open(tmp_path) as checkpoint:
        weight = checkpoint[WEIGHT]
        pieces = checkpoint.iter_dequantized(WEIGHT, chunk_elements=64)
        weight[0:2]
        next(pieces)
        write_to(tmp_path / builders.SINGLE)
        for read in (lambda: weight[0:2], lambda: weight[1], lambda: weight[...], lambda: next(pieces)):
            with pytest.raises(QlfError, match="changed while it was read"):
                read()
