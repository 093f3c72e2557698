"""What a card says, before it is put into README.md; and the small things that cards are made of."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlformat.errors import QlfError
from qlformat.layout import strict_json

AUTHOR = "qlformat"


@dataclass(frozen=True)
class Content:
    """A card.

    Attributes:
        title: heading of a new card; of a card that exists it is prose, and stays.
        metadata: keys of the metadata with their values; None for one that is not known.
        sections: the text of the marked block.
        notes: what the author should know.
    """

    title: str
    metadata: Mapping[str, Any]
    sections: str
    notes: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class Inherited:
    """What a card takes over from that of the model it was made from.

    Attributes:
        license, license_name, license_link, language, pipeline_tag: as there, or None.
        notes: why something is missing.
    """

    license: str | list[str] | None = None
    license_name: str | None = None
    license_link: str | None = None
    language: str | list[str] | None = None
    pipeline_tag: str | None = None
    notes: tuple[str, ...] = field(default=())

    def metadata(self) -> dict[str, Any]:
        """The keys of the licence and the language."""
        names = ("license", "license_name", "license_link", "language")
        return {name: getattr(self, name) for name in names}


def read_object(path: Path) -> dict[str, Any]:
    """A small JSON file as an object; QlfError when it is none."""
    try:
        root = strict_json(path.read_bytes())
    except ValueError as error:
        raise QlfError(f"not valid JSON: {error}", file=path.name) from None
    if not isinstance(root, dict):
        raise QlfError("found JSON that is not an object", file=path.name)
    return root


def section(title: str, *parts: str) -> str:
    """A heading with paragraphs; nothing without any."""
    filled = [part for part in parts if part]
    return "\n\n".join([f"## {title}", *filled]) if filled else ""


def join(*sections: str) -> str:
    """The sections that are not empty."""
    return "\n\n".join(part for part in sections if part)


def table(headers: Sequence[str], rows: Iterable[Sequence[object]], right: frozenset[int] = frozenset()) -> str:
    """A Markdown table; empty without rows. Columns in `right` are aligned to the right."""
    found = [[cell(value) for value in row] for row in rows]
    if not found:
        return ""
    rule = ["---:" if column in right else "---" for column in range(len(headers))]
    return "\n".join(f"| {' | '.join(row)} |" for row in [list(headers), rule, *found])


def cell(value: object) -> str:
    """Text for a table: one line, and nothing that Markdown would take for the end of a cell or for HTML."""
    text = " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())
    return text.replace("|", "\\|").replace("<", "&lt;")


def code(value: object) -> str:
    """A name or hash, set as code."""
    return f"`{str(value).replace('`', '')}`"


def place(repo_id: str | None, revision: str | None) -> str:
    """A repository at a commit."""
    if repo_id is None:
        return "local files"
    return f"{code(repo_id)} at commit {code(revision)}" if revision else code(repo_id)


def size(count: int) -> str:
    """Bytes for people, decimal: 269.1 MB."""
    value, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.95 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{count} B" if units[0] == "B" else f"{value:.1f} {units[0]}"


def number(count: int) -> str:
    """A count with separators: 134,515,008."""
    return f"{count:,}"


def version(package: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def installed(*packages: str) -> list[tuple[str, str]]:
    """(name, version) of those that are installed."""
    return [(name, found) for name in packages if (found := version(name))]
