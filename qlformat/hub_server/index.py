"""Reading the index: repositories, revisions, files, history, and how models descend from each other.

Nothing here asks who wants to know: `may_see` in qlformat.hub_server.tokens does.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qlformat.hub_server import names
from qlformat.hub_server.database import Database
from qlformat.hub_server.refusals import no_entry, no_repo, no_revision

HEADS = "refs/heads/"
TAGS = "refs/tags/"
PULLS = "refs/pr/"
MAIN = HEADS + "main"

RELATIONS = ("quantized", "adapter", "merge", "finetune")
"""What `base_model_relation` of a card may say."""


@dataclass(frozen=True)
class Repo:
    """A repository.

    Attributes:
        key: its number in the index.
        type: model, dataset or space.
        name: NAMESPACE/NAME.
        created: Unix time; likewise updated, the time of the last commit.
        card: the metadata of README.md on main.
        tags: what the card says, in the form that lists are filtered by.
        head: main's commit.
    """

    key: int
    type: str
    name: str
    private: bool
    created: float
    updated: float
    card: Mapping[str, Any] = field(default_factory=dict)
    tags: tuple[str, ...] = ()
    head: str | None = None


@dataclass(frozen=True)
class File:
    """A file of a revision.

    Attributes:
        oid: the id that git gives it (of the pointer, for LFS).
        sha256: of the content.
        lfs: whether clients send and name it by LFS.
    """

    path: str
    size: int
    oid: str
    sha256: str
    lfs: bool


@dataclass(frozen=True)
class Commit:
    """A commit; `created` is Unix time."""

    id: str
    parent: str | None
    title: str
    message: str
    author: str
    created: float
    tree: int


@dataclass(frozen=True)
class Ref:
    """A branch, tag or pull request's head, with its full name (refs/...)."""

    name: str
    target: str

    @property
    def short(self) -> str:
        """The name without refs/heads/ or refs/tags/."""
        return self.name.removeprefix(HEADS).removeprefix(TAGS)


@dataclass(frozen=True)
class Pull:
    """A pull request; status is draft, open, closed or merged."""

    number: int
    title: str
    description: str
    author: str
    status: str
    base: str
    created: float


class Index:
    """Queries. Each sees one committed state.

    Args:
        database: the index's file.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def repo(self, type_: str, name: str) -> Repo:
        """A repository by its present or former name.

        Raises:
            Refused: 404 RepoNotFound.
        """
        with self._database.snapshot() as connection:
            return _repo(connection, find_repo(connection, type_, name))

    def repos(
        self,
        type_: str | None = None,
        *,
        search: str = "",
        author: str | None = None,
        tags: tuple[str, ...] = (),
        offset: int = 0,
        limit: int = 1000,
    ) -> list[Repo]:
        """Repositories, private ones included, the last updated first.

        Args:
            type_: only of this type.
            search: in the name.
            author: the namespace.
            tags: the repository has all of them.
        """
        where, values = ["1"], list[Any]()
        if type_:
            where.append("type = ?")
            values.append(type_)
        if search:
            where.append("instr(lower(name), lower(?))")
            values.append(search)
        if author:
            where.append("substr(lower(name), 1, length(?) + 1) = lower(?) || '/'")
            values += [author, author]
        for tag in tags:
            where.append("EXISTS (SELECT 1 FROM tags WHERE tags.repo = repos.id AND tags.tag = ?)")
            values.append(tag)
        query = f"SELECT * FROM repos WHERE {' AND '.join(where)} ORDER BY updated DESC, id DESC LIMIT ? OFFSET ?"  # noqa: S608
        with self._database.snapshot() as connection:
            return [_repo(connection, row) for row in connection.execute(query, [*values, limit, offset])]

    def commit(self, repo: Repo, revision: str = "main") -> Commit:
        """The commit of a branch, tag, refs/... name, commit id or a unique beginning of one (7 digits or more).

        Raises:
            Refused: 404 RevisionNotFound.
        """
        with self._database.snapshot() as connection:
            return resolve(connection, repo.key, revision)

    def history(self, repo: Repo, revision: str = "main", *, offset: int = 0, limit: int = 50) -> list[Commit]:
        """Commits from the revision's back to the first."""
        query = """
            WITH RECURSIVE line(id, parent, tree, title, message, author, created, depth) AS (
              SELECT id, parent, tree, title, message, author, created, 0 FROM commits WHERE repo = :repo AND id = :id
              UNION ALL SELECT c.id, c.parent, c.tree, c.title, c.message, c.author, c.created, depth + 1
              FROM commits c JOIN line ON c.repo = :repo AND c.id = line.parent)
            SELECT * FROM line ORDER BY depth LIMIT :limit OFFSET :offset"""
        with self._database.snapshot() as connection:
            head = resolve(connection, repo.key, revision)
            values = {"repo": repo.key, "id": head.id, "limit": limit, "offset": offset}
            return [_commit(row) for row in connection.execute(query, values)]

    def files(self, commit: Commit, *, under: str = "", after: str = "", limit: int = -1) -> list[File]:
        """The files of a commit, sorted by path.

        Args:
            under: only those in this folder; "" is all.
            after: only those whose path is greater.
            limit: at most so many; -1 is all.
        """
        query = """
            SELECT path, size, oid, sha256, lfs FROM entries
            WHERE tree = ? AND path > ? AND (? = '' OR (path > ? || '/' AND path < ? || '0')) ORDER BY path LIMIT ?"""
        rows = self._database.reader.execute(query, (commit.tree, after, under, under, under, limit))
        return [_file(row) for row in rows]

    def file(self, commit: Commit, path: str) -> File:
        """One file of a commit.

        Raises:
            Refused: 404 EntryNotFound.
        """
        query = "SELECT path, size, oid, sha256, lfs FROM entries WHERE tree = ? AND path = ?"
        row = self._database.reader.execute(query, (commit.tree, path)).fetchone()
        if row is None:
            raise no_entry(path)
        return _file(row)

    def refs(self, repo: Repo) -> list[Ref]:
        """All branches, tags and pull requests' heads, sorted by name."""
        rows = self._database.reader.execute("SELECT name, target FROM refs WHERE repo = ? ORDER BY name", (repo.key,))
        return [Ref(row["name"], row["target"]) for row in rows]

    def pulls(self, repo: Repo) -> list[Pull]:
        """The pull requests, the first first."""
        rows = self._database.reader.execute("SELECT * FROM pulls WHERE repo = ? ORDER BY number", (repo.key,))
        return [Pull(*(row[key] for key in Pull.__dataclass_fields__)) for row in rows]

    def derived(self, repo: Repo) -> list[tuple[str, Repo]]:
        """(relation, repository) of those whose card names this one as their base."""
        return [
            (relation, other)
            for relation in RELATIONS
            for other in self.repos(tags=(f"base_model:{relation}:{repo.name}",))
        ]


