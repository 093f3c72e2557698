"""A page as a test reads it: its text, links, and whatever should not be there."""

from __future__ import annotations

from html.parser import HTMLParser

_ACTIVE = {"audio", "base", "embed", "iframe", "math", "object", "script", "style", "svg", "video"}
_APART = {"dd", "div", "dt", "li", "span", "td", "th"}
_VOID = {"br", "hr", "img", "input", "link", "meta", "wbr"}


class Page(HTMLParser):
    """A page taken apart.

    Attributes:
        text: what a reader sees, with single spaces.
        links: (address, text) of every link.
        dangers: elements and attributes that run, load from elsewhere, or carry style.
        duplicates: ids that occur more than once.
        unlabelled: fields without a label, pictures without alt.
        unclosed: whether elements are closed in another order than they were opened.
    """

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.links: list[tuple[str, str]] = []
        self.dangers: list[str] = []
        self.duplicates: list[str] = []
        self.unclosed: list[str] = []
        self._pieces: list[str] = []
        self._ids: set[str] = set()
        self._labels: set[str] = set()
        self._fields: list[tuple[str, bool]] = []
        self._open: list[str] = []
        self.feed(markup)
        self.text = " ".join("".join(self._pieces).split())
        self.unlabelled = [name for name, named in self._fields if not named and name not in self._labels]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if tag in _APART and values.get("class") != "namespace":
            self._pieces.append(" ")
        self._open += [tag] if tag not in _VOID else []
        if tag in _ACTIVE:
            self.dangers.append(tag)
        for name, value in values.items():
            text = value.strip().lower()
            if (
                name.startswith("on")
                or name in ("style", "srcset", "srcdoc", "ping", "http-equiv")
                or "script:" in text
            ):
                self.dangers.append(f"{tag} {name}={value}")
            if (name == "src" or (tag == "link" and name == "href")) and (text[:1] != "/" or text[1:2] in ("/", "\\")):
                self.dangers.append(f"{tag} {name}={value}")
        if "id" in values:
            self.duplicates += [values["id"]] if values["id"] in self._ids else []
            self._ids.add(values["id"])
        if tag == "label":
            self._labels.add(values.get("for", ""))
        if tag == "input" and values.get("type") != "hidden":
            self._fields.append((values.get("id", ""), "aria-label" in values))
        if tag == "img":
            self._fields.append((f"img {values.get('src')}", "alt" in values))
        if tag == "a":
            self.links.append((values.get("href", ""), ""))

    def handle_endtag(self, tag: str) -> None:
        if tag not in _VOID and (not self._open or self._open.pop() != tag):
            self.unclosed.append(tag)

    def handle_data(self, data: str) -> None:
        if "title" in self._open[-1:]:
            return
        self._pieces.append(data)
        if "a" in self._open and self.links:
            address, text = self.links[-1]
            self.links[-1] = address, text + data
