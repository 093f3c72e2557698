"""The JSON schemas accept and reject what the parsers do; every deliberate difference is listed here."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from qlformat import manifest
from qlformat.errors import FormatError
from qlformat.layout import Recipe, parse_quant_state
from tests import builders

ROOT = Path(__file__).resolve().parents[2]
CASES = ROOT / "spec" / "vectors" / "checkpoints"
ABSENT = object()
REPLACEMENTS: list[Any] = [
    ABSENT, None, True, False, 0, 1, 2, -1, 64, 256, 1.0, 0.5, -0.5, "", "x", "nf4", "none", "float16", "U8", "../x",
    "a/b", "/a", "a//b", ".", "..", "a\\b", "c:d", "a\nb", "x\n", "\u200b", "0" * 64, "0" * 64 + "\n", "A" * 64,
    [], [1], [-1], [1.0], [True], ["x"], {}, {"x": 1},
]  # fmt: skip


def schema(name: str) -> jsonschema.Draft202012Validator:
    found = json.loads((ROOT / "spec" / "schema" / f"{name}.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(found)
    return jsonschema.Draft202012Validator(found)


def parses(value: Any) -> bool:
    try:
        manifest.parse(json.dumps(value).encode())
    except FormatError:
        return False
    return True


def state_parses(value: Any) -> bool:
    try:
        parse_quant_state(json.dumps(value).encode(), "w", "nf4")
    except FormatError:
        return False
    return True


def places(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The path of every value inside a JSON value; of lists only the first element."""
    children: list[tuple[str | int, Any]] = []
    if isinstance(value, dict):
        children = list(value.items())
    elif isinstance(value, list) and value:
        children = [(0, value[0])]
    for key, child in children:
        yield (*path, key)
        yield from places(child, (*path, key))


def mutations(value: Any) -> Iterator[tuple[tuple[str | int, ...], Any, Any]]:
    """(path, replacement, mutated value) for every place and replacement, and for an added key in every object."""
    for path in places(value):
        for replacement in REPLACEMENTS:
            changed = copy.deepcopy(value)
            parent = changed
            for key in path[:-1]:
                parent = parent[key]
            if replacement is not ABSENT:
                parent[path[-1]] = replacement
            elif isinstance(parent, dict):
                del parent[path[-1]]
            else:
                parent.pop(path[-1])
            yield path, replacement, changed
    for path in [(), *(path for path in places(value) if isinstance(at(value, path), dict))]:
        changed = copy.deepcopy(value)
        at(changed, path)["unknown_key"] = 1
        yield path, "unknown_key", changed


