"""Write README.md: make it, or regenerate what is ours in one that a person wrote."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qlformat import adapter as adapters
from qlformat.cards import adapter, base, content, document, merged, metadata, picture
from qlformat.cards.content import Content, Inherited
from qlformat.cards.document import Document
from qlformat.errors import QlfError
from qlformat.file_names import CARD, CARD_PICTURE, MERGE_REPORT
from qlformat.staging import target_error

_PAIRED = {"base_model_relation": "base_model", "license_name": "license", "license_link": "license"}
"""Keys that say something of the value of another: they are written beside our value of it only."""
_PEFT_TAG = "base_model:adapter:"
"""Before the name of the base in the tags that peft writes."""


@dataclass(frozen=True)
class Card:
    """What `make_card` made.

    Attributes:
        text: of README.md.
        errors: what the picture shows; empty where there is none.
        title: of the picture.
        notes: what the author should know.
    """

    text: str
    errors: picture.Errors
    title: str
    notes: tuple[str, ...]


def write_card(
    path: str | Path, *, name: str | None = None, license_id: str | None = None, online: bool = True
) -> tuple[str, ...]:
    """Write the card of a 4-bit base, an adapter or a merged model, and its pictures.

    A README.md that exists keeps every byte of its prose and of the metadata that a person wrote. Only the marked block
    is made anew, and the keys of the metadata that are absent or hold what was generated before. The card of any other
    model is checked and left as it is.

    Args:
        path: the directory.
        name: what the snippets load, a repository once it is published; by default the name of the directory.
        license_id: an identifier of the Hub; by default that of the model it was made from.
        online: whether the Hub may be asked for the card of the model it was made from.

    Returns:
        Notes for the author.

    Raises:
        QlfError: the card is broken, the Hub would refuse it, or there is nothing to describe.
        TargetError: it cannot be written.
    """
    directory = Path(path)
    made = make_card(directory, name=name, license_id=license_id, online=online)
    if made is None:
        return ()
    try:
        if picture.drawable(made.errors):
            _draw(made, directory)
        _replace(directory / CARD, made.text.encode())
    except OSError as error:
        raise target_error(error, directory) from None
    return made.notes


def make_card(
    directory: Path, *, name: str | None = None, license_id: str | None = None, online: bool = True
) -> Card | None:
    """The card as it would be written; None for a model that has none of its own. See `write_card`."""
    found = _read(directory)
    if license_id is not None:
        metadata.check_license(license_id)
    described = _describe(directory, name or directory.resolve().name, license_id, online)
    if described is None:
        return None
    generated = metadata.canonical(described.metadata)
    changes, recorded, kept = _changes(
        found, generated, _peft_names(directory, found.metadata()), license_id is not None
    )
    text = found.with_metadata(changes)
    if not text.before.strip() and text.block is None:
        text = replace(text, before=f"{text.before}# {described.title}\n\n")
    text = text.with_block(described.sections, recorded)
    final = document.parse(text.text().encode()).metadata()
    metadata.check(final)
    notes = [*(described.notes if "license" not in final else ()), *kept]
    parsed = None if (directory / adapters.CONFIG_NAME).is_file() else base.read_manifest(directory)
    errors = picture.errors_by_kind(parsed.weights) if parsed else {}
    if picture.worth_drawing(errors) and not picture.drawable(errors):
        notes.append("the card has no picture of the error, which needs matplotlib: pip install matplotlib")
    return Card(text.text(), errors, f"{described.title}, every layer", tuple(notes))


def _read(directory: Path) -> Document:
    path = directory / CARD
    if not os.path.lexists(path):
        return document.EMPTY
    try:
        with path.open("rb") as file:
            data = file.read(document.MAX_BYTES + 1)
    except OSError as error:
        raise QlfError(f"cannot be read: {error.strerror}", file=CARD) from None
    if len(data) > document.MAX_BYTES:
        raise QlfError(f"found more than {document.MAX_BYTES} bytes, such a card is not plausible", file=path.name)
    return document.parse(data)


def _describe(directory: Path, name: str, license_id: str | None, online: bool) -> Content | None:
    names = set(os.listdir(directory)) if directory.is_dir() else set()
    if adapters.CONFIG_NAME in names:
        home, describe = adapter.read(directory).home, adapter.describe
    elif MERGE_REPORT in names:
        home, describe = merged.home(content.read_object(directory / MERGE_REPORT)), merged.describe
    elif "config.json" in names:
        config = content.read_object(directory / "config.json")
        if not isinstance(config.get("quantization_config"), dict):
            return None
        parsed = base.read_manifest(directory)
        home = (parsed.source.repo_id, parsed.source.revision) if parsed else (None, None)
        describe = base.describe
    else:
        raise QlfError(f"{directory}: found no model and no adapter, needed the directory of one")
    inherited = metadata.inherit(*home) if online and (license_id is None or home[0]) else Inherited()
    if license_id is not None:
        inherited = replace(inherited, license=license_id, license_name=None, license_link=None, notes=())
    elif home[0] is None:
        inherited = replace(inherited, notes=("the licence is not known; give it with --license",))
    return describe(directory, name, inherited)


def _changes(
    found: Document, generated: Mapping[str, Any], peft_names: set[str], license_given: bool
) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """(keys to write, hashes of what is ours, notes on what stays).

    A key is ours when it is absent, when it holds what was generated before, or when peft put the name of the base
    there, which may be a path.
    """
    present = found.metadata()

    def ours(key: str) -> bool:
        if key not in present or (license_given and key == "license"):
            return True
        value = present[key]
        if key == "base_model" and isinstance(value, str) and value in peft_names:
            return True
        if key == "tags" and isinstance(value, list) and any(f"{_PEFT_TAG}{name}" in value for name in peft_names):
            return True
        return found.recorded.get(key) == document.digest(value)

    changes: dict[str, Any] = {}
    recorded: dict[str, str] = {}
    notes: list[str] = []
    for key, value in generated.items():
        partner = _PAIRED.get(key)
        if partner and not ours(partner) and present[partner] != generated.get(partner):
            continue
        if ours(key):
            recorded[key] = document.digest(value)
            if present.get(key) != value:
                changes[key] = value
        elif present[key] != value and key in ("base_model", "base_model_relation", "license"):
            notes.append(f"{CARD} says {key}: {str(present[key])[:80]}, found {str(value)[:80]}; kept")
    for key in (*found.recorded, "base_model"):
        if key in generated or key not in present or not ours(key):
            continue
        # What nobody knows at the moment is no news: the licence was given by --license, or the Hub cannot be asked.
        if key in ("license", "language") or (_PAIRED.get(key) == "license" and "license" not in generated):
            recorded[key] = found.recorded[key]
        else:
            changes[key] = None
    return changes, recorded, notes


def _peft_names(directory: Path, present: Mapping[str, Any]) -> set[str]:
    """What peft's save_pretrained names the base in the card that it writes: often a path, which no hub takes."""
    if not (directory / adapters.CONFIG_NAME).is_file():
        return set()
    name, tags = present.get("base_model"), present.get("tags")
    tagged = isinstance(tags, list) and f"{_PEFT_TAG}{name}" in tags
    recorded = content.read_object(directory / adapters.CONFIG_NAME).get("base_model_name_or_path")
    return {value for value in (name if tagged else None, recorded) if isinstance(value, str)}


def _draw(made: Card, directory: Path) -> None:
    target = directory / CARD_PICTURE
    if picture.is_current(made.errors, made.title, target):
        return
    beside = target.with_name(f".{target.name}.partial")
    try:
        picture.draw(made.errors, made.title, beside)
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)


def _replace(path: Path, data: bytes) -> None:
    beside = path.with_name(f".{path.name}.partial")
    try:
        with beside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
