"""Raw rows of JSONL, JSON, CSV and Parquet files, each with its place; a bad line does not end the reading."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from qlformat.errors import shown
from qlformat.finetune.rows import DataError, Place, RowError

RawRow = tuple[Place, object]
"""(place, the row as it was read, or the RowError that it raised)."""

_SUFFIXES: Mapping[str, str] = MappingProxyType(
    {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"}
)
_SPACE = re.compile(r"[ \t\r\n]*")
_MAX_CELL = (1 << 31) - 1
_BATCH_ROWS = 1000


def read_raw(path: Path) -> Iterator[RawRow]:
    """The raw rows of a file, whose kind is told by its suffix, or by its first bytes where the suffix is unknown.

    Raises:
        DataError: the file cannot be read, is of no known kind, or is broken as a whole.
    """
    readers: Mapping[str, Callable[[Path], Iterator[RawRow]]] = {
        "jsonl": _jsonl,
        "json": _json,
        "csv": lambda path: _csv(path, ","),
        "tsv": lambda path: _csv(path, "\t"),
        "parquet": _parquet,
    }
    try:
        yield from readers[_kind(path)](path)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", file=path.name) from None


def _kind(path: Path) -> str:
    if path.is_dir():
        raise DataError(f"found a directory, needed a file: one of {', '.join(_SUFFIXES)}", file=str(path))
    with path.open("rb") as file:
        start = file.read(1 << 16)
    if not start.strip():
        raise DataError("the file is empty; give a file with rows to train on", file=path.name)
    if start.startswith(b"PAR1"):
        return "parquet"
    kind = _SUFFIXES.get(path.suffix.lower())
    first = start.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if kind in ("json", None) and first in (b"[", b"{"):
        return "json" if first == b"[" or not _is_object(start.strip().split(b"\n", 1)[0]) else "jsonl"
    if kind is None:
        raise DataError(f"unknown kind of file {shown(path.suffix)}; needed {', '.join(_SUFFIXES)}", file=path.name)
    return kind


def _is_object(line: bytes) -> bool:
    """Whether one line of a file is a whole JSON object, so that the file has one a line, whatever its suffix says."""
    try:
        return isinstance(json.loads(line.decode("utf-8-sig")), dict)
    except (ValueError, RecursionError):
        return False


def _parse(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        column = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        return RowError(f"found no valid JSON ({reason}{column}): {shown(text[:60])}")
    except RecursionError:
        return RowError("the JSON is nested too deep")


def _jsonl(path: Path) -> Iterator[RawRow]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            data = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if not data.strip():
                continue
            try:
                row = _parse(data.decode().strip())
            except UnicodeDecodeError as error:
                row = RowError(f"byte {error.start} of the line is 0x{data[error.start]:02x}, needed UTF-8 text")
            yield Place(path.name, number), row


def _json(path: Path) -> Iterator[RawRow]:
    """An array of rows, or an object with one such array; each row is placed by the line that it begins on."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"byte {error.start} is not UTF-8 text", file=path.name) from None
    start = _array_start(text, path)
    decoder, position, line, counted = json.JSONDecoder(), start + 1, 1, 0
    while True:
        position = _after_space(text, position)
        if text[position : position + 1] == "]":
            return
        line, counted = line + text.count("\n", counted, position), position
        try:
            row, position = decoder.raw_decode(text, position)
        except (json.JSONDecodeError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deep"
            at = error.lineno if isinstance(error, json.JSONDecodeError) else line
            raise DataError(f"line {at}: found no valid JSON ({reason}); mend the file", file=path.name) from None
        yield Place(path.name, line), row
        position = _after_space(text, position)
        if text[position : position + 1] == ",":
            position += 1
        elif text[position : position + 1] != "]":
            line += text.count("\n", counted, position)
            found = shown(text[position : position + 20]) if position < len(text) else "the end of the file"
            raise DataError(f"line {line}: found {found} after a row, needed ',' or ']'; mend the file", file=path.name)


def _array_start(text: str, path: Path) -> int:
    """Position of the '[' of the array of rows."""
    begin = _after_space(text, 0)
    if text[begin] == "[":
        return begin
    try:
        root = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"found no valid JSON ({error}); mend the file", file=path.name) from None
    lists = [key for key, value in root.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    key = re.search(rf'"{re.escape(lists[0])}"\s*:\s*\[', text) if len(lists) == 1 else None
    if key is None:
        raise DataError(
            f"found one JSON object with the keys {shown(', '.join(root))}, needed an array of rows", file=path.name
        )
    return key.end() - 1


def _after_space(text: str, position: int) -> int:
    found = _SPACE.match(text, position)
    return found.end() if found else position


def _csv(path: Path, delimiter: str) -> Iterator[RawRow]:
    limit = csv.field_size_limit(_MAX_CELL)  # a conversation is longer than the default of 128 kB
    try:
        text = path.read_bytes().decode("utf-8-sig")
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        header = next(reader)
        yield from _csv_rows(path, reader, header)
    except UnicodeDecodeError as error:
        raise DataError(f"byte {error.start} is not UTF-8 text", file=path.name) from None
    except csv.Error as error:
        raise DataError(f"line {reader.line_num}: {error}; mend the quoting", file=path.name) from None
    finally:
        csv.field_size_limit(limit)


def _csv_rows(path: Path, reader: Any, header: list[str]) -> Iterator[RawRow]:
    before = reader.line_num
    for cells in reader:
        place = Place(path.name, before + 1)
        before = reader.line_num
        if not cells:
            continue
        if len(cells) != len(header):
            yield place, RowError(f"found {len(cells)} cells, needed {len(header)} as in the header")
        else:
            yield place, dict(zip(header, cells, strict=True))


def _parquet(path: Path) -> Iterator[RawRow]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise DataError("reading Parquet needs pyarrow: pip install 'qlformat[finetune]'", file=path.name) from None
    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=_BATCH_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield Place(path.name, number, "row"), row
    except pyarrow.ArrowException as error:
        reason = str(error).strip().split("\n")[0][:160]
        raise DataError(f"not a sound Parquet file: {reason}", file=path.name) from None
