"""README.md as a document: metadata in YAML, prose, and one marked block that is generated.

Everything outside of the marked block and of the keys that are replaced keeps its bytes.

    <!-- qlformat:begin {"license": "1f2e3d4c5b6a", ...} -->
    generated text
    <!-- qlformat:end -->

The first line holds a hash of each metadata value that was generated, so that a later run can tell its own values from
those that a person wrote.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from qlformat.errors import QlfError
from qlformat.file_names import CARD

MAX_BYTES = 4 << 20
"""Limit for a card; the Hub shows none of more than some 200 kB."""

_BOM = "\ufeff"
_FRONT = re.compile(r"(\s*---(?:\r\n|\r|\n))((?:[\S\s]*?(?:\r\n|\r|\n))??)(---[ \t]*(?:\r\n|\r|\n|$))")
"""The metadata: what the Hub and huggingface_hub take for it, and an empty block as well."""
_BEGIN = re.compile(r"^<!-- qlformat:begin(?: (\{.*\}))? -->[ \t]*\r?$", re.MULTILINE)
_END = re.compile(r"^<!-- qlformat:end -->[ \t]*\r?$", re.MULTILINE)
_DIGEST_DIGITS = 12


@dataclass(frozen=True)
class Document:
    """A card, taken apart.

    Attributes:
        start: byte order mark and opening line of the metadata.
        front: the metadata as YAML text, whole lines; None when there is none.
        close: closing line of the metadata.
        before, after: prose around the marked block. Without a block all is in `before`.
        block: the text between the marks; None without a block.
        recorded: metadata key -> hash of the value that was generated.
        newline: how lines end.
    """

    start: str
    front: str | None
    close: str
    before: str
    block: str | None
    after: str
    recorded: Mapping[str, str]
    newline: str

    def metadata(self) -> dict[str, Any]:
        """The metadata as a mapping.

        Raises:
            QlfError: it is no YAML mapping of strings, or has a key twice.
        """
        return _load(self.front) if self.front is not None else {}

    def with_metadata(self, changes: Mapping[str, Any]) -> Document:
        """Replace or add these keys; a value of None removes its key. Other keys keep their text."""
        front = self.front or ""
        for key, value in changes.items():
            front = _with_key(front, key, value, self.newline)
        if self.front is None:
            line = f"---{self.newline}"
            return replace(self, start=f"{self.start}{line}", front=front, close=f"{line}{self.newline}")
        return replace(self, front=front)

    def with_block(self, text: str, recorded: Mapping[str, str]) -> Document:
        """Put a new text between the marks; without marks they come at the end."""
        before = self.before
        if self.block is None and before.strip():
            lines = before.replace("\r\n", "\n")
            before += self.newline * (0 if lines.endswith("\n\n") else 1 if lines.endswith("\n") else 2)
        return replace(self, before=before, block=text, recorded=dict(recorded))

    def text(self) -> str:
        """The whole card."""
        front = f"{self.front}{self.close}" if self.front is not None else ""
        block = ""
        if self.block is not None:
            record = json.dumps(dict(self.recorded), sort_keys=True)
            inside = f"<!-- qlformat:begin {record} -->\n{self.block.strip()}\n<!-- qlformat:end -->\n"
            block = inside.replace("\n", self.newline)
        return f"{self.start}{front}{self.before}{block}{self.after}"


EMPTY = Document("", None, "", "", None, "", {}, "\n")


def parse(data: bytes) -> Document:
    """Take a card apart.

    Raises:
        QlfError: not UTF-8, metadata that never ends, broken YAML, or marks that do not pair.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _bad(f"byte {error.start} is not UTF-8; save the card as UTF-8") from None
    newline = "\r\n" if "\r\n" in text else "\n"
    start, rest = (_BOM, text[1:]) if text.startswith(_BOM) else ("", text)
    front, close = None, ""
    found = _FRONT.match(rest)
    if found:
        start, front, close, rest = start + found[1], found[2], found[3], rest[found.end() :]
        _load(front)
    elif re.match(r"\s*---[ \t]*(\r\n|\r|\n|$)", rest):
        raise _bad("its metadata begins with --- and never ends; close it by a line with --- alone")
    before, block, after, recorded = _block(rest)
    return Document(start, front, close, before, block, after, recorded, newline)


