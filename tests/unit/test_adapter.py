"""qlf.json of an adapter: what the parser takes is what the schema takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from qlformat import adapter
from qlformat.adapter import AdapterManifest, BasePin
from qlformat.errors import FormatError
from qlformat.manifest import FileEntry

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = json.loads((ROOT / "spec" / "schema" / "adapter.schema.json").read_text(encoding="utf-8"))
FILES = (FileEntry("adapter_config.json", 2, "c" * 64), FileEntry("a/b.json", 0, "d" * 64))
SOUND = json.loads(AdapterManifest("qlformat 1", BasePin("a" * 64, "ORG/base", "main"), files=FILES).to_json())
ABSENT = object()
VALUES: list[Any] = [
    ABSENT, None, True, 0, 1, 2, 1.0, "", "x", "adapter", "base", "a" * 64, "A" * 64, "a" * 63, "a" * 64 + "\n",
    [], ["x"], [1], {}, {"fingerprint": "b" * 64}, [{"name": "x", "size": 1, "sha256": "b" * 64}], [{"name": "x"}],
    [{"name": "", "size": 1, "sha256": "b" * 64}], [{"name": "x", "size": -1, "sha256": "b" * 64}],
    [{"name": "x", "size": 1, "sha256": "B" * 64}], [{"name": "x", "size": True, "sha256": "b" * 64}],
]  # fmt: skip


def test_a_file_name_that_leaves_the_directory() -> None:
    for name in ("../x", "/x", "a//b", "a\\b", "c:x"):
        root = {**SOUND, "files": [{"name": name, "size": 1, "sha256": "b" * 64}]}
        with pytest.raises(FormatError) as caught:
            adapter.parse(json.dumps(root).encode())
        assert caught.value.rule == "M9"


def parses(value: Any) -> bool:
    try:
        adapter.parse(json.dumps(value).encode())
    except FormatError as error:
        assert error.rule in ("M1", "M2", "M3", "M9") and error.file == "qlf.json"
        return False
    return True


def changed(path: tuple[str, ...], value: Any) -> Any:
    root = json.loads(json.dumps(SOUND))
    parent = root
    for key in path[:-1]:
        parent = parent[key]
    if value is ABSENT:
        del parent[path[-1]]
    else:
        parent[path[-1]] = value
    return root


def test_what_is_written_is_read_again() -> None:
    for pin in (BasePin("0" * 64), BasePin("a" * 64, "ORG/base", "main")):
        written = AdapterManifest("qlformat 1", pin)
        assert adapter.parse(written.to_json()) == written
        listed = AdapterManifest("qlformat 1", pin, files=FILES)
        assert adapter.parse(listed.to_json()) == listed
        assert adapter.parse(written.to_json({"data": {"sha256": "1"}, "kind": "other"})) == written


@pytest.mark.parametrize("path", [(key,) for key in SOUND] + [("base", key) for key in SOUND["base"]], ids="/".join)
def test_the_schema_takes_what_the_parser_takes(path: tuple[str, ...]) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    schema = jsonschema.Draft202012Validator(SCHEMA)
    assert schema.is_valid(SOUND) and parses(SOUND)
    for value in VALUES:
        found = changed(path, value)
        # JSON Schema takes 1.0 for an integer, and its pattern ends before a last line end.
        if value == 1.0 and isinstance(value, float) and path == ("format_version",):
            assert schema.is_valid(found) and not parses(found)
        elif value == "a" * 64 + "\n" and path == ("base", "fingerprint"):
            assert not parses(found)
        else:
            assert schema.is_valid(found) == parses(found), value


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b'{"kind": 1, "kind": 2}', b"\xff", b'{"format_version": NaN}'])
def test_what_is_no_manifest(data: bytes) -> None:
    with pytest.raises(FormatError) as caught:
        adapter.parse(data)
    assert caught.value.rule == "M1"
