"""Everything that the commands print: text or one JSON object on stdout, errors on stderr.

Names come from files of strangers. All text is cleaned on its way out, so that none of it can steer a terminal.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TextIO

import click


def clean(text: str) -> str:
    """Text as one line without control characters: each becomes a visible escape."""
    return text if text.isprintable() else "".join(c if c.isprintable() else _escape(c) for c in text)


def _escape(char: str) -> str:
    code = ord(char)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"


def line(text: str = "", *, bold: bool = False) -> None:
    """Print one line on stdout."""
    _write(sys.stdout, text, bold=bold)


def lines(texts: Iterable[str]) -> None:
    """Print lines on stdout."""
    for text in texts:
        line(text)


def error(prefix: str, message: str) -> None:
    """Print one line on stderr."""
    stream = sys.stderr
    shown = click.style(prefix, fg="red", bold=True) if colored(stream) else prefix
    click.echo(shown + _encodable(clean(message), stream), file=stream)


def emit_json(value: Mapping[str, Any]) -> None:
    """Print one JSON object on stdout: ASCII, so that no byte of it can steer a terminal either."""
    import json  # help does without

    click.echo(json.dumps(value, indent=2).replace("\x7f", "\\u007f"))


def colored(stream: TextIO) -> bool:
    """Whether colors and bold may be used: a terminal, and the user has not set NO_COLOR."""
    return interactive(stream) and not os.environ.get("NO_COLOR")


def interactive(stream: TextIO) -> bool:
    """Whether the stream is a terminal that can move its cursor."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def _write(stream: TextIO, text: str, *, bold: bool = False) -> None:
    shown = _encodable(clean(text), stream)
    click.echo(click.style(shown, bold=True) if bold and colored(stream) else shown, file=stream)


def _encodable(text: str, stream: TextIO) -> str:
    """Replace what the stream's encoding lacks: a name must not make the report of it fail."""
    encoding = stream.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], right: frozenset[int] = frozenset()) -> None:
    """Print rows under headers: drawn to the width of a terminal, or whole and aligned for a pipe.

    Args:
        headers: one per column.
        rows: the cells, as text.
        right: indices of the columns to align right.
    """
    if interactive(sys.stdout):
        _draw(headers, rows, right)
        return
    cells = [[clean(cell) for cell in row] for row in [headers, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(headers))]
    for row in cells:
        padded = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        line("  ".join(padded).rstrip())


def _draw(headers: Sequence[str], rows: Sequence[Sequence[str]], right: frozenset[int]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column, header in enumerate(headers):
        drawn.add_column(header, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(clean(cell)) for cell in row))
    Console(highlight=False).print(drawn)


def size(count: int) -> str:
    """Bytes for people, decimal: 269.1 MB."""
    return _scaled(count, ("B", "kB", "MB", "GB", "TB", "PB"))


def number(count: int) -> str:
    """A count for people: 134.5 M."""
    return _scaled(count, ("", "k", "M", "B", "T", "Q")).rstrip()


def _scaled(count: int, units: Sequence[str]) -> str:
    value, step = float(count), 0
    while value >= 999.95 and step < len(units) - 1:
        value, step = value / 1000, step + 1
    return f"{value:.1f} {units[step]}" if step else f"{count} {units[0]}"


def share(part: int, whole: int) -> str:
    """A percentage of two digits at least: 21.1 %, 0.03 %."""
    percent = 100 * part / whole if whole else 0.0
    if percent in (0.0, 100.0):
        return f"{percent:.0f} %"
    if percent > 99.95:
        return "over 99.9 %"
    return f"{percent:.1f} %" if percent >= 1 else f"{percent:.2g} %" if percent >= 0.01 else "under 0.01 %"


def seconds(value: float) -> str:
    """A duration for people: 0.84 s, 12.3 s, 3 min 20 s, 2 h 05 min."""
    if value < 9.995:
        return f"{value:.2f} s"
    if value < 59.95:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def speed(count: int, took: float) -> str:
    """Throughput for people, decimal: 1.3 GB/s."""
    return f"{size(round(count / max(took, 1e-9)))}/s"
