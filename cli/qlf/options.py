"""Options and argument types that several commands share."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

CONTEXT: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 100}

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?)b?|b)?", re.IGNORECASE)
_POWER = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def parse_size(text: str) -> int:
    """Bytes of a size such as 5GB (decimal, as the Hub counts), 2GiB (binary), 500MB or 1000000.

    Raises:
        ValueError: not a size, or less than one byte.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a size; write 5GB, 500MB or 2GiB")
    from decimal import Decimal  # exact, and needed only by who gives a size

    number, unit, binary = match.groups()
    size = int(Decimal(number) * (1024 if binary else 1000) ** _POWER[(unit or "").lower()])
    if not 1 <= size < 1 << 62:
        raise ValueError(f"{text!r} is out of range; write 5GB, 500MB or 2GiB")
    if text.strip().isdigit() and size < 1_000_000:
        raise ValueError(f"{text!r} has no unit and would be bytes; write {text.strip()}GB or {text.strip()}B")
    return size


class Location(click.Path):
    """A path or a Hub repository: any text but the empty one, which is what an unset shell variable leaves."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The value as it is, or as `path_type`."""
        if not str(value):
            self.fail("it is empty; is a shell variable unset?", param, ctx)
        return super().convert(value, param, ctx)


class _Count(click.IntRange):
    name = "whole number"


def _size(ctx: click.Context, param: click.Parameter, value: str) -> int:
    try:
        return parse_size(value)
    except ValueError as error:
        raise click.BadParameter(str(error), ctx, param) from None


shard_size = click.option(
    "--shard-size", callback=_size, default="5GB", show_default=True, metavar="SIZE", help="Largest size of one file."
)

threads = click.option(
    "--threads",
    type=_Count(min=1),
    metavar="N",
    help="CPU threads; all by default. The result never depends on it.",
)

overwrite = click.option("--overwrite", is_flag=True, help="Replace OUT if it exists.")

allow_base_mismatch = click.option(
    "--allow-base-mismatch", is_flag=True, help="Use an adapter that belongs to another base all the same."
)

quiet = click.option("-q", "--quiet", is_flag=True, help="No progress on stderr.")


def common(command: F) -> F:
    """Add --json and --debug, which every command has."""
    debug = click.option(
        "--debug",
        is_flag=True,
        expose_value=False,
        help="Show the traceback of an error (also QLF_DEBUG=1).",
    )
    as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
    return as_json(debug(command))
