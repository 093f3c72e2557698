"""What is printed can neither steer a terminal nor fail for a name, and numbers read well."""

from __future__ import annotations

import io
import json

import pytest
from qlf import options, output

NASTY = "model\x1b[2J\x07\r\n\x7f\x9b31m\u202eweight\ud800"


def test_clean_leaves_printable_text_alone() -> None:
    assert output.clean("Größe 重み.weight") == "Größe 重み.weight"


def test_clean_shows_what_would_steer_a_terminal() -> None:
    shown = output.clean(NASTY)
    assert shown.isprintable()
    assert shown == "model\\x1b[2J\\x07\\x0d\\x0a\\x7f\\x9b31m\\u202eweight\\ud800"


def test_lines_and_tables_are_cleaned(capsys: pytest.CaptureFixture[str]) -> None:
    output.line(NASTY)
    output.table(["name", "n"], [[NASTY, "1"]], frozenset({1}))
    output.error("qlf: error: ", NASTY)
    captured = capsys.readouterr()
    for line in (captured.out + captured.err).split("\n"):
        assert line.isprintable()


def test_json_is_ascii_and_keeps_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    output.emit_json({"name": NASTY})
    text = capsys.readouterr().out
    assert all(character == "\n" or 32 <= ord(character) < 127 for character in text)
    assert json.loads(text) == {"name": NASTY}


def test_a_stream_that_lacks_a_character_gets_an_escape() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    assert output._encodable("Größe", stream) == "Gr\\xf6\\xdfe"


def test_table_is_aligned_and_whole_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    output.table(["tensor", "bytes"], [["a" * 120, "1"], ["b", "22"]], frozenset({1}))
    assert capsys.readouterr().out == f"{'tensor':120}  bytes\n{'a' * 120}      1\n{'b':120}     22\n"


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_949, "999.9 kB"),
        (999_950, "1.0 MB"),
        (269_100_000, "269.1 MB"),
    ],
)
def test_size(count: int, text: str) -> None:
    assert output.size(count) == text


@pytest.mark.parametrize(("count", "text"), [(7, "7"), (134_515_008, "134.5 M"), (1_100_000_000, "1.1 B")])
def test_number(count: int, text: str) -> None:
    assert output.number(count) == text


@pytest.mark.parametrize(
    ("part", "whole", "text"),
    [
        (0, 0, "0 %"),
        (0, 5, "0 %"),
        (5, 5, "100 %"),
        (9_999, 10_000, "over 99.9 %"),
        (211, 1000, "21.1 %"),
        (3, 10_000, "0.03 %"),
        (1, 10**9, "under 0.01 %"),
    ],
)
def test_share_never_rounds_to_none_or_all(part: int, whole: int, text: str) -> None:
    assert output.share(part, whole) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.844, "0.84 s"), (9.994, "9.99 s"), (12.34, "12.3 s"), (59.94, "59.9 s"), (59.96, "1 min 00 s"),
     (200.2, "3 min 20 s"), (7500, "2 h 05 min")],
)  # fmt: skip
def test_seconds(value: float, text: str) -> None:
    assert output.seconds(value) == text


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("5gb", 5 * 10**9), ("5G", 5 * 10**9), ("2GiB", 2 << 30), ("500MB", 5 * 10**8),
     ("1.5 kB", 1500), ("1KiB", 1024), ("1000000", 10**6), ("12B", 12), ("1TB", 10**12),
     ("4611686018427387903", (1 << 62) - 1)],
)  # fmt: skip
def test_parse_size(text: str, size: int) -> None:
    assert options.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5XB", "-5GB", "5 G B", "1e9", "0", "0.1B", "9999999TB", "nan", "5GB\n5"])
def test_parse_size_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="write 5GB, 500MB or 2GiB"):
        options.parse_size(text)
