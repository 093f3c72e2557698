"""The adapters on the Hub for a base, and whether each one's pin fits it (`qlf adapters BASE`)."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from qlformat import adapter, manifest, pins, remote
from qlformat.adapter import BasePin
from qlformat.errors import QlfError
from qlformat.hub.client import HubClient
from qlformat.pins import FoundBase

Fit = Literal["fits", "differs", "not pinned", "unreadable"]

DEFAULT_LIMIT = 100
_REQUESTS = 8


@dataclass(frozen=True)
class ListedAdapter:
    """An adapter on the Hub.

    Attributes:
        repo_id, revision: where, and its newest commit.
        fit: "fits" when its pin has the fingerprint of the base, "differs" when it has another.
        pin: what it is pinned to, or None.
        peft_type, rank: from adapter_config.json, where they can be read.
        reason: why it is unreadable.
    """

    repo_id: str
    revision: str | None
    fit: Fit
    pin: BasePin | None = None
    peft_type: str | None = None
    rank: int | None = None
    reason: str | None = None


@dataclass(frozen=True)
class AdapterList:
    """What `find_adapters` found.

    Attributes:
        base: the base that they were compared with.
        searched: the repositories whose adapters were asked for.
        adapters: those that fit come first.
        cut: whether there are more than were looked at.
    """

    base: FoundBase
    searched: tuple[str, ...]
    adapters: tuple[ListedAdapter, ...]
    cut: bool

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return asdict(self)


def find_adapters(base: str | Path, repo_id: str | None = None, limit: int = DEFAULT_LIMIT) -> AdapterList:
    """List the adapters whose cards name a base, and compare their pins with the base that is at hand.

    Args:
        base: a directory or a Hub repository, "ORG/NAME@revision" for a certain one.
        repo_id: where the base is on the Hub, for a directory that does not tell.
        limit: most adapters to look at.

    Raises:
        QlfError: there is no such base, it is not known where it is on the Hub, or the Hub cannot be asked.
    """
    found = pins.look_at(base)
    here = repo_id or found.repo_id
    source = _source(base)
    searched = tuple(dict.fromkeys(name for name in (here, source) if name))
    if not searched:
        raise QlfError(
            f"{base}: found nothing that says where this base is on the Hub; give its repository with --repo-id"
        )
    names = [(name, place) for place in searched for name in _named(place, limit + 1)]
    unique = dict(reversed(names))  # of an adapter that is listed twice the first place counts
    with ThreadPoolExecutor(_REQUESTS) as pool:
        looked = list(pool.map(lambda name: _look(name, found), list(dict(names))[:limit]))
    # Who names the source may have been trained on it: without a pin to a 4-bit base it is none of ours.
    kept = [entry for entry in looked if entry.pin is not None or unique[entry.repo_id] == here]
    order: list[Fit] = ["fits", "differs", "not pinned", "unreadable"]
    kept.sort(key=lambda entry: (order.index(entry.fit), entry.repo_id))
    return AdapterList(found, searched, tuple(kept), cut=len(unique) > limit)


def _named(repo_id: str, limit: int) -> list[str]:
    """The repositories whose cards say that they are adapters of this one."""
    client = HubClient()
    # A card without base_model_relation: the public Hub sees by its library that it is an adapter, others may not.
    filters = ([f"base_model:adapter:{repo_id}"], [f"base_model:{repo_id}", "peft"])

    def listed(wanted: list[str]) -> list[str]:
        return client.call(repo_id, lambda: [model.id for model in client.api.list_models(filter=wanted, limit=limit)])

    return list(dict.fromkeys(name for wanted in filters for name in listed(wanted)))


def _look(repo_id: str, base: FoundBase) -> ListedAdapter:
    try:
        files = remote.open_files(repo_id)
        config = json.loads(files.read(adapter.CONFIG_NAME))
        pin = adapter.parse(files.read(manifest.FILE_NAME)).base if manifest.FILE_NAME in files.sizes else None
    except (QlfError, ValueError) as error:
        return ListedAdapter(repo_id, None, "unreadable", reason=str(error))
    kind, rank = (config.get("peft_type"), config.get("r")) if isinstance(config, dict) else (None, None)
    fit: Fit = "not pinned" if pin is None else "fits" if pin.fingerprint == base.fingerprint else "differs"
    return ListedAdapter(
        repo_id, files.revision, fit, pin, kind if isinstance(kind, str) else None, rank if type(rank) is int else None
    )


def _source(base: str | Path) -> str | None:
    """The repository that the base was made from: adapters of a base that was not on the Hub name that."""
    files = remote.open_files(base)
    return manifest.parse(files.read(manifest.FILE_NAME)).source.repo_id if manifest.FILE_NAME in files.sizes else None
