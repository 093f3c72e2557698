"""Invalid checkpoints: containers (S) and repositories (R)."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from case import EMBEDDING, NORM, SHARDS, SINGLE, WEIGHT, Case, header, header_text, json_file, on_disk, raw_file

from tests import builders

INDEX = builders.INDEX
HUGE = 100_000_001


def _set_entry(name: str, **fields: Any) -> Any:
    return header(lambda entries: entries[name].update(fields))


def _rename(old: str, new: str) -> Any:
    def change(entries: dict[str, Any]) -> None:
        renamed = {new if name == old else name: value for name, value in entries.items()}
        entries.clear()
        entries.update(renamed)

    return header(change)


def _shift(entries: dict[str, Any]) -> None:
    begin, end = entries[NORM]["data_offsets"]
    entries[NORM]["data_offsets"] = [begin - 2, end - 2]


def _hole(repo: Path) -> None:
    entries, data = builders.read_container(repo / SINGLE)
    end = max(entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__")
    for name, entry in entries.items():
        if name != "__metadata__" and entry["data_offsets"][1] == end:
            entry["data_offsets"] = [offset + 1 for offset in entry["data_offsets"]]
            begin = entry["data_offsets"][0]
    (repo / SINGLE).write_bytes(builders.container_bytes(entries, data[: begin - 1] + b"\0" + data[begin - 1 :]))


def _wrapping_size(entries: dict[str, Any]) -> None:
    begin = entries[NORM]["data_offsets"][0]
    entries["model.wrapped"] = {"dtype": "F64", "shape": [1 << 61], "data_offsets": [begin, begin]}


def _container(name: str, change: Any, tensor: str | None = None) -> Case:
    return Case(name, on_disk(change), tensor=tensor, file=SINGLE, decode=WEIGHT)


CONTAINER = [
    _container("S1-file-of-7-bytes", raw_file(lambda data: data[:7])),
    _container("S1-header-past-the-end", raw_file(lambda data: struct.pack("<Q", len(data) - 7) + data[8:])),
    _container("S1-header-above-the-limit", raw_file(lambda data: struct.pack("<Q", HUGE) + data[8:])),
    _container("S1-header-length-wraps", raw_file(lambda data: b"\xff" * 8 + data[8:])),
    _container("S2-not-json", header_text(lambda text: text.replace(b'"dtype":', b'"dtype"=', 1))),
    _container("S2-repeated-key", header_text(lambda text: text.replace(EMBEDDING.encode(), NORM.encode()))),
    _container("S2-space-before-the-brace", header_text(lambda text: b" " + text[:-1])),
    _container("S2-not-utf8", header_text(lambda text: text.replace(b"norm", b"n\xffrm"))),
    _container("S2-nested-too-deep", header_text(lambda text: b'{"__metadata__":' + b"[" * 5000 + text)),
    _container("S2-text-after-the-object", header_text(lambda text: text.rstrip() + b"}" + b" " * 7)),
    _container("S2-control-character", header_text(lambda text: text.replace(b'"format"', b'"for\x01at"'))),
    _container("S3-unknown-dtype", _set_entry(NORM, dtype="BF17"), NORM),
    _container("S3-unknown-key", _set_entry(NORM, strides=[1]), NORM),
    _container("S3-missing-offsets", header(lambda entries: entries[NORM].pop("data_offsets")), NORM),
    _container("S3-negative-dimension", _set_entry(NORM, shape=[-4, -4]), NORM),
    _container("S3-fractional-dimension", _set_entry(NORM, shape=[16.0]), NORM),
    _container("S3-element-count-overflows", _set_entry(NORM, shape=[1 << 32, 1 << 32, 16]), NORM),
    _container("S3-three-offsets", _set_entry(NORM, data_offsets=[0, 32, 32]), NORM),
    _container("S4-shape-too-small", _set_entry(EMBEDDING, shape=[8, 15]), EMBEDDING),
    _container("S4-begin-after-end", header(lambda e: e[NORM]["data_offsets"].reverse()), NORM),
    _container("S4-size-wraps-64-bits", header(_wrapping_size), "model.wrapped"),
    _container("S5-overlap", header(_shift)),
    _container("S5-hole", _hole),
    _container("S5-bytes-after-the-last-tensor", raw_file(lambda data: data + b"\0")),
    _container("S5-truncated", raw_file(lambda data: data[:-1])),
    _container("S6-number-in-metadata", header(lambda entries: entries.update(__metadata__={"format": 1}))),
    _container("S6-metadata-is-a-list", header(lambda entries: entries.update(__metadata__=["pt"]))),
    _container("S7-control-character", _rename(NORM, "model.norm\u0007.weight")),
    _container("S7-empty-name", _rename(NORM, "")),
    _container("S7-name-too-long", _rename(NORM, "n" * 4097)),
    _container("S7-lone-surrogate", header_text(lambda text: text.replace(b"model.norm", rb"model.\ud800"))),
]


def _index(change: Any) -> Any:
    return json_file(INDEX, change)


def _move_in_index(old: str, new: str) -> Any:
    def change(root: dict[str, Any]) -> None:
        names = root["weight_map"]
        names.update({tensor: new for tensor, shard in names.items() if shard == old})

    return _index(change)


def _both(repo: Path) -> None:
    names = list(builders.read_tensors(repo / SINGLE))
    (repo / INDEX).write_bytes(builders.json_bytes({"metadata": {}, "weight_map": dict.fromkeys(names, SINGLE)}))


def _add_tensor(repo: Path, shard: str, name: str) -> None:
    tensors = builders.read_tensors(repo / shard)
    tensors[name] = builders.Tensor("BF16", (16,), bytes(32))
    (repo / shard).write_bytes(builders.shard_bytes(tensors))


def _sharded(name: str, change: Any, reseal: str = "files", **where: Any) -> Case:
    if name[:2] in ("R2", "R3"):
        where["also"] = ("M4",)  # without an index, no tensor of the manifest can be found
    return Case(name, on_disk(change, shards=2, reseal=reseal), **where)


REPOSITORY = [
    Case("R1-no-weights", on_disk(lambda repo: (repo / SINGLE).unlink()), also=("M4",)),
    Case("R1-single-file-and-index", on_disk(_both), also=("M4",)),
    _sharded("R2-index-is-a-list", lambda repo: (repo / INDEX).write_bytes(b"[]\n"), file=INDEX),
    _sharded("R2-no-weight-map", _index(lambda root: root.pop("weight_map")), file=INDEX),
    _sharded("R2-number-in-weight-map", _index(lambda root: root["weight_map"].update({NORM: 1})), file=INDEX),
    _sharded("R3-parent-directory", _move_in_index(SHARDS[0], f"../{SHARDS[0]}"), file=INDEX),
    _sharded("R3-absolute-path", _move_in_index(SHARDS[0], f"/{SHARDS[0]}"), file=INDEX),
    _sharded("R3-subdirectory", _move_in_index(SHARDS[0], f"weights/{SHARDS[0]}"), file=INDEX),
    _sharded("R3-other-suffix", _move_in_index(SHARDS[0], "model-00001-of-00002.bin"), file=INDEX),
    _sharded("R4-missing-shard", lambda repo: (repo / SHARDS[1]).unlink(), "nothing", file=SHARDS[1]),
    Case(
        "R4-link-out-of-the-repository",
        on_disk(lambda repo: (repo / SINGLE).rename(repo.parent / "outside.safetensors"), reseal="nothing"),
        file=SINGLE,
        setup={"links": {SINGLE: "../outside.safetensors"}},
    ),
    _sharded(
        "R4-directory-in-place-of-a-shard",
        lambda repo: (repo / SHARDS[1]).unlink(),
        "nothing",
        file=SHARDS[1],
        setup={"directories": [SHARDS[1]]},
    ),
    _sharded("R5-tensor-in-two-shards", lambda repo: _add_tensor(repo, SHARDS[1], EMBEDDING), tensor=EMBEDDING),
    _sharded(
        "R5-tensor-not-in-the-index",
        lambda repo: _add_tensor(repo, SHARDS[1], "model.extra.weight"),
        "tensors",
        tensor="model.extra.weight",
        also=("M4",),
    ),
    _sharded(
        "R5-tensor-in-no-shard",
        _index(lambda root: root["weight_map"].update({"model.extra.weight": SHARDS[0]})),
        tensor="model.extra.weight",
    ),
    _sharded(
        "R5-index-names-the-wrong-shard",
        _index(lambda root: root["weight_map"].update({EMBEDDING: SHARDS[1]})),
        tensor=EMBEDDING,
    ),
    Case(
        "R6-stray-weight-file",
        on_disk(lambda repo: (repo / "model-old.safetensors").write_bytes((repo / SINGLE).read_bytes())),
        file="model-old.safetensors",
    ),
]
