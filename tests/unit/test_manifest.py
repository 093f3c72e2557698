"""qlf.json: round trip, one rule for each way to be wrong, and the fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import pytest

from qlformat.errors import FormatError
from qlformat.layout import Recipe
from qlformat.manifest import (
    FileEntry,
    Manifest,
    Source,
    TensorEntry,
    WeightEntry,
    fingerprint,
    is_plain_path,
    parse,
)

DIGEST = "0" * 64
MANIFEST = Manifest(
    writer="qlformat 0.1.0",
    source=Source("org/model", "abc", (FileEntry("model.safetensors", 10, DIGEST),)),
    recipe=Recipe(),
    skip=("*.head",),
    tensors=(TensorEntry("a.weight", "U8", (8, 1), "model.safetensors", DIGEST),),
    weights=(
        WeightEntry("a.weight", "nf4", "float16", (4, 4), "linear", False, 0.5, 0.25),
        WeightEntry("b.weight", "none", "float16", (), "norm"),
    ),
    files=(FileEntry("model.safetensors", 10, DIGEST), FileEntry("chat/template.jinja", 0, DIGEST)),
    fingerprint=DIGEST,
)


def test_round_trip() -> None:
    assert parse(MANIFEST.to_json()) == MANIFEST
    assert MANIFEST.to_json() == parse(MANIFEST.to_json()).to_json()


def edited(change: Callable[[dict[str, Any]], Any]) -> bytes:
    root = json.loads(MANIFEST.to_json())
    change(root)
    return json.dumps(root).encode()


@pytest.mark.parametrize(
    ("rule", "change"),
    [
        ("M1", lambda m: m.pop("writer")),
        ("M1", lambda m: m.update(kind="adapter")),
        ("M1", lambda m: m.update(format_version="1")),
        ("M1", lambda m: m.update(format_version=True)),
        ("M1", lambda m: m.update(fingerprint="xyz")),
        ("M1", lambda m: m.update(tensors={})),
        ("M1", lambda m: m.update(tensors=[1])),
        ("M1", lambda m: m["tensors"].append(m["tensors"][0])),
        ("M1", lambda m: m["tensors"][0].update(shape=[-1])),
        ("M1", lambda m: m["weights"][0].update(rms_error=-1)),
        ("M1", lambda m: m["weights"][0].update(rms_error="0.5")),
        ("M1", lambda m: m["weights"][0].update(transposed=0)),
        ("M1", lambda m: m["recipe"].update(blocksize=63)),
        ("M1", lambda m: m["recipe"].update(blocksize="64")),
        ("M1", lambda m: m["recipe"].update(nested_blocksize=64)),
        ("M1", lambda m: m["files"][0].update(size=-1)),
        ("M1", lambda m: m["source"].update(repo_id=5)),
        ("M2", lambda m: m.update(format_version=2)),
        ("M2", lambda m: m.update(format_version=0)),
        ("M3", lambda m: m.update(must_understand=["stacked_experts"])),
        ("M9", lambda m: m["files"][0].update(name="../config.json")),
        ("M9", lambda m: m["files"][0].update(name="/etc/passwd")),
        ("M9", lambda m: m["tensors"][0].update(shard="sub/model.safetensors")),
    ],
)
def test_each_wrong_field_has_its_rule(rule: str, change: Callable[[dict[str, Any]], Any]) -> None:
    with pytest.raises(FormatError) as caught:
        parse(edited(change))
    assert caught.value.rule == rule


def test_a_future_version_is_named_before_anything_else_is_judged() -> None:
    with pytest.raises(FormatError) as caught:
        parse(b'{"format_version": 2, "everything": "else may differ"}')
    assert caught.value.rule == "M2"


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b'{"a":1,"a":2}', b"\xff\xfe", b'{"format_version": NaN}'])
def test_broken_json(data: bytes) -> None:
    with pytest.raises(FormatError) as caught:
        parse(data)
    assert caught.value.rule == "M1"


def test_fingerprint_ignores_order_and_follows_its_definition() -> None:
    rows: list[tuple[str, str, tuple[int, ...], str]] = [("b", "U8", (2, 1), DIGEST), ("a\u00e9", "F32", (), DIGEST)]
    text = f'[["a\\u00e9","F32",[],"{DIGEST}"],["b","U8",[2,1],"{DIGEST}"]]'
    assert fingerprint(rows) == hashlib.sha256(text.encode()).hexdigest() == fingerprint(reversed(rows))
    assert fingerprint([*rows, ("c", "U8", (), DIGEST)]) != fingerprint(rows)


@pytest.mark.parametrize("name", ["a", "a/b.json", "chat template.jinja"])
def test_plain_paths(name: str) -> None:
    assert is_plain_path(name)


@pytest.mark.parametrize("name", ["", "/a", "a/", "a//b", "..", "a/../b", "./a", "C:a", "a\\b", "a\nb", "a\x00"])
def test_paths_that_leave(name: str) -> None:
    assert not is_plain_path(name)
