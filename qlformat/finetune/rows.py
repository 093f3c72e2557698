"""Training rows in one of four shapes, each with the place it came from."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from qlformat.errors import QlfError

Row = dict[str, Any]
"""One of {"messages": [{"role", "content"}, ...]}, {"prompt", "completion"}, {"instruction", "input", "output"} and
{"text"}; all values are strings. A "messages" row may have "context": so many first messages are never trained."""


@dataclass(frozen=True)
class Place:
    """Where a row is: a file (or dataset) and the number of its line, or of the row where the file has no lines."""

    file: str
    number: int
    unit: str = "line"


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used, and why: what was found and what was needed."""

    place: Place
    message: str


class DataError(QlfError):
    """Training data cannot be read or used; a malformed row is named by file and line."""

    @classmethod
    def of_row(cls, bad: BadRow) -> DataError:
        """The error for a malformed row that is not to be skipped."""
        advice = "mend the row, or skip such rows with --skip-bad-rows"
        return cls(f"{bad.place.unit} {bad.place.number}: {bad.message}; {advice}", file=bad.place.file)


class RowError(Exception):
    """What is wrong with the row at hand; whoever knows its place makes a BadRow of it."""


@dataclass(frozen=True)
class DataFile:
    """A file that rows were read from."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Rows:
    """Training data in memory.

    Attributes:
        name: the file or dataset as it was asked for.
        format: name of the recognised format, a key of formats.FORMATS.
        rows, places: the rows and where each came from, in the same order.
        skipped: malformed rows that were left out.
        skip_bad: whether later steps may leave rows out as well.
        files: the local files read; empty for a Hub dataset.
        repo_id, revision, split: of a Hub dataset, or None.
    """

    name: str
    format: str
    rows: list[Row]
    places: list[Place]
    skipped: list[BadRow]
    skip_bad: bool = False
    files: tuple[DataFile, ...] = ()
    repo_id: str | None = None
    revision: str | None = None
    split: str | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def sha256(self) -> str:
        """Of the rows as they are used (canonical JSON, one a line), whatever file format they came in."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(json.dumps(row, sort_keys=True, separators=(",", ":")).encode())
            digest.update(b"\n")
        return digest.hexdigest()

    def select(self, indices: Iterable[int]) -> Rows:
        """These rows alone; `skipped` stays with whoever has it."""
        chosen = list(indices)
        rows, places = [self.rows[i] for i in chosen], [self.places[i] for i in chosen]
        return replace(self, rows=rows, places=places, skipped=[])

    def divide(self, share: float, seed: int) -> tuple[Rows, Rows]:
        """Split off a random share of the rows, at least one, for evaluation.

        Args:
            share: between 0 and 1.
            seed: of the choice.

        Returns:
            (rows left for training, rows for evaluation), both in their original order.

        Raises:
            DataError: nothing would be left to train on.
        """
        count = max(1, round(len(self) * share))
        if count >= len(self):
            raise DataError(f"found {len(self)} rows, too few to hold a share of {share:g} back; give evaluation data")
        held = set(random.Random(seed).sample(range(len(self)), count))  # noqa: S311  # no secret
        train = self.select(i for i in range(len(self)) if i not in held)
        return replace(train, skipped=self.skipped), self.select(sorted(held))

    def as_dict(self) -> Mapping[str, Any]:
        """What a manifest or `--json` says of the data: hashes and counts, no content."""
        return {
            "name": self.name,
            "format": self.format,
            "rows": len(self),
            "skipped_rows": len(self.skipped),
            "rows_sha256": self.sha256,
            "files": [{"name": file.name, "size": file.size, "sha256": file.sha256} for file in self.files],
            "repo_id": self.repo_id,
            "revision": self.revision,
            "split": self.split,
        }
