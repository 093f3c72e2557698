"""The files of a revision as folders, and what a commit changed: for people, from the index's plain lists."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qlformat.hub_server.index import File


@dataclass(frozen=True)
class Folder:
    """A folder, with everything below it.

    Attributes:
        path: from the repository's root.
        files: how many lie in it, at any depth.
        size: bytes of these.
    """

    path: str
    files: int
    size: int

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition("/")[2]


@dataclass(frozen=True)
class Change:
    """What a commit did to a file; what is "added", "changed" or "removed", sizes are bytes."""

    what: str
    path: str
    before: int = 0
    after: int = 0


def folder_of(files: Sequence[File], under: str) -> tuple[list[Folder], list[File]]:
    """The folders and the files that lie directly in a folder, each sorted by name.

    Args:
        files: everything below the folder.
        under: its path; "" is the root.
    """
    start = len(under) + 1 if under else 0
    below: dict[str, tuple[int, int]] = {}
    here = []
    for file in files:
        name, slash, _ = file.path[start:].partition("/")
        if slash:
            count, size = below.get(name, (0, 0))
            below[name] = count + 1, size + file.size
        else:
            here.append(file)
    prefix = f"{under}/" if under else ""
    folders = [Folder(prefix + name, *below[name]) for name in sorted(below)]
    return folders, sorted(here, key=lambda file: file.path)


def changes(before: Sequence[File], after: Sequence[File]) -> list[Change]:
    """What is different between two states, sorted by path."""
    old, new = ({file.path: file for file in files} for files in (before, after))
    found = []
    for path in sorted(old.keys() | new.keys()):
        first, second = old.get(path), new.get(path)
        if first is None and second is not None:
            found.append(Change("added", path, after=second.size))
        elif second is None and first is not None:
            found.append(Change("removed", path, before=first.size))
        elif first is not None and second is not None and first.sha256 != second.sha256:
            found.append(Change("changed", path, first.size, second.size))
    return found
