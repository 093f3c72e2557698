"""The SQLite file that says what repositories, commits and branches there are."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

from qlformat.errors import QlfError

VERSION = 1
"""Of the tables below; kept in the file's user_version."""

_SCHEMA = """
CREATE TABLE repos (
  id INTEGER PRIMARY KEY AUTOINCREMENT, type TEXT NOT NULL, name TEXT NOT NULL COLLATE NOCASE, private INTEGER NOT NULL,
  created REAL NOT NULL, updated REAL NOT NULL, card TEXT NOT NULL DEFAULT '{}', UNIQUE (type, name));
CREATE TABLE moved (
  type TEXT NOT NULL, name TEXT NOT NULL COLLATE NOCASE, repo INTEGER NOT NULL, PRIMARY KEY (type, name));
CREATE TABLE trees (id INTEGER PRIMARY KEY AUTOINCREMENT, repo INTEGER NOT NULL);
CREATE INDEX trees_of_repo ON trees (repo);
CREATE TABLE entries (
  tree INTEGER NOT NULL, path TEXT NOT NULL, size INTEGER NOT NULL, oid TEXT NOT NULL, sha256 TEXT NOT NULL,
  lfs INTEGER NOT NULL, PRIMARY KEY (tree, path)) WITHOUT ROWID;
CREATE INDEX entries_of_content ON entries (sha256);
CREATE TABLE commits (
  number INTEGER PRIMARY KEY AUTOINCREMENT, repo INTEGER NOT NULL, id TEXT NOT NULL, parent TEXT, tree INTEGER NOT NULL,
  title TEXT NOT NULL, message TEXT NOT NULL, author TEXT NOT NULL, created REAL NOT NULL, UNIQUE (repo, id));
CREATE TABLE refs (
  repo INTEGER NOT NULL, name TEXT NOT NULL, target TEXT NOT NULL, message TEXT, PRIMARY KEY (repo, name));
CREATE TABLE pulls (
  repo INTEGER NOT NULL, number INTEGER NOT NULL, title TEXT NOT NULL, description TEXT NOT NULL, author TEXT NOT NULL,
  status TEXT NOT NULL, base TEXT NOT NULL, created REAL NOT NULL, PRIMARY KEY (repo, number));
CREATE TABLE tags (repo INTEGER NOT NULL, tag TEXT NOT NULL, PRIMARY KEY (repo, tag)) WITHOUT ROWID;
CREATE INDEX repos_of_tag ON tags (tag);
"""


class Database:
    """Connections to the index: one a thread for reading, one for writing, which takes turns.

    Args:
        file: created if it is missing.

    Raises:
        QlfError: the file is not an index, or one of a newer version.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._local = threading.local()
        self._turn = threading.Lock()
        try:
            self._writer = self._connect()
            self._create()
        except sqlite3.DatabaseError as error:
            raise QlfError(
                f"this is not a hub's index ({error}); give --root a directory of its own", file=str(file)
            ) from None

    @property
    def reader(self) -> sqlite3.Connection:
        """This thread's connection. It sees committed states only."""
        if not hasattr(self._local, "connection"):
            self._local.connection = self._connect()
        connection: sqlite3.Connection = self._local.connection
        return connection

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[sqlite3.Connection]:
        """One state for several queries."""
        connection = self.reader
        connection.execute("BEGIN")
        try:
            yield connection
        finally:
            connection.execute("ROLLBACK")

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing, and on the disk when the block is left. Only one is open at a time, over all processes."""
        with self._turn:
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield self._writer
                self._writer.execute("COMMIT")
            except BaseException:
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
                raise

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._file, timeout=60, isolation_level=None, check_same_thread=False)
        connection.row_factory = sqlite3.Row
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")  # an acknowledged commit survives a power cut
        return connection

    def _create(self) -> None:
        with self.transaction() as connection:
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version == 0:
                for statement in _SCHEMA.split(";"):
                    connection.execute(statement)
                connection.execute(f"PRAGMA user_version={VERSION}")
            elif version != VERSION:
                raise QlfError(
                    f"the hub's index has version {version}, this qlformat knows {VERSION}; use the one that wrote it",
                    file=str(self._file),
                )
