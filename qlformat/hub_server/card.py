"""A model card for the browser: its Markdown as HTML from which everything that acts was removed.

Cards are written by whoever may push, and read by everybody. What is left of one cannot run code, load anything from
another site, send anything, or look like a part of the page around it. The pages' Content-Security-Policy is the
second wall.
"""

from __future__ import annotations

import posixpath
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from html import escape
from itertools import pairwise
from urllib.parse import quote, unquote, urlsplit

import nh3
from markdown_it import MarkdownIt
from markdown_it.rules_core import StateCore
from markdown_it.token import Token

MAX_BYTES = 512 << 10
"""Longer cards are not rendered."""

_MAX_PARAGRAPH = 16 << 10
"""Characters; the time for one paragraph grows with the square of its length when it is made to."""
_MAX_DEPTH = 500
"""Elements inside each other; the sanitiser's time grows with it, and browsers stop at about as many."""

_FRONT = re.compile(r"\A\ufeff?\s*---[ \t]*\r?\n(?:.*?\r?\n)??---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_TAG = re.compile(r"<(/?)([a-zA-Z][^\s/>]*)")
_VOID = frozenset(("br", "hr", "img", "input", "link", "meta", "source", "wbr", "col", "area", "embed", "base"))
_NOT_IN_A_SLUG = re.compile(r"[^\w\- ]+")
_ID_PREFIX = "card-"
_MAX_SLUG = 200

_TAG_NAMES = """
  a abbr b blockquote br caption center code dd del details div dl dt em h1 h2 h3 h4 h5 h6 hr i img ins kbd li mark
  ol p pre q rp rt ruby s samp small span strong sub summary sup table tbody td tfoot th thead tr u ul var
"""
TAGS = frozenset(_TAG_NAMES.split())
_ATTRIBUTES: dict[str, set[str]] = {
    "*": {"id", "title", "lang", "dir"},
    "a": {"href"},
    "img": {"src", "alt", "width", "height", "align"},
    "ol": {"start"},
    "details": {"open"},
    "td": {"align", "colspan", "rowspan"},
    "th": {"align", "colspan", "rowspan"},
    "p": {"align"},
    "div": {"align"},
    **{f"h{level}": {"align"} for level in range(1, 7)},
}
_DROPPED_WITH_CONTENT = {
    "iframe",
    "math",
    "noscript",
    "object",
    "script",
    "style",
    "svg",
    "template",
    "textarea",
    "title",
}
_SCHEMES = {"http", "https", "mailto"}


def body(content: bytes) -> str:
    """The Markdown of a README.md, without its metadata; "" for one that is too long to be shown."""
    if len(content) > MAX_BYTES:
        return ""
    text = content.decode("utf-8", errors="replace").replace("\x00", "\ufffd")
    return _FRONT.sub("", text, count=1)


@dataclass(frozen=True)
class Addresses:
    """Where relative links of a card lead.

    Attributes:
        files: address of the pages of the revision's files, without a closing slash.
        contents: address of their bytes.
        folder: where the card lies in the repository; "" is the root.
    """

    files: str
    contents: str
    folder: str = ""


def render(markdown: str, addresses: Addresses) -> str:
    """The Markdown as safe HTML.

    Pictures of the repository are shown; of those elsewhere only the description is left. Headings are one level
    lower than in the source, under the page's own. Ids and links within the card get a prefix.
    """
    tokens = _markdown().parse(markdown)
    _lower_headings(tokens)
    for token in tokens:
        _move_alignment(token)
    markup = _markdown().renderer.render(tokens, _markdown().options, {})
    if _depth(markup) > _MAX_DEPTH:
        return as_code(markdown)
    return nh3.clean(
        markup,
        tags=set(TAGS),
        clean_content_tags=_DROPPED_WITH_CONTENT,
        attributes=_ATTRIBUTES,
        attribute_filter=_attribute_filter(addresses),
        url_schemes=_SCHEMES,
        link_rel="nofollow noopener noreferrer",
    )


def as_code(text: str) -> str:
    """A text file as HTML."""
    return f"<pre><code>{escape(text)}</code></pre>"


@cache
def _markdown() -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    parser.core.ruler.at("inline", _parse_paragraphs)
    return parser


def _parse_paragraphs(state: StateCore) -> None:
    """markdown-it's rule for the text within blocks; of an absurdly long paragraph only the beginning is shown."""
    for token in state.tokens:
        if token.type == "inline":
            token.children = []
            if len(token.content) <= _MAX_PARAGRAPH:
                state.md.inline.parse(token.content, state.md, state.env, token.children)
            else:
                token.children.append(Token("text", "", 0, content=f"{token.content[:1000]}…"))


def _depth(markup: str) -> int:
    """An upper bound of how many elements lie inside each other."""
    depth = most = 0
    for closing, name in _TAG.findall(markup):
        if closing:
            depth = max(depth - 1, 0)
        elif name.lower() not in _VOID:
            depth += 1
            most = max(most, depth)
    return most


def _lower_headings(tokens: list[Token]) -> None:
    """h1 becomes h2, and so on; each gets an id made of its text, as links within cards expect."""
    used: dict[str, int] = {}
    for token, inline in pairwise(tokens):
        if token.type == "heading_open":
            slug = slug_of(inline.content)
            count = used[slug] = used.get(slug, -1) + 1
            token.attrs["id"] = f"{slug}-{count}" if count else slug
    for token in tokens:
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{min(int(token.tag[1]) + 1, 6)}"


def slug_of(heading: str) -> str:
    """The id of a heading, as GitHub and the Hub make it."""
    plain = unicodedata.normalize("NFC", heading).lower().strip()
    return _NOT_IN_A_SLUG.sub("", plain).replace(" ", "-")[:_MAX_SLUG]


def _move_alignment(token: Token) -> None:
    """Tables are aligned by a style, which the policy of the pages forbids; the old attribute does the same."""
    style = str(token.attrs.pop("style", ""))
    if style.startswith("text-align:"):
        token.attrs["align"] = style.removeprefix("text-align:")


def _attribute_filter(addresses: Addresses) -> Callable[[str, str, str], str | None]:
    def choose(tag: str, attribute: str, value: str) -> str | None:
        if attribute == "id":
            return _ID_PREFIX + value
        if attribute == "href":
            return _href(value, addresses)
        if attribute == "src":
            return _source(value, addresses)
        return value

    return choose


def _href(value: str, addresses: Addresses) -> str | None:
    if value.startswith("#"):
        return f"#{_ID_PREFIX}{value[1:]}"
    return value if _leads_elsewhere(value) else _relative(value, addresses.files, addresses.folder)


def _source(value: str, addresses: Addresses) -> str | None:
    """The address of a picture; None for one of another site, which would learn who reads the card."""
    return None if _leads_elsewhere(value) else _relative(value, addresses.contents, addresses.folder)


def _leads_elsewhere(value: str) -> bool:
    """Whether an address is more than a path relative to the card; browsers take a backslash for a slash."""
    try:
        return bool(urlsplit(value).scheme) or value.lstrip().startswith(("/", "\\"))
    except ValueError:
        return True


def _relative(value: str, prefix: str, folder: str) -> str | None:
    """The address of a file of the repository, or None where the path leads out of it."""
    parts = urlsplit(value)
    path = posixpath.normpath(posixpath.join(folder, unquote(parts.path).replace("\\", "/")))
    if path.startswith(("..", "/")):
        return None
    fragment = f"#{quote(parts.fragment)}" if parts.fragment else ""
    return prefix + ("" if path == "." else f"/{quote(path)}") + fragment
