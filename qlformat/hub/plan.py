"""What a push will do: which files are sent, which are there already, which go."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from qlformat.hub.client import RemoteFile, RemoteState
from qlformat.hub.contents import Contents, LocalFile, equals, owned


@dataclass(frozen=True)
class PlannedFile:
    """A file of the new state; `sent` is False when the repository holds it already."""

    local: LocalFile
    hashed: Future[str]
    sent: bool

    @property
    def sha256(self) -> str:
        """Of its bytes; waits until it is known.

        Raises:
            OSError: the file cannot be read.
        """
        return self.hashed.result()

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return {"name": self.local.name, "size": self.local.size, "sha256": self.sha256, "sent": self.sent}


@dataclass(frozen=True)
class Plan:
    """The difference between a directory and a repository.

    Attributes:
        parent: the commit that the new one follows; None for a repository without commits, or none yet.
        removed: files of the repository's old state that the new one lacks.
    """

    parent: str | None
    files: tuple[PlannedFile, ...]
    removed: tuple[str, ...]

    @property
    def to_send(self) -> tuple[PlannedFile, ...]:
        """The files that differ from the repository's, or that it lacks; weights first."""
        return tuple(file for file in self.files if file.sent)

    @property
    def bytes_to_send(self) -> int:
        """Size of the files to send; a hub that stores a part of them already is sent less."""
        return sum(file.local.size for file in self.to_send)

    @property
    def empty(self) -> bool:
        """Whether the repository holds the new state already."""
        return not self.to_send and not self.removed


def make_plan(contents: Contents, hashes: Mapping[str, Future[str]], state: RemoteState | None) -> Plan:
    """Compare a directory with a repository by size and content hash; waits for the hash where the size is equal."""
    remote: Mapping[str, RemoteFile] = state.files if state is not None else {}
    files = tuple(
        PlannedFile(local, hashes[local.name], not _there(local, hashes[local.name], remote))
        for local in contents.files
    )
    kept = {file.local.name for file in files}
    removed = tuple(sorted(name for name in remote if name not in kept and owned(name)))
    return Plan(state.commit if state is not None else None, files, removed)


def differences(plan: Plan, state: RemoteState) -> list[str]:
    """What of the plan's result a repository lacks, in words, one entry a file."""
    found = []
    for file in plan.files:
        remote = state.files.get(file.local.name)
        if remote is None:
            found.append(f"{file.local.name} is missing there")
        elif not equals(file.local.path, file.local.size, file.sha256, remote):
            there = remote.sha256 or f"blob {remote.blob_id}"
            found.append(
                f"{file.local.name} has {remote.size} bytes and {there} there, {file.local.size} bytes and "
                f"{file.sha256} here"
            )
    return found + [f"{name} is still there" for name in plan.removed if name in state.files]


def _there(local: LocalFile, hashed: Future[str], remote: Mapping[str, RemoteFile]) -> bool:
    found = remote.get(local.name)
    if found is None or found.size != local.size:
        return False
    return equals(local.path, local.size, hashed.result(), found)
