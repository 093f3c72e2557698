"""Parts of the pages: who reads them, rows, and what is shown of a card's metadata or a file's content."""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from starlette.requests import Request

from qlformat.hub_server import card_metadata
from qlformat.hub_server.index import File, Repo
from qlformat.hub_server.tokens import Identity

_MAX_PAGE = 1_000_000

PICTURES = {
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".gif": "image/gif",
    ".webp": "image/webp",
    ".svg": "image/svg+xml",
}


@dataclass(frozen=True)
class Reader:
    """Who looks at a page, and where.

    Attributes:
        open: whether the hub has no tokens, so that there is nothing to sign in for.
        endpoint: the hub's address as the browser wrote it.
        here: the page's address.
    """

    identity: Identity
    open: bool
    endpoint: str
    here: str

    @property
    def signed_in(self) -> bool:
        """Whether a token came along."""
        return self.identity.known and not self.open

    @property
    def name(self) -> str:
        """Of the one who is signed in."""
        return self.identity.name


@dataclass(frozen=True)
class Row:
    """A repository in the list."""

    repo: Repo
    kind: str
    base: str
    license: str
    files: int
    size: int

    @property
    def address(self) -> str:
        """Of its page."""
        return address_of(self.repo)

    @property
    def namespace(self) -> str:
        """The name's first part."""
        return self.repo.name.partition("/")[0]

    @property
    def short(self) -> str:
        """The name's second part."""
        return self.repo.name.partition("/")[2]


@dataclass(frozen=True)
class Crumb:
    """A folder above the one that is shown."""

    name: str
    path: str


def address_of(repo: Repo) -> str:
    """The address of a repository's page."""
    return f"/{repo.name}" if repo.type == "model" else f"/{repo.type}s/{repo.name}"


def part(revision: str) -> str:
    """A revision as one part of an address."""
    return quote(revision, safe="")


def page_number(request: Request) -> int:
    """The page of a list that the address asks for; the first is 1, and what is no number."""
    text = request.query_params.get("page", "1")
    return min(max(int(text), 1), _MAX_PAGE) if text.isascii() and text.isdigit() and len(text) < 10 else 1


def picture_type(path: str) -> str | None:
    """The media type of a picture by its name; None for other files."""
    return PICTURES.get(posixpath.splitext(path)[1].lower())


def text_of(content: bytes | None) -> str | None:
    """A text file's text; None for what is none."""
    try:
        text = None if content is None else content.decode()
    except UnicodeDecodeError:
        return None
    return None if text is None or "\x00" in text else text


def problem_of(readme: File | None, content: bytes | None) -> str:
    """Why a card cannot be shown as it is, or ""."""
    if readme is None:
        return ""
    if content is None:
        return f"The card is too long to be shown ({readme.size:,} bytes); read it among the files"
    try:
        card_metadata.parse(content)
    except card_metadata.BrokenCard as broken:
        return str(broken)[:1].upper() + str(broken)[1:]
    return ""


_META = (
    ("License", "license", ""),
    ("Base", "base_model", "model"),
    ("Library", "library_name", ""),
    ("Task", "pipeline_tag", ""),
    ("Language", "language", ""),
    ("Datasets", "datasets", "dataset"),
    ("Tags", "tags", ""),
)


@dataclass(frozen=True)
class Fact:
    """A line of a card's metadata.

    Attributes:
        values: (text, address of its page or None).
    """

    label: str
    values: tuple[tuple[str, str | None], ...]


def facts_of(metadata: Mapping[str, Any], find: Callable[[str, str], str | None]) -> list[Fact]:
    """What a card says, cut to a sane length.

    Args:
        metadata: of the card.
        find: the address of a repository that the reader may see, by type and name.
    """
    found = []
    for label, key, type_ in _META:
        value = metadata.get(key)
        items = value[:30] if isinstance(value, list) else [value]
        texts = [item[:200] for item in items if isinstance(item, str) and item]
        if texts:
            found.append(Fact(label, tuple((text, find(type_, text) if type_ else None) for text in texts)))
    return found


def first_text(value: object) -> str:
    """A text, or the first one of a list."""
    first = value[0] if isinstance(value, list) and value else value
    return first[:200] if isinstance(first, str) else ""
