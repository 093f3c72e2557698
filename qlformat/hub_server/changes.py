"""Writing the index. Every method is one transaction: on the disk when the method returns, or nothing happened."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from qlformat.hub_server import card_metadata, names
from qlformat.hub_server.applying import Add, Delete, applied
from qlformat.hub_server.database import Database
from qlformat.hub_server.index import HEADS, MAIN, PULLS, TAGS, Commit, Repo, find_repo, resolve, target_of
from qlformat.hub_server.refusals import Refused, no_revision, shown

CARD = "README.md"


@dataclass(frozen=True)
class NewCommit:
    """What a client asks to be committed.

    Attributes:
        revision: the branch, or refs/pr/N.
        parent: the commit that the client saw last, or None if it does not care.
    """

    revision: str
    title: str
    message: str
    author: str
    operations: tuple[Add | Delete, ...]
    parent: str | None = None


class Changes:
    """The writing side of the index.

    Args:
        database: the index's file.
        size: bytes of a stored content by sha256, None if it is not stored.
        read: a small stored content by sha256.
        max_files: of one revision.
    """

    def __init__(
        self, database: Database, size: Callable[[str], int | None], read: Callable[[str], bytes], max_files: int
    ) -> None:
        self._database = database
        self._size = size
        self._read = read
        self._max_files = max_files

    def create_repo(self, type_: str, name: str, *, private: bool, author: str) -> str:
        """Make a repository with a first, empty commit on main; returns the commit's id.

        Raises:
            Refused: 409 if it exists.
        """
        now = time.time()
        with self._database.transaction() as db:
            if db.execute("SELECT 1 FROM repos WHERE type = ? AND name = ?", (type_, name)).fetchone():
                raise Refused(409, f"you already created this {type_} repo: {shown(name)} exists")
            db.execute("DELETE FROM moved WHERE type = ? AND name = ?", (type_, name))
            query = "INSERT INTO repos (type, name, private, created, updated) VALUES (?, ?, ?, ?, ?)"
            key = db.execute(query, (type_, name, private, now, now)).lastrowid or 0
            commit = _insert_commit(db, key, None, {}, NewCommit("main", "initial commit", "", author, ()))
            _point(db, key, MAIN, commit)
            return commit

    def delete_repo(self, repo: Repo) -> None:
        """Remove a repository with its history. Its contents stay until garbage collection."""
        with self._database.transaction() as db:
            _exists(db, repo)
            db.execute("DELETE FROM entries WHERE tree IN (SELECT id FROM trees WHERE repo = ?)", (repo.key,))
            for table in ("trees", "commits", "refs", "pulls", "tags", "moved"):
                db.execute(f"DELETE FROM {table} WHERE repo = ?", (repo.key,))  # noqa: S608  # our own names
            db.execute("DELETE FROM repos WHERE id = ?", (repo.key,))

    def move_repo(self, repo: Repo, name: str) -> None:
        """Rename a repository; its former name goes on leading to it until it is taken.

        Raises:
            Refused: 409 if the new name is taken.
        """
        with self._database.transaction() as db:
            _exists(db, repo)
            taken = db.execute("SELECT id FROM repos WHERE type = ? AND name = ?", (repo.type, name)).fetchone()
            if taken and taken["id"] != repo.key:
                raise Refused(409, f"{shown(name)} exists; choose another name or delete that repository first")
            db.execute("DELETE FROM moved WHERE type = ? AND name = ?", (repo.type, name))
            db.execute("UPDATE repos SET name = ? WHERE id = ?", (name, repo.key))
            if name.lower() != repo.name.lower():
                db.execute("INSERT OR REPLACE INTO moved VALUES (?, ?, ?)", (repo.type, repo.name, repo.key))

    def set_private(self, repo: Repo, private: bool) -> None:
        """Change who may see the repository."""
        with self._database.transaction() as db:
            _exists(db, repo)
            db.execute("UPDATE repos SET private = ? WHERE id = ?", (private, repo.key))

    def commit(self, repo: Repo, new: NewCommit) -> str:
        """Add a commit to a branch; returns its id, or that of the present one if nothing changes.

        A commit that is sent again because its answer was lost is answered with the same id.

        Raises:
            Refused: 404 for a branch that is not there, 412 if `parent` is not the branch's commit any more, 400 for a
                content that was not uploaded or names that exclude each other.
        """
        with self._database.transaction() as db:
            _exists(db, repo)
            ref = _branch(db, repo.key, new.revision)
            head = resolve(db, repo.key, ref)
            if new.parent is not None and not _same(new.parent, head.id):
                if self._is_repeated(db, repo, head, new):
                    return head.id
                raise Refused(
                    412,
                    f"{shown(new.revision)} is at commit {head.id}, not at {shown(new.parent)} as you expected: "
                    "somebody else changed it; look at the change, then commit again",
                )
            before = _entries(db, head.tree)
            after = applied(before, new.operations, self._size, self._max_files)
            if after == before:
                return head.id
            commit = _insert_commit(db, repo.key, head.id, after, new)
            _point(db, repo.key, ref, commit)
            if ref == MAIN:
                self._renew_card(db, repo.key, before, after)
            return commit

    def create_branch(self, repo: Repo, name: str, revision: str) -> None:
        """Start a branch at a revision.

        Raises:
            Refused: 409 if it exists, 404 for the revision.
        """
        names.check_ref(name, "branch")
        self._create_ref(repo, HEADS + name, revision, None)

    def create_tag(self, repo: Repo, name: str, revision: str, message: str | None) -> None:
        """Give a revision a name that stays.

        Raises:
            Refused: 409 if it exists, 404 for the revision.
        """
        names.check_ref(name, "tag")
        self._create_ref(repo, TAGS + name, revision, message)

    def delete_branch(self, repo: Repo, name: str) -> None:
        """Remove a branch.

        Raises:
            Refused: 404 if it is not there, 400 for main.
        """
        if name == "main":
            raise Refused(400, "the branch 'main' cannot be deleted; delete the repository instead")
        self._delete_ref(repo, HEADS + name, name)

    def delete_tag(self, repo: Repo, name: str) -> None:
        """Remove a tag.

        Raises:
            Refused: 404 if it is not there.
        """
        self._delete_ref(repo, TAGS + name, name)

    def squash(self, repo: Repo, branch: str, title: str, author: str) -> str:
        """Replace a branch's history by one commit with the same files; returns its id."""
        with self._database.transaction() as db:
            _exists(db, repo)
            ref = _branch(db, repo.key, branch)
            head = resolve(db, repo.key, ref)
            new = NewCommit(branch, title, "", author, ())
            commit = _insert_commit(db, repo.key, None, _entries(db, head.tree), new)
            _point(db, repo.key, ref, commit)
            return commit

    def open_pull(self, repo: Repo, title: str, description: str, author: str, *, draft: bool) -> int:
        """Start a pull request at main; returns its number. Its branch is refs/pr/NUMBER."""
        with self._database.transaction() as db:
            _exists(db, repo)
            base = resolve(db, repo.key, MAIN)
            count = db.execute("SELECT coalesce(max(number), 0) FROM pulls WHERE repo = ?", (repo.key,)).fetchone()[0]
            number = int(count) + 1
            status = "draft" if draft else "open"
            row = (repo.key, number, title, description, author, status, base.id, time.time())
            db.execute("INSERT INTO pulls VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
            _point(db, repo.key, f"{PULLS}{number}", base.id)
            return number

    def set_pull_status(self, repo: Repo, number: int, status: str) -> None:
        """Set a pull request open or closed.

        Raises:
            Refused: 404 if it is not there, 409 if it is merged.
        """
        with self._database.transaction() as db:
            if _pull(db, repo, number)["status"] == "merged":
                raise Refused(409, f"pull request {number} is merged; its status cannot change any more")
            db.execute("UPDATE pulls SET status = ? WHERE repo = ? AND number = ?", (status, repo.key, number))

    def merge_pull(self, repo: Repo, number: int) -> str:
        """Make main what the pull request is; returns main's commit.

        Raises:
            Refused: 404 if it is not there, 409 if it is closed or main changed since it was opened.
        """
        with self._database.transaction() as db:
            pull = _pull(db, repo, number)
            main, head = resolve(db, repo.key, MAIN), resolve(db, repo.key, f"{PULLS}{number}")
            if pull["status"] not in ("open", "draft"):
                raise Refused(409, f"pull request {number} is {pull['status']}")
            if main.id != pull["base"]:
                raise Refused(409, f"main changed since pull request {number} was opened; open a new one on top of it")
            _point(db, repo.key, MAIN, head.id)
            self._renew_card(db, repo.key, _entries(db, main.tree), _entries(db, head.tree))
            db.execute("UPDATE pulls SET status = 'merged' WHERE repo = ? AND number = ?", (repo.key, number))
            return head.id

    def _create_ref(self, repo: Repo, ref: str, revision: str, message: str | None) -> None:
        with self._database.transaction() as db:
            _exists(db, repo)
            target = resolve(db, repo.key, revision).id
            if db.execute("SELECT 1 FROM refs WHERE repo = ? AND name = ?", (repo.key, ref)).fetchone():
                raise Refused(409, f"reference {shown(ref)} already exists; choose another name or delete it first")
            db.execute("INSERT INTO refs VALUES (?, ?, ?, ?)", (repo.key, ref, target, message))

    def _delete_ref(self, repo: Repo, ref: str, name: str) -> None:
        with self._database.transaction() as db:
            if not db.execute("DELETE FROM refs WHERE repo = ? AND name = ?", (repo.key, ref)).rowcount:
                raise no_revision(name)

    def _is_repeated(self, db: sqlite3.Connection, repo: Repo, head: Commit, new: NewCommit) -> bool:
        """Whether the branch's last commit is what `new` makes of the parent it names."""
        if head.parent is None or not _same(new.parent or "", head.parent):
            return False
        if (head.title, head.message, head.author) != (new.title, new.message, new.author):
            return False
        parent = resolve(db, repo.key, head.parent)
        try:
            after = applied(_entries(db, parent.tree), new.operations, self._size, self._max_files)
        except Refused:
            return False
        return after == _entries(db, head.tree)

    def _renew_card(
        self, db: sqlite3.Connection, repo: int, before: Mapping[str, Add], after: Mapping[str, Add]
    ) -> None:
        """Read the card of main again if it changed."""
        card = after.get(CARD)
        if card == before.get(CARD):
            return
        metadata: Mapping[str, Any] = {}
        if card is not None and not card.lfs:
            try:
                metadata = card_metadata.parse(self._read(card.sha256))
            except card_metadata.BrokenCard:
                metadata = {}  # it was accepted on another branch; a page without metadata is all that comes of it
        db.execute("UPDATE repos SET card = ? WHERE id = ?", (json.dumps(metadata), repo))
        db.execute("DELETE FROM tags WHERE repo = ?", (repo,))
        db.executemany("INSERT INTO tags VALUES (?, ?)", [(repo, tag) for tag in card_metadata.tags(metadata)])


def _exists(db: sqlite3.Connection, repo: Repo) -> None:
    """Raise 404 if the repository was deleted meanwhile."""
    if not db.execute("SELECT 1 FROM repos WHERE id = ?", (repo.key,)).fetchone():
        find_repo(db, repo.type, repo.name)


def _pull(db: sqlite3.Connection, repo: Repo, number: int) -> sqlite3.Row:
    row = db.execute("SELECT * FROM pulls WHERE repo = ? AND number = ?", (repo.key, number)).fetchone()
    if row is None:
        raise Refused(404, f"no pull request {number} in this repository", code="EntryNotFound")
    found: sqlite3.Row = row
    return found


def _branch(db: sqlite3.Connection, repo: int, revision: str) -> str:
    """The full name of the branch or pull request that can be committed to."""
    ref = revision if revision.startswith((HEADS, PULLS)) else HEADS + revision
    if target_of(db, repo, ref) is None:
        if target_of(db, repo, revision) or names.is_commit(revision):
            raise Refused(400, f"{shown(revision)} is not a branch; commit to a branch")
        raise no_revision(revision)
    return ref


def _same(given: str, commit: str) -> bool:
    return given == commit or (len(given) >= 7 and commit.startswith(given))


def _entries(db: sqlite3.Connection, tree: int) -> dict[str, Add]:
    rows = db.execute("SELECT path, size, oid, sha256, lfs FROM entries WHERE tree = ?", (tree,))
    return {row["path"]: Add(row["path"], row["size"], row["oid"], row["sha256"], bool(row["lfs"])) for row in rows}


def _insert_commit(
    db: sqlite3.Connection, repo: int, parent: str | None, files: Mapping[str, Add], new: NewCommit
) -> str:
    now = time.time()
    rows = sorted((file.path, file.size, file.oid, file.sha256, int(file.lfs)) for file in files.values())
    described = json.dumps([repo, parent, new.title, new.message, new.author, time.time_ns(), rows])
    id_ = hashlib.sha1(described.encode(), usedforsecurity=False).hexdigest()
    tree = db.execute("INSERT INTO trees (repo) VALUES (?)", (repo,)).lastrowid
    db.executemany("INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?)", [(tree, *row) for row in rows])
    query = """INSERT INTO commits (repo, id, parent, tree, title, message, author, created)
               VALUES (?, ?, ?, ?, ?, ?, ?, ?)"""
    db.execute(query, (repo, id_, parent, tree, new.title, new.message, new.author, now))
    db.execute("UPDATE repos SET updated = ? WHERE id = ?", (now, repo))
    return id_


def _point(db: sqlite3.Connection, repo: int, ref: str, commit: str) -> None:
    query = """INSERT INTO refs (repo, name, target) VALUES (?, ?, ?)
               ON CONFLICT (repo, name) DO UPDATE SET target = excluded.target"""
    db.execute(query, (repo, ref, commit))
