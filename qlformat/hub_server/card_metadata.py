"""The YAML at the head of a README.md, and the tags that lists are filtered by."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

MAX_BYTES = 64 << 10
"""Of the YAML; a longer one is taken as broken."""

_BLOCK = re.compile(r"\A\ufeff?\s*---[ \t]*\r?\n(.*?)(?:\r?\n)?---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_LISTED = {"language": "", "license": "license:", "datasets": "dataset:", "tags": ""}
_BEGINNING = 4 * MAX_BYTES


class BrokenCard(ValueError):
    """The metadata cannot be read; the message is one line."""


def parse(content: bytes) -> Mapping[str, Any]:
    """The metadata of a README.md, as JSON values; {} if it has none.

    Raises:
        BrokenCard: not UTF-8, not YAML, not a mapping, too long, or with aliases (which can grow without bound).
    """
    try:
        text = content[:_BEGINNING].decode("utf-8", errors="strict" if len(content) <= _BEGINNING else "ignore")
    except UnicodeDecodeError as error:
        raise BrokenCard(f"README.md is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    block = _BLOCK.match(text)
    if block is None or not block[1].strip():
        return {}
    if len(block[1]) > MAX_BYTES:
        raise BrokenCard(f"the metadata of README.md is longer than {MAX_BYTES} bytes; shorten it")
    value = _load(block[1])
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise BrokenCard(f"the metadata of README.md is a {type(value).__name__}, needed lines such as 'license: mit'")
    try:
        result: Mapping[str, Any] = json.loads(json.dumps(value, default=str, allow_nan=False))
    except (ValueError, TypeError, RecursionError) as error:
        raise BrokenCard(f"the metadata of README.md has a value that is not allowed: {error}") from None
    return result


def _load(text: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]  # yaml has no annotations
        """SafeLoader without aliases."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.events.AliasEvent):
                mark = self.peek_event().start_mark
                raise yaml.composer.ComposerError(None, None, "an alias (*name) is not allowed", mark)
            return super().compose_node(parent, index)

    try:
        return yaml.load(text, Loader)  # noqa: S506  # a SafeLoader
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 2}: " if mark is not None else ""
        reason = getattr(error, "problem", None) or str(error).split("\n")[0] or "nested too deeply"
        raise BrokenCard(f"the metadata of README.md is not YAML: {where}{reason}; correct it") from None


def tags(card: Mapping[str, Any]) -> tuple[str, ...]:
    """What a card says, as the Hub writes it: library, task, license:..., base_model:..., base_model:RELATION:..."""
    return tuple(sorted({tag[:256] for tag in _tags(card) if tag}))


def _tags(card: Mapping[str, Any]) -> Iterator[str]:
    for key in ("library_name", "pipeline_tag"):
        yield from _texts(card.get(key))
    for key, prefix in _LISTED.items():
        yield from (prefix + text for text in _texts(card.get(key)))
    relation = card.get("base_model_relation")
    for base in _texts(card.get("base_model")):
        yield f"base_model:{base}"
        yield f"base_model:{relation if isinstance(relation, str) else 'finetune'}:{base}"


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        yield from (item for item in value[:200] if isinstance(item, str))
