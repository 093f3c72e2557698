"""Repositories, files and commits as the JSON that the Hub's clients read."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from hashlib import sha1
from typing import Any

from qlformat.hub_server.git_ids import pointer
from qlformat.hub_server.index import Commit, File, Index, Pull, Repo


def time(seconds: float) -> str:
    """2026-01-31T12:00:00.000Z, the only form that huggingface_hub reads."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def repo(found: Repo) -> dict[str, Any]:
    """What lists show of a repository."""
    described = {
        "_id": f"{found.key:024x}",
        "id": found.name,
        "author": found.name.partition("/")[0],
        "sha": found.head,
        "private": found.private,
        "gated": False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": list(found.tags),
        "createdAt": time(found.created),
        "lastModified": time(found.updated),
    }
    if found.type == "model":
        described["modelId"] = found.name
    for key in ("library_name", "pipeline_tag"):
        if isinstance(found.card.get(key), str):
            described[key] = found.card[key]
    return described


def whole(found: Repo, commit: Commit, files: Iterable[File], *, blobs: bool) -> dict[str, Any]:
    """Everything about a repository at a commit."""
    siblings = [sibling(each, blobs=blobs) for each in files]
    described = repo(found) | {"sha": commit.id, "cardData": dict(found.card), "siblings": siblings}
    if blobs:
        described["usedStorage"] = sum(each["size"] for each in siblings)
    return described


def sibling(found: File, *, blobs: bool) -> dict[str, Any]:
    """A file of a repository's description."""
    described: dict[str, Any] = {"rfilename": found.path}
    if blobs:
        described |= {"size": found.size, "blobId": found.oid}
        if found.lfs:
            described["lfs"] = _lfs(found) | {"sha256": found.sha256}
    return described


def file(found: File) -> dict[str, Any]:
    """A file of a tree."""
    described: dict[str, Any] = {"type": "file", "oid": found.oid, "size": found.size, "path": found.path}
    if found.lfs:
        described["lfs"] = _lfs(found)
    return described


def _lfs(found: File) -> dict[str, Any]:
    return {"oid": found.sha256, "size": found.size, "pointerSize": len(pointer(found.sha256, found.size))}


def listing(files: Iterable[File], folder: str, *, recursive: bool) -> list[dict[str, Any]]:
    """The files and folders below a folder ("" is the top), sorted by path."""
    below = f"{folder}/" if folder else ""
    items: list[dict[str, Any]] = []
    folders: dict[str, list[str]] = {}
    for each in files:
        parts = each.path[len(below) :].split("/")
        for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
            folders.setdefault(below + "/".join(parts[:depth]), []).append(f"{each.path} {each.oid}")
        if recursive or len(parts) == 1:
            items.append(file(each))
    for path, contents in folders.items():
        oid = sha1("\n".join(contents).encode(), usedforsecurity=False).hexdigest()
        items.append({"type": "directory", "oid": oid, "size": 0, "path": path})
    return sorted(items, key=lambda item: str(item["path"]))


def commit(found: Commit) -> dict[str, Any]:
    """A commit of a history."""
    described: dict[str, Any] = {
        "id": found.id,
        "title": found.title,
        "message": found.message,
        "date": time(found.created),
    }
    return described | {"authors": [{"user": found.author}]}


def refs(index: Index, found: Repo) -> dict[str, Any]:
    """The branches, tags and pull requests."""
    kinds: dict[str, list[dict[str, str]]] = {"branches": [], "converts": [], "tags": [], "pullRequests": []}
    for ref in index.refs(found):
        kind = {"heads": "branches", "tags": "tags"}.get(ref.name.split("/")[1], "pullRequests")
        kinds[kind].append({"name": ref.short, "ref": ref.name, "targetCommit": ref.target})
    return kinds


def pull(found: Pull, of: Repo) -> dict[str, Any]:
    """A pull request."""
    created = time(found.created)
    comment = {"id": f"{found.number}", "type": "comment", "createdAt": created, "author": {"name": found.author}}
    return {
        "num": found.number,
        "title": found.title,
        "author": {"name": found.author},
        "createdAt": created,
        "status": found.status,
        "isPullRequest": True,
        "repo": {"name": of.name, "type": of.type},
        "changes": {"base": "refs/heads/main"},
        "filesWithConflicts": [],
        "events": [comment | {"data": {"latest": {"raw": found.description}, "edited": False, "hidden": False}}],
    }
