"""What the server answers when it does not do what was asked."""

from __future__ import annotations


class Refused(Exception):
    """A request that is answered with an error.

    Args:
        status: the HTTP status.
        message: one line: what was found, what was needed, what to do.
        code: the Hub's X-Error-Code (RepoNotFound, RevisionNotFound, EntryNotFound), which clients make errors of.
        fields: further fields of the JSON answer.
    """

    def __init__(self, status: int, message: str, *, code: str | None = None, **fields: object) -> None:
        super().__init__(message)
        self.status = status
        self.message = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in message)
        self.code = code
        self.fields = fields


def no_repo(name: str) -> Refused:
    """404 for a repository that does not exist, or that the asker may not see: both look the same."""
    return Refused(
        404, f"no repository {shown(name)} here, or it is private and your token may not see it", code="RepoNotFound"
    )


def no_revision(revision: str) -> Refused:
    """404 for a branch, tag or commit that is not there."""
    return Refused(404, f"no branch, tag or commit {shown(revision)} in this repository", code="RevisionNotFound")


def no_entry(path: str) -> Refused:
    """404 for a file that the revision does not have."""
    return Refused(404, f"no file {shown(path)} in this revision", code="EntryNotFound")


def disk_full() -> Refused:
    """507: nothing of the request was kept."""
    return Refused(
        507, "the hub's disk is full and nothing was kept; free space on the server or run `qlf hub gc`, then try again"
    )


def shown(text: str) -> str:
    """A name from a request, cut to a length that fits in a message."""
    return repr(text if len(text) <= 120 else f"{text[:117]}...")
