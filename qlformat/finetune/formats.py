"""Formats of training rows: recognised by their columns, checked, and brought into the shapes of `rows.Row`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from qlformat.errors import shown
from qlformat.finetune.rows import Row, RowError

_NAMES = {"system": "system developer", "user": "user human", "assistant": "assistant gpt chatgpt bot model"}
_ROLES: Mapping[str, str] = MappingProxyType({name: role for role, names in _NAMES.items() for name in names.split()})


@dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        columns: a row has it when it has all of these columns.
        title: what it is, for people.
        normalise: makes a Row of a raw row, or raises RowError.
    """

    columns: tuple[str, ...]
    title: str
    normalise: Callable[[Mapping[str, Any]], Row]


def recognise(columns: Iterable[str]) -> str | None:
    """The name of the first format in FORMATS whose columns are all there, or None."""
    present = set(columns)
    return next((name for name, form in FORMATS.items() if present.issuperset(form.columns)), None)


def needed() -> str:
    """The formats that are understood, for an error message."""
    return "; ".join(" + ".join(form.columns) for form in FORMATS.values())


def normalise(name: str, raw: object) -> Row:
    """Check a raw row and bring it into its shape.

    Raises:
        RowError: what was found and what was needed.
    """
    if not isinstance(raw, dict):
        raise RowError(f"found {_kind(raw)}, needed an object with the columns {' + '.join(FORMATS[name].columns)}")
    missing = [column for column in FORMATS[name].columns if column not in raw]
    if missing:
        found = ", ".join(map(str, raw)) or "nothing"
        raise RowError(f"found the columns {shown(found)}, needed {' and '.join(missing)} as in the rows before")
    return FORMATS[name].normalise(raw)


def _messages(raw: Mapping[str, Any]) -> Row:
    return {"messages": _conversation(raw["messages"], "messages")}


def _conversations(raw: Mapping[str, Any]) -> Row:
    return {"messages": _conversation(raw["conversations"], "conversations")}


def _prompt_completion(raw: Mapping[str, Any]) -> Row:
    prompt, completion = raw["prompt"], raw["completion"]
    if isinstance(prompt, list) or isinstance(completion, list):
        first = _conversation(prompt, "prompt", answered=False)
        return {"messages": first + _conversation(completion, "completion"), "context": len(first)}
    return {"prompt": _text(prompt, "prompt", empty=True), "completion": _text(completion, "completion")}


def _instruction(raw: Mapping[str, Any]) -> Row:
    extra = raw.get("input")
    return {
        "instruction": _text(raw["instruction"], "instruction"),
        "input": "" if extra is None else _text(extra, "input", empty=True),
        "output": _text(raw["output"], "output"),
    }


def _plain(raw: Mapping[str, Any]) -> Row:
    return {"text": _text(raw["text"], "text")}


FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        "messages": Format(("messages",), "chat messages (role, content)", _messages),
        "conversations": Format(("conversations",), "ShareGPT conversations (from, value)", _conversations),
        "instruction": Format(("instruction", "output"), "instructions (instruction, input, output)", _instruction),
        "prompt-completion": Format(("prompt", "completion"), "prompts and completions", _prompt_completion),
        "text": Format(("text",), "plain text", _plain),
    }
)
"""Name -> format, in the order in which they are tried."""


def _conversation(value: object, column: str, *, answered: bool = True) -> list[dict[str, str]]:
    """The messages in a column, each {"role", "content"}."""
    if isinstance(value, str):  # how a CSV file holds them
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise RowError(f"{column} holds the text {shown(value)}, needed a list of messages") from None
    if not isinstance(value, list) or not value:
        raise RowError(f"{column} is {'an empty list' if value == [] else _kind(value)}, needed a list of messages")
    messages = [_message(message, f"{column}[{index}]") for index, message in enumerate(value)]
    messages = [message for message in messages if message["content"]]
    if answered and not any(message["role"] == "assistant" for message in messages):
        raise RowError(f"{column} has no assistant message, so there is nothing to train on")
    return messages


def _message(message: object, where: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise RowError(f"{where} is {_kind(message)}, needed an object with role and content")
    role_key, content_key = ("from", "value") if "from" in message and "role" not in message else ("role", "content")
    role = message.get(role_key)
    if not isinstance(role, str) or role.lower() not in _ROLES:
        raise RowError(f"{where} has {role_key} {shown(role)}, needed system, user (human) or assistant (gpt)")
    if message.get("tool_calls"):
        raise RowError(f"{where} calls tools, which are not supported; needed plain messages")
    content = message.get(content_key)
    if isinstance(content, list):
        content = "".join(_part(part, where) for part in content)
    role = _ROLES[role.lower()]
    # An empty system message is how many datasets say that there is none.
    if role == "system" and isinstance(content, str) and not content.strip():
        return {"role": role, "content": ""}
    return {"role": role, "content": _text(content, f"{where}.{content_key}")}


def _part(part: object, where: str) -> str:
    """The text of one part of a message's content."""
    text = part.get("text") if isinstance(part, dict) else None
    if not isinstance(text, str):
        kind = part.get("type") if isinstance(part, dict) else part
        raise RowError(f"{where} holds a part of type {shown(kind)}, needed text")
    return text


def _text(value: object, where: str, *, empty: bool = False) -> str:
    if not isinstance(value, str):
        raise RowError(f"{where} is {_kind(value)}, needed text")
    if not empty and not value.strip():
        raise RowError(f"{where} is empty, needed text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError(f"{where} holds {shown(value[error.start])}, half of a surrogate pair, needed text") from None
    return value


def _kind(value: object) -> str:
    """A JSON value in words."""
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    name = names.get(type(value), f"a {type(value).__name__}")
    return name if isinstance(value, (list, dict)) else f"{name} ({shown(value)})"