def digest(value: Any) -> str:
    """Short hash of a metadata value."""
    canonical = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:_DIGEST_DIGITS]


def _block(text: str) -> tuple[str, str | None, str, Mapping[str, str]]:
    """(before, block, after, recorded hashes)."""
    begins, ends = list(_BEGIN.finditer(text)), list(_END.finditer(text))
    if not begins and not ends:
        return text, None, "", {}
    if len(begins) != 1 or len(ends) != 1 or ends[0].start() < begins[0].end():
        raise _bad(
            f"found {len(begins)} lines <!-- qlformat:begin --> and {len(ends)} <!-- qlformat:end -->, needed one of "
            "each in this order; delete what is left of the generated block, it is made anew"
        )
    begin, end = begins[0], ends[0]
    try:
        recorded = json.loads(begin[1] or "{}")
    except ValueError:
        recorded = {}
    after = text[end.end() :]
    for ending in ("\r\n", "\n"):
        if after.startswith(ending):
            after = after[len(ending) :]
            break
    known = {str(key): str(value) for key, value in recorded.items()} if isinstance(recorded, dict) else {}
    return text[: begin.start()], text[begin.end() : end.start()], after, known


def _load(front: str) -> dict[str, Any]:
    import yaml

    try:
        node = yaml.compose(front, yaml.SafeLoader)
        value = yaml.safe_load(front)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 2 if error.problem_mark else 1
        problem = " ".join(str(error.problem or "cannot be read").split())
        raise _bad(f"its metadata is broken YAML in line {line}: {problem[:120]}; correct it") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problem = " ".join(str(error).split())
        raise _bad(f"its metadata is broken YAML: {problem[:120]}; correct it") from None
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise _bad(f"its metadata is a YAML {type(value).__name__}, needed keys with values")
    names = [key.value for key, _ in node.value]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise _bad(f"its metadata has the key {twice[0]!r} twice, which the Hub refuses; delete one")
    return value


def _with_key(front: str, key: str, value: Any, newline: str) -> str:
    """The YAML text with one key replaced, added or removed."""
    from huggingface_hub.utils import yaml_dump  # type: ignore[attr-defined]  # public, but without __all__

    dumped = "" if value is None else yaml_dump({key: value}, sort_keys=False, line_break=newline).rstrip() + newline
    spans = dict(_spans(front))
    if spans and min(begin for begin, _ in spans.values()) < 0:  # a mapping in braces: written anew as a whole
        return _rewritten(front, key, value, newline)
    if key in spans:
        begin, end = spans[key]
        return front[:begin] + dumped + front[end:]
    if front and not front.endswith(("\n", "\r")):
        front += newline
    return front + dumped


def _spans(front: str) -> Iterator[tuple[str, tuple[int, int]]]:
    """Key -> (begin, end) of its lines, without comments and blank lines that follow it; (-1, -1) in braces."""
    import yaml

    node = yaml.compose(front, yaml.SafeLoader)
    if node is None:
        return
    starts = [key.start_mark.index for key, _ in node.value] + [len(front)]
    for position, (key, _) in enumerate(node.value):
        if node.flow_style or key.start_mark.column:
            yield key.value, (-1, -1)
            continue
        lines = front[starts[position] : starts[position + 1]].splitlines(keepends=True)
        while len(lines) > 1 and (not lines[-1].strip() or lines[-1].startswith(("#", "..."))):
            lines.pop()
        yield key.value, (starts[position], starts[position] + sum(map(len, lines)))


def _rewritten(front: str, key: str, value: Any, newline: str) -> str:
    from huggingface_hub.utils import yaml_dump  # type: ignore[attr-defined]  # public, but without __all__

    whole = {**_load(front), key: value}
    kept = {name: found for name, found in whole.items() if found is not None}
    return str(yaml_dump(kept, sort_keys=False, line_break=newline)).rstrip() + newline


def _bad(message: str) -> QlfError:
    return QlfError(message, file=CARD)
