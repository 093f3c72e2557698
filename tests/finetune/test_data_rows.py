"""Reading training data: file kinds, formats, and what is said of rows that cannot be used."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from huggingface_hub import constants
from pyarrow import parquet

from qlformat.finetune.dataset import load_rows
from qlformat.finetune.rows import DataError, Place

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
ROWS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "messages": ({"messages": CHAT}, {"messages": CHAT}),
    "conversations": ({"conversations": SHAREGPT}, {"messages": CHAT}),
    "instruction": (
        {"instruction": "Add", "input": "1 2", "output": "3"},
        {"instruction": "Add", "input": "1 2", "output": "3"},
    ),
    "prompt-completion": ({"prompt": "1+1=", "completion": "2"}, {"prompt": "1+1=", "completion": "2"}),
    "text": ({"text": "Once"}, {"text": "Once"}),
}


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_json(path: Path, rows: list[Any]) -> Path:
    path.write_text(json.dumps(rows, indent=2))
    return path


def write_csv(path: Path, rows: list[Any]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows({k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in rows)
    return path


def write_parquet(path: Path, rows: list[Any]) -> Path:
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


WRITERS: dict[str, Callable[[Path, list[Any]], Path]] = {
    "jsonl": write_jsonl,
    "json": write_json,
    "csv": write_csv,
    "parquet": write_parquet,
}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("name", ROWS)
def test_every_format_in_every_kind_of_file(tmp_path: Path, kind: str, name: str) -> None:
    raw, row = ROWS[name]
    path = WRITERS[kind](tmp_path / f"data.{kind}", [raw, {**raw, "extra": "ignored"}] if kind != "csv" else [raw, raw])
    rows = load_rows(path)
    assert (rows.format, rows.rows, rows.skipped) == (name, [row, row], [])
    (file,) = rows.files
    assert (file.name, file.size) == (path.name, path.stat().st_size)
    assert file.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    canonical = json.dumps(row, sort_keys=True, separators=(",", ":")) + "\n"
    assert rows.sha256 == hashlib.sha256(2 * canonical.encode()).hexdigest()


def test_kinds_are_told_by_content_where_the_suffix_says_nothing_or_the_wrong_thing(tmp_path: Path) -> None:
    for name, write in (("a.data", write_jsonl), ("b", write_json), ("c.bin", write_parquet), ("d.json", write_jsonl)):
        assert len(load_rows(write(tmp_path / name, [{"text": "x"}, {"text": "y"}]))) == 2
    wrapped = tmp_path / "wrapped.json"
    wrapped.write_text(json.dumps({"version": "1", "data": [{"text": "x"}, {"text": "y"}]}, indent=1))
    rows = load_rows(wrapped)
    assert [place.number for place in rows.places] == [4, 7]
    bom = tmp_path / "bom.jsonl"
    bom.write_bytes(b'\xef\xbb\xbf{"text": "x"}\r\n\r\n{"text": "\xc3\xa9"}\r\n')
    assert load_rows(bom).rows == [{"text": "x"}, {"text": "é"}]


def test_places_are_lines_where_the_file_has_lines(tmp_path: Path) -> None:
    text = '[\n  {"text": "a"},\n\n  {"text":\n    "b"}, {"text": "c"}\n]'
    (tmp_path / "x.json").write_text(text)
    assert [place.number for place in load_rows(tmp_path / "x.json").places] == [2, 4, 5]
    (tmp_path / "x.csv").write_text('text\n"two\nlines"\none\n')
    assert [(place.number, place.unit) for place in load_rows(tmp_path / "x.csv").places] == [(2, "line"), (4, "line")]
    assert load_rows(write_parquet(tmp_path / "x.parquet", [{"text": "x"}])).places == [Place("x.parquet", 1, "row")]


def test_the_many_spellings_of_a_chat(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    rows = [
        {"messages": [{"role": "system", "content": ""}, *CHAT]},
        {"messages": [{"role": "USER", "content": "Hi", "name": None}, {"role": "assistant", "content": parts}]},
        {"messages": SHAREGPT},
    ]
    assert load_rows(write_jsonl(tmp_path / "a.jsonl", rows)).rows == [{"messages": CHAT}] * 3
    split = {"prompt": CHAT[:1], "completion": CHAT[1:], "extra": 1}
    assert load_rows(write_jsonl(tmp_path / "b.jsonl", [split])).rows == [{"messages": CHAT, "context": 1}]
    # ultrachat has a prompt beside its messages: the chat is what counts
    assert load_rows(write_jsonl(tmp_path / "c.jsonl", [{"prompt": "Hi", "messages": CHAT}])).format == "messages"
    assert load_rows(write_jsonl(tmp_path / "d.jsonl", [{"instruction": "a", "output": "b"}])).rows == [
        {"instruction": "a", "input": "", "output": "b"}
    ]


BAD = {
    "[1, 2]": "found a list",
    '{"text": "x"': "found no valid JSON (Expecting ',' delimiter at column 13)",
    '{"other": "x"}': "found the columns 'other', needed messages",
    '{"messages": "Hi"}': "messages holds the text 'Hi', needed a list of messages",
    '{"messages": []}': "messages is an empty list",
    '{"messages": [{"role": "user", "content": "Hi"}]}': "no assistant message",
    '{"messages": [{"role": "robot", "content": "Hi"}]}': "messages[0] has role 'robot', needed system, user (human)",
    '{"messages": [{"role": "user", "content": null}]}': "messages[0].content is null, needed text",
    '{"messages": [{"role": "user", "content": 7}]}': "messages[0].content is a number (7), needed text",
    '{"messages": [{"role": "user", "content": " "}]}': "messages[0].content is empty",
    '{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}': "part of type 'image_url', needed text",
    '{"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}': "calls tools",
    '{"messages": [{"role": "user", "content": "\\ud800"}]}': "half of a surrogate pair",
    "\x00": "found no valid JSON",
    "[" * 100_000: "nested too deep",
}


@pytest.mark.parametrize(("line", "what"), BAD.items(), ids=range(len(BAD)))
def test_a_malformed_row_is_named_by_file_line_and_finding(tmp_path: Path, line: str, what: str) -> None:
    path = tmp_path / "chats.jsonl"
    good = json.dumps({"messages": CHAT})
    path.write_text(f"{good}\n\n{line}\n{good}\n")
    with pytest.raises(DataError) as caught:
        load_rows(path)
    message = str(caught.value)
    assert message.startswith("chats.jsonl: line 3: ") and what in message and "--skip-bad-rows" in message
    assert "\n" not in message and len(message) < 400
    rows = load_rows(path, skip_bad=True)
    assert len(rows) == 2 and [place.number for place in rows.places] == [1, 4]
    assert [(bad.place.number, what in bad.message) for bad in rows.skipped] == [(3, True)]


def test_bytes_that_are_no_text_spoil_their_line_only(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n{"text": "b"}\n')
    with pytest.raises(DataError, match=r"a.jsonl: line 2: byte 10 of the line is 0xff, needed UTF-8"):
        load_rows(path)
    assert load_rows(path, skip_bad=True).rows == [{"text": "a"}, {"text": "b"}]


def test_csv_rows_of_the_wrong_width(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,completion\na,b\nc\nd,e,f\ng,h\n")
    with pytest.raises(DataError, match="line 3: found 1 cells, needed 2"):
        load_rows(tmp_path / "a.csv")
    assert len(load_rows(tmp_path / "a.csv", skip_bad=True)) == 2
    (tmp_path / "b.csv").write_text('text\n"open\n')
    with pytest.raises(DataError, match=r"b.csv: line 2: .*mend the quoting"):
        load_rows(tmp_path / "b.csv")
    long = "x" * 300_000
    (tmp_path / "c.csv").write_text(f"text\n{long}\n")
    before = csv.field_size_limit()
    assert load_rows(tmp_path / "c.csv").rows == [{"text": long}] and csv.field_size_limit() == before


BROKEN = {
    "empty.jsonl": (b"", "the file is empty"),
    "blank.json": (b" \n\n", "the file is empty"),
    "none.json": (b"[]", "found no rows"),
    "header.csv": (b"text\n", "found no rows"),
    "cut.json": (b'[{"text": "a"},\n{"text": ', "line 2: found no valid JSON"),
    "comma.json": (b'[{"text": "a"}\n{"text": "b"}]', """line 2: found '{"text": "b"}]' after a row"""),
    "open.json": (b'[{"text": "a"}\n', "found the end of the file after a row"),
    "one.json": (b'{\n"a": {"b": 1}\n}', "found one JSON object with the keys 'a', needed an array of rows"),
    "cut.parquet": (b"PAR1abc", "not a sound Parquet file"),
    "x.pdf": (b"%PDF-1.7", "unknown kind of file '.pdf'; needed .jsonl"),
    "columns.jsonl": (b'{"question": "a", "answer": "b"}', "found 'question, answer', needed the columns of one"),
    "numbers.jsonl": (b"1\n2\n", "found '1', needed the columns of one format: messages; conversations; instruction"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_data_that_cannot_be_used_at_all(tmp_path: Path, name: str) -> None:
    data, what = BROKEN[name]
    (tmp_path / name).write_bytes(data)
    for skip_bad in (False, True):
        with pytest.raises(DataError) as caught:
            load_rows(tmp_path / name, skip_bad=skip_bad)
        assert name in str(caught.value) and what in str(caught.value)


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found a directory, needed a file"):
        load_rows(tmp_path)
    with pytest.raises(DataError, match=r"found no file 'nothing.jsonl'; give a path, or a Hub dataset"):
        load_rows("nothing.jsonl")


def test_holding_rows_back(tmp_path: Path) -> None:
    rows = load_rows(write_jsonl(tmp_path / "a.jsonl", [{"text": str(i)} for i in range(100)]))
    train, held = rows.divide(0.1, seed=3)
    numbers = [int(row["text"]) for row in held.rows]
    assert len(numbers) == 10 and numbers == sorted(numbers) and len(train) == 90
    assert {row["text"] for row in train.rows}.isdisjoint(row["text"] for row in held.rows)
    assert [place.number for place in held.places] == [number + 1 for number in numbers]
    assert rows.divide(0.1, seed=3)[1].rows == held.rows != rows.divide(0.1, seed=4)[1].rows
    assert len(rows.divide(0.0001, seed=0)[1]) == 1
    with pytest.raises(DataError, match="too few to hold"):
        rows.select([0]).divide(0.5, seed=0)


@pytest.fixture
def offline_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place for dataset scripts' caches, and no Hub."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path


def test_a_dataset_that_is_not_in_the_cache(offline_dataset: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_rows("nobody/nothing:train[:1%]")
    assert "nobody/nothing" in str(caught.value) and "Traceback" not in str(caught.value)
