"""What a commit does to the files of a revision. Nothing here touches the index or the disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from qlformat.hub_server.refusals import Refused, no_entry, shown


@dataclass(frozen=True)
class Add:
    """A file that a commit sets. `oid` is git's id of it (of its pointer, for LFS)."""

    path: str
    size: int
    oid: str
    sha256: str
    lfs: bool


@dataclass(frozen=True)
class Delete:
    """A file or a whole folder that a commit removes."""

    path: str
    folder: bool


def applied(
    before: Mapping[str, Add], operations: Iterable[Add | Delete], size: Callable[[str], int | None], max_files: int
) -> dict[str, Add]:
    """The files after the operations, by path.

    Args:
        before: the files that are there.
        operations: in their order.
        size: bytes of a stored content by sha256, None if it is not stored.
        max_files: that a revision may have.

    Raises:
        Refused: 400 for a content that was not uploaded, for too many files, or for a file where a folder is; 404 for
            removing what is not there.
    """
    after = dict(before)
    for operation in operations:
        if isinstance(operation, Add):
            _require_content(operation, size)
            after[operation.path] = operation
        else:
            for path in _named(operation, after):
                del after[path]
    if len(after) > max_files:
        raise Refused(400, f"the revision would have {len(after)} files, this hub takes {max_files}")
    for path in after:
        for end, char in enumerate(path):
            if char == "/" and path[:end] in after:
                raise Refused(400, f"{shown(path[:end])} cannot be a file and a folder; rename one of them")
    return after


def _require_content(file: Add, size: Callable[[str], int | None]) -> None:
    if size(file.sha256) != file.size:
        raise Refused(
            400,
            f"{shown(file.path)} with sha256 {file.sha256} and {file.size} bytes was not uploaded; "
            "upload it, then commit again",
        )


def _named(operation: Delete, files: Mapping[str, Add]) -> list[str]:
    """The paths that are removed."""
    named = [operation.path] if operation.path in files and not operation.folder else []
    if operation.folder:
        named = [path for path in files if path.startswith(operation.path + "/")]
    if not named:
        raise no_entry(operation.path)
    return named