def find_repo(connection: sqlite3.Connection, type_: str, name: str) -> sqlite3.Row:
    """The row of a repository by its present or former name.

    Raises:
        Refused: 404 RepoNotFound.
    """
    query = "SELECT * FROM repos WHERE type = ? AND name = ?"
    row = connection.execute(query, (type_, name)).fetchone()
    if row is None:
        query = "SELECT repos.* FROM moved JOIN repos ON repos.id = moved.repo WHERE moved.type = ? AND moved.name = ?"
        row = connection.execute(query, (type_, name)).fetchone()
    if row is None:
        raise no_repo(name)
    found: sqlite3.Row = row
    return found


def resolve(connection: sqlite3.Connection, repo: int, revision: str) -> Commit:
    """See Index.commit."""
    target = target_of(connection, repo, revision)
    if target is None and names.is_commit(revision):
        target = revision
    if target is None and 7 <= len(revision) < 40 and set(revision) <= set("0123456789abcdef"):
        query = "SELECT id FROM commits WHERE repo = ? AND substr(id, 1, ?) = ? LIMIT 2"
        rows = connection.execute(query, (repo, len(revision), revision)).fetchall()
        target = rows[0]["id"] if len(rows) == 1 else None
    row = connection.execute("SELECT * FROM commits WHERE repo = ? AND id = ?", (repo, target)).fetchone()
    if row is None:
        raise no_revision(revision)
    return _commit(row)


def target_of(connection: sqlite3.Connection, repo: int, name: str) -> str | None:
    """The commit of a branch, tag, or full refs/... name; branches come first."""
    query = "SELECT target FROM refs WHERE repo = ? AND name = ?"
    for full in (HEADS + name, TAGS + name, name):
        row = connection.execute(query, (repo, full)).fetchone()
        if row is not None:
            return str(row["target"])
    return None


def _repo(connection: sqlite3.Connection, row: sqlite3.Row) -> Repo:
    tags = connection.execute("SELECT tag FROM tags WHERE repo = ? ORDER BY tag", (row["id"],))
    return Repo(
        key=row["id"],
        type=row["type"],
        name=row["name"],
        private=bool(row["private"]),
        created=row["created"],
        updated=row["updated"],
        card=json.loads(row["card"]),
        tags=tuple(tag["tag"] for tag in tags),
        head=target_of(connection, row["id"], MAIN),
    )


def _commit(row: sqlite3.Row) -> Commit:
    return Commit(**{key: row[key] for key in Commit.__dataclass_fields__})


def _file(row: sqlite3.Row) -> File:
    return File(row["path"], row["size"], row["oid"], row["sha256"], bool(row["lfs"]))
