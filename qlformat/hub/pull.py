"""Fetch a repository: into a directory beside the target, each file checked when it is whole, renamed at the end."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlformat.errors import QlfError, TargetError
from qlformat.hub import soundness
from qlformat.hub.client import HubClient, parse_repo_id, quiet_client
from qlformat.hub.contents import read_contents
from qlformat.hub.fetch import CACHE, OWN_PREFIX, Fetch, wanted_files
from qlformat.hub.refusals import HubError
from qlformat.progress import Progress
from qlformat.staging import Staging

MARK = f"{OWN_PREFIX}pull.json"
"""In the staging directory: whose files lie there."""


@dataclass(frozen=True)
class PullReport:
    """What was fetched.

    Attributes:
        commit: what the revision was.
        size: bytes of all files.
        kept: bytes that an interrupted run had fetched already.
        left_out: files of the repository that were not fetched.
        seconds: wall time, verification included.
    """

    repo_id: str
    host: str
    commit: str
    kind: str
    out: Path
    files: tuple[str, ...]
    size: int
    kept: int
    left_out: tuple[str, ...]
    notes: tuple[str, ...]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return {**vars(self), "out": str(self.out), "seconds": round(self.seconds, 3)}


def pull(
    repo_id: str,
    out: str | Path,
    *,
    revision: str | None = None,
    endpoint: str | None = None,
    overwrite: bool = False,
    threads: int | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> PullReport:
    """Fetch a repository at one commit. What an interrupted run left is checked and kept.

    Args:
        repo_id: "ORG/NAME" or "ORG/NAME@revision".
        out: directory to make.
        revision: branch, tag or commit.
        endpoint: address of the hub; that of HF_ENDPOINT, or the public one, by default.
        overwrite: replace a model that is at `out`.
        threads: workers for the verification; all CPUs of the process by default.
        progress: called from a thread.

    Raises:
        HubError: the hub refused or failed, a name or size in the repository is not allowed, or a hash differs.
        QlfError: what was fetched is not sound; nothing is left of it.
        TargetError: it cannot be written here.
    """
    started = time.monotonic()
    name, of_name = parse_repo_id(repo_id)
    if revision is not None and of_name is not None and revision != of_name:
        raise QlfError(f"found two revisions, {of_name!r} and {revision!r}; give one of them")
    client = HubClient(endpoint)
    with quiet_client():
        state = client.state(name, revision or of_name)
        if state is None or state.commit is None:
            found = "an empty repository" if state else "no such repository"
            raise HubError(f"{name}: found {found} on {client.host}; check the spelling, or log in if it is private")
        wanted, left_out = wanted_files(name, state)
        target = Path(out)
        mark = json.dumps({"host": client.host, "repo_id": name})
        with Staging(target, overwrite=overwrite, resume=_left_by(target) == mark) as staging:
            staging.keep = True
            (staging.path / MARK).write_text(mark, encoding="utf-8")
            fetch = Fetch(client, name, state.commit, staging.path, wanted, progress)
            try:
                kept = fetch.run()
                contents = read_contents(staging.path)
                said = soundness.require_sound(contents, threads, progress, allow_base_mismatch=True)
                notes = tuple(_named(note, staging.path, name) for note in said)
            except (HubError, TargetError):
                raise
            except QlfError as error:
                staging.keep = False  # what came whole from the hub and is not sound will not be by another run
                raise _about(error, staging.path, name) from None
            shutil.rmtree(staging.path / CACHE, ignore_errors=True)
            (staging.path / MARK).unlink()
            staging.commit()
    size = sum(file.size for file in wanted.values())
    return PullReport(
        name, client.host, state.commit, contents.kind, target, tuple(wanted), size, kept, left_out, notes,
        time.monotonic() - started,
    )  # fmt: skip


def _about(error: QlfError, staging: Path, name: str) -> QlfError:
    """The error with the repository's name in place of a directory that is gone."""
    text = _named(str(error), staging, name)
    return QlfError(text if name in text else f"{name}: {text}", rule=None)


def _named(text: str, staging: Path, name: str) -> str:
    return text.replace(str(staging), name).replace(staging.name, name)


def _left_by(out: Path) -> str | None:
    """The mark of an interrupted pull to `out`."""
    real = Path(os.path.realpath(out))
    try:
        return (real.parent / f".{real.name}.qlf-partial" / MARK).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