def at(value: Any, path: tuple[str | int, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def sample_manifest() -> Any:
    checkpoint = builders.make_checkpoint()
    checkpoint.source = manifest.Source("org/model", "abc", (manifest.FileEntry("model.safetensors", 1, "0" * 64),))
    checkpoint.skip = ("*.head",)
    checkpoint.weights.sort(key=lambda weight: weight.rms_error is None)
    root = json.loads(checkpoint.manifest(ROOT / "spec" / "codebooks").to_json())
    root["weights"].sort(key=lambda entry: "rms_error" not in entry)
    return root


def manifest_difference(path: tuple[str | int, ...], replacement: Any) -> str | None:
    """Why schema and manifest.parse may disagree here, or None.."""
    last = path[-1] if path else None
    if replacement == "unknown_key":
        return "a reader ignores unknown keys, a verifier and the schema do not (format.md, section 16)"
    if isinstance(replacement, float) and replacement.is_integer():
        return "JSON Schema takes 1.0 for an integer, the format wants digits alone"
    if replacement == [1.0]:
        return "JSON Schema takes 1.0 for an integer, the format wants digits alone"
    if replacement == "\u200b" and last in ("name", "shard"):
        return "the pattern does not know which characters can be printed"
    if last in ("rms_error", "relative_error") and replacement is None:
        return "the parser reads null as absent"
    if path[:1] == ("source",) and last in ("repo_id", "revision") and replacement is ABSENT:
        return "the parser reads absent as null"
    if last == "nested_blocksize" and replacement is ABSENT:
        return "the parser reads absent as null"
    if last in ("encoding", "dtype") and path[0] in ("weights", "tensors") and isinstance(replacement, str):
        return "the parser takes any text; rule M4 compares it with the tensors"
    return None


def test_schema_and_parser_agree_on_manifests() -> None:
    validator = schema("qlf")
    sample = sample_manifest()
    assert validator.is_valid(sample)
    assert parses(sample)
    seen: set[str] = set()
    checked = accepted = 0
    for path, replacement, changed in mutations(sample):
        valid, parsed = validator.is_valid(changed), parses(changed)
        reason = manifest_difference(path, replacement)
        checked += 1
        accepted += valid
        if valid != parsed:
            assert reason, f"schema says {valid}, the parser {parsed}: {path} = {replacement!r}"
            seen.add(reason)
    assert checked > 1000
    assert 50 < accepted < checked / 2
    # A difference that no longer exists must leave the list.
    assert len(seen) == 6, seen


def test_the_recipe_without_double_quantization() -> None:
    root = json.loads(builders.make_checkpoint(recipe=Recipe(double_quant=False)).manifest(ROOT / "spec").to_json())
    assert schema("qlf").is_valid(root)
    root["recipe"]["nested_blocksize"] = 256
    assert not schema("qlf").is_valid(root)
    assert not parses(root)


@pytest.mark.parametrize("nested", [True, False])
def test_schema_and_parser_agree_on_quant_states(nested: bool) -> None:
    sample: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [4, 16]}
    if nested:
        sample.update(nested_blocksize=256, nested_dtype="float32", nested_offset=0.5)
    validator = schema("quant_state")
    assert validator.is_valid(sample)
    assert state_parses(sample)
    for path, replacement, changed in mutations(sample):
        if isinstance(replacement, float) and replacement.is_integer() and path[-1] != "nested_offset":
            continue  # JSON Schema takes 1.0 for an integer
        if replacement == [1.0]:
            continue
        assert validator.is_valid(changed) == state_parses(changed), (path, replacement)


def test_what_the_quant_state_schema_leaves_to_readers() -> None:
    validator = schema("quant_state")
    nested = {"nested_blocksize": 256, "nested_dtype": "float32"}
    for change in ({"quant_type": "fp4"}, {"shape": [1 << 24, 1 << 24]}, {**nested, "nested_offset": 0.1}):
        value = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [4, 16], **change}
        assert validator.is_valid(value)
        assert not state_parses(value)


def valid_repositories() -> list[Path]:
    return sorted(path / "repo" for path in (CASES / "valid").iterdir())


@pytest.mark.parametrize("repo", valid_repositories(), ids=lambda repo: repo.parent.name)
def test_valid_checkpoints_satisfy_the_schemas(repo: Path) -> None:
    config = json.loads((repo / "config.json").read_text())["quantization_config"]
    assert schema("quantization_config").is_valid(config) == (
        repo.parent.name not in ("plain-null-skip", "plain-from-transformers")
    )
    if (repo / "qlf.json").exists():
        schema("qlf").validate(json.loads((repo / "qlf.json").read_text()))
    for shard in repo.glob("*.safetensors"):
        for name, tensor in builders.read_tensors(shard).items():
            if ".quant_state." in name:
                schema("quant_state").validate(json.loads(tensor.data))


@pytest.mark.parametrize("rule", ["M1", "M2", "M3"])
def test_invalid_manifests_break_the_schema(rule: str) -> None:
    checked = 0
    for case in [*(CASES / "invalid").glob(f"{rule}-*"), *(CASES / "future").glob(f"{rule}-*")]:
        try:
            value = json.loads((case / "repo" / "qlf.json").read_text())
        except ValueError:
            continue
        if case.name in ("M1-tensor-twice", "M1-repeated-key"):  # not expressible in a schema
            continue
        assert not schema("qlf").is_valid(value), case.name
        checked += 1
    assert checked >= 2


@pytest.mark.parametrize("case", sorted((CASES / "invalid").glob("C[13]-*")), ids=lambda case: case.name)
def test_invalid_configurations_break_the_schema(case: Path) -> None:
    config = json.loads((case / "repo" / "config.json").read_text()).get("quantization_config")
    assert not schema("quantization_config").is_valid(config)
