"""The metadata of cards: huggingface_hub's own classes, and what the Hub accepts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from qlformat import remote
from qlformat.cards import document
from qlformat.cards.content import Inherited
from qlformat.errors import QlfError
from qlformat.file_names import CARD

RELATIONS = ("adapter", "finetune", "merge", "quantized")

_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")


def check_license(license_id: str) -> None:
    """Refuse what cannot be a licence identifier of the Hub.

    Raises:
        QlfError: it has another form than apache-2.0.
    """
    if not _LICENSE.fullmatch(license_id):
        guess = re.sub(r"[\s_]+", "-", license_id.strip().lower())
        better = f"; write {guess}" if _LICENSE.fullmatch(guess) else ""
        raise QlfError(f"found the licence {license_id!r}, needed an identifier of the Hub such as apache-2.0{better}")


def canonical(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata as huggingface_hub writes it: EvalResults as a model-index, nothing that is None.

    Raises:
        QlfError: it is not what the Hub accepts.
    """
    from huggingface_hub import ModelCardData

    try:
        card: Any = ModelCardData(**metadata)
        data: dict[str, Any] = card.to_dict()
    except (ValueError, TypeError, KeyError) as error:
        raise _bad(" ".join(str(error).split())[:200]) from None
    check(data)
    return data


def check(metadata: Mapping[str, Any]) -> None:
    """Refuse metadata that the Hub does not accept, or that huggingface_hub cannot read.

    Raises:
        QlfError: one line with the key and its value.
    """
    from huggingface_hub import ModelCardData

    _check_names(metadata, "base_model", repositories=True)
    _check_names(metadata, "datasets", repositories=True)
    for key in ("tags", "language", "license", "metrics"):
        _check_names(metadata, key)
    licenses = metadata.get("license", [])
    for license_id in licenses if isinstance(licenses, list) else [licenses]:
        if not _LICENSE.fullmatch(license_id):
            raise _bad(f"license is {license_id!r}, needed an identifier of the Hub such as apache-2.0")
    for key in ("library_name", "pipeline_tag", "license_name", "license_link"):
        if not isinstance(metadata.get(key, ""), str):
            raise _bad(f"{key} is {str(metadata[key])[:80]!r}, needed text")
    relation = metadata.get("base_model_relation")
    if relation is not None and relation not in RELATIONS:
        raise _bad(f"base_model_relation is {str(relation)[:80]!r}, needed one of {', '.join(RELATIONS)}")
    try:
        ModelCardData(**metadata)
    except (ValueError, TypeError, KeyError) as error:
        raise _bad(" ".join(str(error).split())[:200]) from None


def inherit(repo_id: str | None, revision: str | None) -> Inherited:
    """What the card of a repository says of licence, language and task."""
    if repo_id is None:
        return Inherited()
    try:
        files = remote.open_files(f"{repo_id}@{revision}" if revision else repo_id)
        if CARD not in files.sizes:
            raise QlfError(f"{repo_id} has no card")
        found = document.parse(files.read(CARD)).metadata()
        taken = {key: found.get(key) for key in _INHERITED}
        check({key: value for key, value in taken.items() if value is not None})
    except QlfError as error:
        return Inherited(notes=(f"the licence is not known: {error}; give it with --license",))
    link = taken["license_link"]
    if isinstance(link, str) and ":" not in link:  # a file of that repository
        taken["license_link"] = f"https://huggingface.co/{repo_id}/blob/{revision or 'main'}/{link.removeprefix('/')}"
    notes = () if taken["license"] else (f"{repo_id} names no licence; give it with --license",)
    return Inherited(**taken, notes=notes)


def _check_names(metadata: Mapping[str, Any], key: str, *, repositories: bool = False) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, but without __all__

    value = metadata.get(key)
    if value is None:
        return
    for name in value if isinstance(value, list) else [value]:
        if not isinstance(name, str) or not name:
            raise _bad(f"{key} is {str(value)[:80]!r}, needed text or a list of texts")
        if not repositories:
            continue
        try:
            validate_repo_id(name)
        except HFValidationError:
            raise _bad(f"{key} is {name[:80]!r}, needed a repository of the Hub, ORG/NAME") from None


def _bad(message: str) -> QlfError:
    return QlfError(f"the Hub would refuse its metadata: {message}", file=CARD)
