"""README.md taken apart and put together: what a person wrote keeps its bytes."""

from __future__ import annotations

import pytest

from qlformat.cards import document
from qlformat.errors import QlfError

PROSE = "# Mine\n\nText with  two spaces \n\n---\n\n<!-- a comment -->\nünïcode ✓\n"
FRONTS = {
    "none": "",
    "empty": "---\n---\n",
    "blank": "---\n\n---\n",
    "plain": "---\nlicense: mit\ntags:\n- a\n---\n",
    "comments": "---\n# first\nlicense: mit  # why\n# about tags\ntags: [a,   b]\n\n# the end\n---\n",
    "literal": "---\nnote: |\n  # no comment\n  text\n\nlicense: 'mit'\n---   \n",
    "in braces": "---\n{license: mit, tags: [a]}\n---\n",
    "no last line": "---\nlicense: mit\n---",
}


def crlf(text: str) -> str:
    return text.replace("\n", "\r\n")


@pytest.mark.parametrize("ending", ["\n", "\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize("start", ["", "\ufeff"], ids=["plain", "bom"])
@pytest.mark.parametrize("front", FRONTS.values(), ids=FRONTS)
def test_what_is_not_changed_keeps_its_bytes(front: str, start: str, ending: str) -> None:
    for prose in ("", PROSE, PROSE.rstrip(), "\n\n" + PROSE):
        if front == FRONTS["no last line"] and prose:
            continue
        text = (start + front + prose).replace("\n", ending)
        assert document.parse(text.encode()).text() == text


@pytest.mark.parametrize("ending", ["\n", "\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize("front", [*FRONTS.values()][:-1], ids=[*FRONTS][:-1])
def test_a_block_and_keys_are_added_and_replaced(front: str, ending: str) -> None:
    text = (front + PROSE).replace("\n", ending)
    found = document.parse(text.encode())
    before = found.metadata()
    once = (
        found.with_metadata({"quantization": {"bits": 4}}).with_block("One\n\nblock", {"quantization": "0123"}).text()
    )
    assert PROSE.replace("\n", ending) in once
    for line in front.split("\n") if not front.startswith("---\n{") else []:
        assert line + ending in once if line else True
    assert ("\r" in once) == (ending == "\r\n") and ("\n" in once.replace("\r\n", "")) == (ending == "\n")
    again = document.parse(once.encode())
    assert again.metadata() == {**before, "quantization": {"bits": 4}} and again.recorded == {"quantization": "0123"}
    twice = again.with_metadata({"quantization": {"bits": 8}}).with_block("Two", {}).text()
    assert "One" not in twice and "Two" in twice and twice.count("qlformat:begin") == 1
    assert document.parse(twice.encode()).metadata() == {**before, "quantization": {"bits": 8}}
    gone = document.parse(twice.encode()).with_metadata({"quantization": None})
    assert gone.metadata() == before
    if before and not front.startswith("---\n{"):
        assert gone.front == front[4 : front.rindex("---")].replace("\n", ending)


def test_the_block_stays_where_a_person_put_it() -> None:
    card = document.parse(b"Above\n").with_block("x", {}).text()
    moved = "Below comes first\n\n" + card.removeprefix("Above\n") + "\nAnd after\n"
    again = document.parse(moved.encode()).with_block("y", {}).text()
    assert again == moved.replace("\nx\n", "\ny\n")


def test_one_key_is_replaced_and_its_neighbours_keep_their_text() -> None:
    text = FRONTS["comments"] + PROSE
    changed = document.parse(text.encode()).with_metadata({"license": "apache-2.0"}).text()
    assert changed == text.replace("license: mit  # why", "license: apache-2.0")
    literal = document.parse(FRONTS["literal"].encode()).with_metadata({"note": "short"}).text()
    assert literal == "---\nnote: short\n\nlicense: 'mit'\n---   \n"


BROKEN = {
    "not utf-8": (b"\xff\xfe#", "byte 0 is not UTF-8"),
    "not closed": (b"---\nlicense: mit\n", "never ends"),
    "tab": (b"---\na:\n\t- b\n---\n", "broken YAML in line 3"),
    "colon": (b"---\nlicense: mit\nname: a: b\n---\n", "broken YAML in line 3: mapping values are not allowed here"),
    "list": (b"---\n- a\n---\n", "its metadata is a YAML list"),
    "text": (b"---\nhello\n---\n", "its metadata is a YAML str"),
    "number as key": (b"---\n1: a\n---\n", "needed keys with values"),
    "twice": (b"---\nlicense: mit\nlicense: gemma\n---\n", "the key 'license' twice"),
    "anchor": (b"---\na: *nothing\n---\n", "broken YAML in line 2"),
    "python object": (b"---\na: !!python/object/apply:os.system [ls]\n---\n", "broken YAML"),
    "deep": (b"---\na: " + b"[" * 5000 + b"\n---\n", "broken YAML"),
    "no end of the block": (b"<!-- qlformat:begin {} -->\n", "found 1 lines"),
    "two blocks": (b"<!-- qlformat:begin -->\n<!-- qlformat:end -->\n" * 2, "found 2 lines"),
    "wrong order": (b"<!-- qlformat:end -->\n<!-- qlformat:begin -->\n", "in this order"),
}


@pytest.mark.parametrize(("data", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_card_is_refused_in_one_line(data: bytes, message: str) -> None:
    with pytest.raises(QlfError) as caught:
        document.parse(data)
    text = str(caught.value)
    assert text.startswith("README.md: ") and message in text and text.isprintable() and len(text) < 400


def test_a_record_that_somebody_changed_is_ignored() -> None:
    for record in ("{broken}", '{"a": 1}', "{}", '{"a": {}}'):
        card = f"<!-- qlformat:begin {record} -->\nx\n<!-- qlformat:end -->\n"
        found = document.parse(card.encode())
        assert found.block == "\nx\n" and set(found.recorded) <= {"a"}


def test_the_metadata_is_what_the_client_reads() -> None:
    from huggingface_hub import ModelCard

    # The client wants a line in the metadata, and a line's end after it.
    for name in FRONTS.keys() - {"none", "empty", "no last line"}:
        text = FRONTS[name] + PROSE
        assert ModelCard(text).data.to_dict() == document.parse(text.encode()).metadata()
