"""What one repository says about where its model comes from: its card, qlf.json and merge_report.json."""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from threading import Lock
from typing import Any

from qlformat.hub_server.blobs import Blobs
from qlformat.hub_server.index import Commit, File, Index, Repo
from qlformat.hub_server.refusals import Refused

_WEIGHTS_KEY = b'\n  "weights": ['
_HEAD_BYTES = 1 << 20
_WHOLE_BYTES = 16 << 20
_KEPT = 20_000
_HEX64 = re.compile(r"[0-9a-f]{64}")
_MAX_PARENTS = 50

READ = ("qlf.json", "merge_report.json", "adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True)
class Parent:
    """One thing that a model was made from.

    Attributes:
        relation: how: quantized, adapter, merge, finetune.
        name: the repository named, or None.
        revision: its commit, or None.
        fingerprint: of its stored tensors, or None when it is not pinned.
        sha256: of the adapter's weights, where a merge names an adapter.
    """

    relation: str
    name: str | None = None
    revision: str | None = None
    fingerprint: str | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Facts:
    """A repository at one commit.

    Attributes:
        kind: "model", "4-bit base", "adapter" or "merge"; "dataset" and "space" for those.
        fingerprint: of its own stored tensors, or None.
        weights: sha256 of its adapter_model.safetensors, or None.
        recipe: how it was quantized, in words, or "".
        parents: what it was made from; the surest statement about each first.
    """

    kind: str
    fingerprint: str | None = None
    weights: str | None = None
    recipe: str = ""
    parents: tuple[Parent, ...] = ()


class Descents:
    """Reads facts and remembers them: a commit never changes.

    Args:
        index: names the files.
        blobs: holds them.
    """

    def __init__(self, index: Index, blobs: Blobs) -> None:
        self._index = index
        self._blobs = blobs
        self._known: OrderedDict[tuple[int, str], Facts] = OrderedDict()
        self._lock = Lock()

    def of(self, repo: Repo, commit: Commit | None = None) -> Facts:
        """The facts of a repository, on main or at a commit. What cannot be read says nothing."""
        at = commit.id if commit else repo.head
        if repo.type != "model" or at is None:
            return Facts(repo.type)
        with self._lock:
            known = self._known.get((repo.key, at))
        if known is None:
            known = self._read(repo, commit or self._index.commit(repo, at))
            with self._lock:
                self._known[repo.key, at] = known
                while len(self._known) > _KEPT:
                    self._known.popitem(last=False)
        return known

    def _read(self, repo: Repo, commit: Commit) -> Facts:
        files = {name: file for name in READ if (file := self._file(commit, name))}
        manifest = self._json(files.get("qlf.json"))
        report = self._json(files.get("merge_report.json"))
        weights = files.get("adapter_model.safetensors")
        kind = _kind(repo.card, manifest, "adapter_config.json" in files, bool(report))
        parents = [*_pinned(manifest), *_merged(report), *_declared(repo.card, kind)]
        own = manifest.get("fingerprint") if manifest.get("kind") == "base" else None
        return Facts(
            kind=kind,
            fingerprint=_hex(own),
            weights=weights.sha256 if weights else None,
            recipe=_recipe(manifest.get("recipe")),
            parents=tuple(parents[:_MAX_PARENTS]),
        )

    def _file(self, commit: Commit, name: str) -> File | None:
        try:
            return self._index.file(commit, name)
        except Refused:
            return None

    def _json(self, file: File | None) -> Mapping[str, Any]:
        """The object in a file, or {}; of a manifest of thousands of tensors only what stands before them."""
        if file is None:
            return {}
        try:
            head = b"".join(self._blobs.chunks(file.sha256, 0, min(file.size, _HEAD_BYTES)))
            cut = head.find(_WEIGHTS_KEY)
            if cut > 0:
                return _object(head[:cut].rstrip().rstrip(b",") + b"}")
            if file.size > _WHOLE_BYTES:
                return {}
            return _object(head + b"".join(self._blobs.chunks(file.sha256, len(head), file.size)))
        except OSError:
            return {}


def _object(data: bytes) -> Mapping[str, Any]:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _kind(card: Mapping[str, Any], manifest: Mapping[str, Any], adapter: bool, merged: bool) -> str:
    relation = card.get("base_model_relation")
    if adapter or manifest.get("kind") == "adapter":
        return "adapter"
    if merged or relation == "merge":
        return "merge"
    if manifest.get("kind") == "base" or relation == "quantized":
        return "4-bit base"
    return "model"


def _recipe(recipe: object) -> str:
    if not isinstance(recipe, dict):
        return ""
    words = [str(recipe.get("quant_type", "")), f"blocks of {recipe.get('blocksize')}"]
    words += ["double quantization"] if recipe.get("double_quant") is True else []
    words += ["calibrated"] if recipe.get("calibration") else []
    return ", ".join(word[:40] for word in words if word)


def _pinned(manifest: Mapping[str, Any]) -> Iterator[Parent]:
    """What qlf.json says: an adapter's base, or the source of a 4-bit base."""
    kind = manifest.get("kind")
    key, relation = ("base", "adapter") if kind == "adapter" else ("source", "quantized")
    found = manifest.get(key)
    if isinstance(found, dict):
        pin = _hex(found.get("fingerprint"))
        name = _text(found.get("repo_id"))
        if name or pin:
            yield Parent(relation, name, _text(found.get("revision")), pin)


def _merged(report: Mapping[str, Any]) -> Iterator[Parent]:
    """What merge_report.json says: the base and the adapters."""
    base = report.get("base")
    if isinstance(base, dict) and (base.get("name") or base.get("fingerprint")):
        yield Parent("merge", _called(base), _text(base.get("revision")), _hex(base.get("fingerprint")))
    adapters = report.get("adapters")
    for adapter in adapters if isinstance(adapters, list) else ():
        if isinstance(adapter, dict):
            yield Parent("merge", _called(adapter), sha256=_hex(adapter.get("sha256")))


def _declared(card: Mapping[str, Any], kind: str) -> Iterator[Parent]:
    """What the card says."""
    default = {"4-bit base": "quantized", "adapter": "adapter", "merge": "merge"}.get(kind, "finetune")
    relation = _text(card.get("base_model_relation")) or default
    bases = card.get("base_model")
    for base in bases if isinstance(bases, list) else [bases]:
        name = _text(base)
        if name:
            yield Parent(relation, name)


def _called(entry: Mapping[str, Any]) -> str | None:
    """The repository that an entry of a report names; of a local directory its name alone."""
    return _text(entry.get("repo_id")) or _text(entry.get("name"))


def _text(value: object) -> str | None:
    return value[:200] if isinstance(value, str) and value else None


def _hex(value: object) -> str | None:
    return value if isinstance(value, str) and _HEX64.fullmatch(value) else None
