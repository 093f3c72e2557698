"""Shards written past the page cache hold what shards written through it hold."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qlformat.merge.direct_shard import PAGE, DirectShardWriter
from qlformat.shards import ShardReader, ShardWriter, TensorSpec

SIZES = {"a.weight": 5 << 20, "b.weight": (3 << 20) + 1234, "c.bias": 7, "d.weight": 300_001, "e.bias": 4095}


def data_of(name: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(len(name) + ord(name[0])).integers(0, 256, SIZES[name], dtype=np.uint8)


def write(path: Path, piece: int, kind: Callable[..., ShardWriter] = DirectShardWriter) -> None:
    writer = kind(path, [TensorSpec(name, "U8", (size,)) for name, size in SIZES.items()])
    try:
        for name in reversed(SIZES):
            data = data_of(name)
            for first in range(0, data.size, piece):
                writer.write(name, first, data[first : first + piece].data)
        for name in SIZES:
            for first, last in ((0, SIZES[name]), (SIZES[name] // 3, SIZES[name])):
                found = bytearray(last - first)
                assert writer.read_back(name, first, memoryview(found)) == len(found)
                assert found == data_of(name)[first:last].tobytes()
        writer.finish()
    finally:
        writer.close()


def check(path: Path) -> None:
    with ShardReader(path) as reader:
        assert reader.header.data_start % PAGE == 0
        for name in SIZES:
            assert reader.read(reader.header.tensors[name]) == data_of(name).tobytes()


@pytest.mark.parametrize("piece", [2 << 20, 1 << 20, 524_288 + 64, 70_001, 9 << 20])
def test_what_is_written_can_be_read(piece: int, tmp_path: Path) -> None:
    write(tmp_path / "direct", piece)
    check(tmp_path / "direct")


def test_a_second_writing_changes_nothing(tmp_path: Path) -> None:
    write(tmp_path / "direct", 2 << 20)
    before = (tmp_path / "direct").read_bytes()
    write(tmp_path / "direct", 2 << 20)
    assert (tmp_path / "direct").read_bytes() == before


def test_pieces_out_of_order_are_written(tmp_path: Path) -> None:
    data = data_of("b.weight")
    writer = DirectShardWriter(tmp_path / "direct", [TensorSpec("b.weight", "U8", (data.size,))])
    cuts = [0, 1_000_001, 2_000_003, data.size]
    for first, last in reversed(list(itertools.pairwise(cuts))):
        writer.write("b.weight", first, data[first:last].data)
    writer.finish()
    writer.close()
    with ShardReader(tmp_path / "direct") as reader:
        found = np.frombuffer(reader.read(reader.header.tensors["b.weight"]), dtype=np.uint8)
        assert np.array_equal(found, data)


@pytest.mark.parametrize("call", ["open", "pwrite", "preadv"])
def test_a_file_system_that_refuses_is_written_through_the_cache(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = getattr(os, call)
    direct: set[int] = set()
    refusals = []

    def replaced(target: Any, *args: Any) -> Any:
        if bool(args[0] & os.O_DIRECT) if call == "open" else target in direct:
            refusals.append(target)
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(target, *args)

    if call != "open":
        opened = os.open

        def noted(path: Any, flags: int, *args: Any) -> int:
            found = opened(path, flags, *args)
            if flags & os.O_DIRECT:
                direct.add(found)
            else:
                direct.discard(found)
            return found

        monkeypatch.setattr(os, "open", noted)
    monkeypatch.setattr(os, call, replaced)
    write(tmp_path / "shard", 2 << 20)
    monkeypatch.undo()
    assert refusals
    check(tmp_path / "shard")
