"""The container: every rule of the header, and a writer whose files the safetensors library reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from qlformat.errors import FormatError
from qlformat.shards import ALIGNMENT, ShardReader, ShardWriter, TensorSpec, file_order, header_length, parse_header

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def header(entries: Any) -> bytes:
    return json.dumps(entries).encode()


def write_file(path: Path, text: bytes, data: bytes) -> Path:
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def rule_of(path: Path) -> str | None:
    with pytest.raises(FormatError) as caught:
        ShardReader(path)
    assert "\n" not in str(caught.value)
    return caught.value.rule


@pytest.mark.parametrize(
    ("rule", "entries", "size"),
    [
        ("S2", [1], 0),
        ("S3", {"a": {"dtype": "F32", "shape": [2]}}, 8),
        ("S3", {"a": {**ENTRY, "extra": 1}}, 8),
        ("S3", {"a": {**ENTRY, "dtype": "F33"}}, 8),
        ("S3", {"a": {**ENTRY, "dtype": ["F32"]}}, 8),
        ("S3", {"a": {**ENTRY, "shape": [-2]}}, 8),
        ("S3", {"a": {**ENTRY, "shape": [True, 2]}}, 8),
        ("S3", {"a": {**ENTRY, "shape": [2.0]}}, 8),
        ("S3", {"a": {**ENTRY, "shape": [1 << 62, 1 << 62]}}, 8),
        ("S3", {"a": {**ENTRY, "data_offsets": [0]}}, 8),
        ("S3", {"a": {**ENTRY, "data_offsets": [-8, 0]}}, 8),
        ("S4", {"a": {**ENTRY, "shape": [3]}}, 8),
        ("S4", {"a": {**ENTRY, "data_offsets": [8, 0]}}, 8),
        ("S4", {"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 1]}}, 1),
        ("S5", {"a": ENTRY}, 7),
        ("S5", {"a": ENTRY}, 9),
        ("S5", {"a": ENTRY, "b": ENTRY}, 8),
        ("S5", {"a": ENTRY, "b": {**ENTRY, "data_offsets": [12, 20]}}, 20),
        ("S5", {"a": {**ENTRY, "data_offsets": [4, 12]}}, 12),
        ("S6", {"__metadata__": {"a": 1}}, 0),
        ("S6", {"__metadata__": []}, 0),
        ("S7", {"": ENTRY}, 8),
        ("S7", {"a\x1b[31m": ENTRY}, 8),
        ("S7", {"a" * 4097: ENTRY}, 8),
        ("S7", {"\ud800": ENTRY}, 8),
    ],
)
def test_header_rule(tmp_path: Path, rule: str, entries: Any, size: int) -> None:
    assert rule_of(write_file(tmp_path / "a.safetensors", header(entries), bytes(size))) == rule


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        ("S2", b" {}"),
        ("S2", b'{"a": NaN}'),
        ("S2", b'{"a"'),
        ("S2", b'{"a": "\xff"}'),
        ("S2", b'{"__metadata__": {}, "__metadata__": {}}'),
        ("S2", b'{"a":' + b"[" * 100_000),
        ("S2", b""),
    ],
)
def test_header_text(tmp_path: Path, rule: str, text: bytes) -> None:
    assert rule_of(write_file(tmp_path / "a.safetensors", text, b"")) == rule


@pytest.mark.parametrize("data", [b"", b"1234567", (1 << 31).to_bytes(8, "little"), (99).to_bytes(8, "little") + b"{}"])
def test_header_length_rule(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    assert rule_of(path) == "S1"


def test_header_of_two_gigabytes_is_refused_before_it_is_read() -> None:
    with pytest.raises(FormatError, match="at most 100000000"):
        header_length((2 << 30).to_bytes(8, "little"), 3 << 30, "a.safetensors")


def test_empty_and_scalar_tensors_are_sound() -> None:
    entries = {
        "empty": {"dtype": "F16", "shape": [0, 4], "data_offsets": [0, 0]},
        "scalar": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
        "huge_but_empty": {"dtype": "F32", "shape": [1 << 40, 1 << 40, 0], "data_offsets": [4, 4]},
    }
    text = header(entries)
    assert set(parse_header(text, 8 + len(text) + 4, "a").tensors) == set(entries)


def test_a_fifo_is_refused_without_waiting(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "a.safetensors")
    assert rule_of(tmp_path / "a.safetensors") == "R4"


def test_reader_reads_what_safetensors_wrote(tmp_path: Path) -> None:
    tensors = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.arange(5, dtype=np.uint8)}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    with ShardReader(tmp_path / "a.safetensors") as reader:
        assert dict(reader.header.metadata) == {"format": "pt"}
        for name, value in tensors.items():
            info = reader.header.tensors[name]
            assert info.shape == value.shape
            assert reader.read(info) == value.tobytes()
        part = bytearray(8)
        reader.read_into(reader.header.tensors["b"], 4, memoryview(part))
        assert part == tensors["b"].tobytes()[4:12]
        with pytest.raises(FormatError):
            reader.read_into(reader.header.tensors["b"], 20, memoryview(part))


def test_file_that_shrinks_while_open(tmp_path: Path) -> None:
    save_file({"a": np.zeros(1000, dtype=np.float32)}, tmp_path / "a.safetensors")
    with ShardReader(tmp_path / "a.safetensors") as reader:
        (tmp_path / "a.safetensors").write_bytes(b"12345678")
        with pytest.raises(FormatError, match="became shorter"):
            reader.read(reader.header.tensors["a"])


def specs() -> list[TensorSpec]:
    return [
        TensorSpec("z.packed", "U8", (128, 1), packed=True),
        TensorSpec("a.odd_packed", "U8", (33, 1), packed=True),
        TensorSpec("a.packed", "U8", (64, 1), packed=True),
        TensorSpec("half", "F16", (3,)),
        TensorSpec("absmax", "U8", (5,)),
        TensorSpec("map", "F32", (16,)),
        TensorSpec("count", "I64", ()),
        TensorSpec("state", "U8", (100,), late=True),
        TensorSpec("empty", "F16", (0, 7)),
    ]


def test_writer_order_alignment_and_late_tensors(tmp_path: Path) -> None:
    order = ["a.packed", "z.packed", "count", "map", "empty", "half", "a.odd_packed", "absmax", "state"]
    assert [spec.name for spec in file_order(specs())] == order
    path = tmp_path / "model.safetensors"
    writer = ShardWriter(path, specs())
    content = {spec.name: bytes([i]) * spec.nbytes for i, spec in enumerate(specs())}
    for spec in reversed(specs()):
        if spec.late:
            content[spec.name] = b'{"short": 1}'
            writer.write_late(spec.name, content[spec.name])
        for start in range(0, spec.nbytes if not spec.late else 0, 10):
            writer.write(spec.name, start, content[spec.name][start : start + 10])
    writer.finish()
    writer.close()
    with ShardReader(path) as reader:
        assert list(reader.header.tensors) == order
        assert reader.header.data_start % ALIGNMENT == 0
        for name in ("a.packed", "z.packed"):
            assert reader.header.tensors[name].begin % ALIGNMENT == 0
        assert {name: bytes(reader.read(info)) for name, info in reader.header.tensors.items()} == content
    loaded = load_file(path)
    assert loaded["state"].tobytes() == content["state"]
    with safe_open(path, "np") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_writer_never_follows_a_link(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="symbolic"):
        ShardWriter(tmp_path / "model.safetensors", specs())
    assert (tmp_path / "victim").read_text() == "precious"
