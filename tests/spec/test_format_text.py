"""format.md, the rules, the vectors and the code say the same."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest

from qlformat import layout, manifest, shards
from qlformat.layout import QuantState, Recipe
from qlformat.manifest import fingerprint
from qlformat.rules import RULES
from tests import builders

ROOT = Path(__file__).resolve().parents[2]
SPEC = ROOT / "spec"
TEXT = (SPEC / "format.md").read_text(encoding="utf-8")


def section(number: str) -> str:
    """The text of a numbered section, up to the next of the same level."""
    return TEXT.split(f"\n## {number}. ")[1].split("\n## ")[0]


def test_the_rules_table_is_that_of_the_code() -> None:
    rows = re.findall(r"^\| ([A-Z]\d+) \| (.+) \| (\w+) \| ([\w -]+) \|$", section("15"), re.MULTILINE)
    assert {rule: text for rule, text, _, _ in rows} == RULES
    assert [rule for rule, *_ in rows] == list(RULES)
    assert {when for _, _, when, _ in rows} == {"open", "use", "verify", "write"}
    assert {plain for *_, plain in rows} == {"yes", "note", "no", "-", "see 17"}


def test_rules_without_a_manifest_do_not_apply_to_plain_repositories() -> None:
    rows = dict(re.findall(r"^\| ([MP]\d) \| .+ \| \w+ \| ([\w -]+) \|$", section("15"), re.MULTILINE))
    assert len(rows) == 12
    assert set(rows.values()) == {"no"}


def test_every_rule_is_explained_outside_the_table() -> None:
    others = TEXT.replace(section("15"), "")
    missing = [rule for rule in RULES if not re.search(rf"\b{rule}\b", others)]
    # Lists such as "S1 to S7" name the others.
    assert not missing


def test_every_rule_has_a_vector_that_breaks_it() -> None:
    vectors = SPEC / "vectors"
    cases = [
        *(vectors / "checkpoints" / "invalid").iterdir(),
        *(vectors / "checkpoints" / "future").iterdir(),
        *(vectors / "sources" / "invalid").iterdir(),
    ]
    expected = {case.name: json.loads((case / "expected.json").read_text())["rule"] for case in cases}
    assert all(name.partition("-")[0] == rule for name, rule in expected.items())
    assert set(expected.values()) == set(RULES)


def test_the_fingerprint_example() -> None:
    example = section("13")
    block = "".join(re.search(r"```json\n(.+?)```", example, re.DOTALL)[1].split("\n"))  # type: ignore[index]
    found = re.search(r"fingerprint is `([0-9a-f]{64})`", example)
    assert found
    assert hashlib.sha256(block.encode("ascii")).hexdigest() == found[1]
    rows = [(name, dtype, tuple(shape), digest) for name, dtype, shape, digest in json.loads(block)]
    assert fingerprint(reversed(rows)) == found[1]
    contents = {"model.bias": bytes([1, 2, 3]), "model.norm.weight": bytes.fromhex("0000803f000000bf")}
    assert {row[0]: row[3] for row in rows} == {n: hashlib.sha256(data).hexdigest() for n, data in contents.items()}


def test_the_fingerprint_escapes_and_sorts_as_described() -> None:
    names = ["\U0001f600", "\uffee", "\u00e9", 'q"\\', "a\x7f"]
    rows = [(name, "U8", (0,), "0" * 64) for name in names]
    tail = ',"U8",[0],"' + "0" * 64 + '"]'
    heads = [r'["a\u007f"', r'["q\"\\"', r'["\u00e9"', r'["\uffee"', r'["\ud83d\ude00"']
    text = "[" + ",".join(head + tail for head in heads) + "]"
    assert fingerprint(rows) == hashlib.sha256(text.encode()).hexdigest()


def test_the_quant_state_example() -> None:
    example = re.search(r"Example: `(\{.+?\})`", TEXT, re.DOTALL)
    assert example
    text = example[1].replace("\n", " ")
    needed = QuantState("nf4", 64, "bfloat16", (64, 64), 0.0526580810546875)
    assert text.encode() == needed.to_json()
    assert list(json.loads(text)) == re.findall(r"^\| `(\w+)` \|", section("5").split("### 5.2")[1], re.MULTILINE)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.0"), (1.0, "1.0"), (1e-4, "0.0001"), (1e-5, "1e-05"), (1e16, "1e+16"), (123456.0, "123456.0"),
        (1.1754943508222875e-38, "1.1754943508222875e-38"), (-0.5, "-0.5"),
    ],
)  # fmt: skip
def test_numbers_are_written_as_described(value: float, text: str) -> None:
    assert QuantState("nf4", 64, "float32", (1,), value).to_json().endswith(f'"nested_offset": {text}}}'.encode())


def test_limits_are_those_of_the_code() -> None:
    assert shards.MAX_HEADER_BYTES == 100_000_000
    assert "at most 100,000,000" in section("3")
    assert layout.MAX_QUANT_STATE_BYTES == 65_536
    assert "at most 65,536 bytes" in section("5")
    assert layout.MAX_ELEMENTS == 2**48
    assert "fewer than 2^48 elements" in section("5")
    assert f"1 to {shards.MAX_NAME_BYTES} bytes" in section("3")
    assert manifest.FORMAT_VERSION == 1
    assert "Format version 1." in TEXT
    for blocksize in layout.BLOCKSIZES:
        assert str(blocksize) in section("5").split("`blocksize`")[1].split("|")[1]


def test_dtypes_are_those_of_the_code() -> None:
    listed = section("3").split("`dtype` is one of ")[1].split(". ")[0].replace("\n", " ")
    assert set(re.findall(r"[A-Z]\w+", listed)) == set(shards.DTYPE_BITS)


def test_the_configuration_table_has_the_keys_that_are_written() -> None:
    keys = re.findall(r"^\| `(\w+)` \|", section("11"), re.MULTILINE)
    assert keys == list(builders.quantization_config(Recipe(), []))


def test_the_manifest_tables_have_the_fields_that_are_written() -> None:
    root = json.loads(builders.make_checkpoint().manifest(SPEC / "codebooks").to_json())
    fields = re.findall(r"^\| `(\w+)`(?:, `(\w+)`)? \|", section("12"), re.MULTILINE)
    listed = {name for row in fields for name in row if name}
    weights = {key for entry in root["weights"] for key in entry}
    assert listed == set(root) | weights
    for key in [*root["recipe"], *root["source"], *root["tensors"][0], *root["files"][0]]:
        assert f"`{key}`" in section("12"), key


def test_nothing_names_how_it_was_made() -> None:
    for path in SPEC.rglob("*"):
        if path.suffix in (".md", ".py", ".c", ".h", ".json") and path.is_file():
            text = path.read_text(encoding="utf-8", errors="replace")
            assert "/" + "work/" not in text, path
