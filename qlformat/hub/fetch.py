"""The files of a repository at one commit, on their way into a directory: named safely, resumed, checked when whole."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from qlformat import manifest, remote, repository
from qlformat.adapter import CONFIG_NAME as ADAPTER_CONFIG
from qlformat.errors import FormatError, shown
from qlformat.hashing import hash_file
from qlformat.hub.client import HubClient, RemoteFile, RemoteState
from qlformat.hub.contents import equals
from qlformat.hub.refusals import HubError
from qlformat.hub.transfer import Transfer
from qlformat.layout import strict_json
from qlformat.progress import Progress, ProgressMeter
from qlformat.staging import require_space
from qlformat.stored import CONFIG_NAME
from qlformat.workers import run_all

CACHE = ".cache"
"""Where unfinished files are, below the directory."""
OWN_PREFIX = ".qlf-"
"""Begins the names of our own files in the directory."""
_FILES_AT_ONCE = 4
_JSON_FIRST = (manifest.FILE_NAME, CONFIG_NAME, ADAPTER_CONFIG, repository.index_name())


def wanted_files(name: str, state: RemoteState) -> tuple[dict[str, RemoteFile], tuple[str, ...]]:
    """(files to fetch, names of the others).

    Raises:
        HubError: a name would leave the directory, or two cannot be side by side.
    """
    wanted: dict[str, RemoteFile] = {}
    left_out = []
    for path, file in sorted(state.files.items()):
        if not manifest.is_plain_path(path):
            raise HubError(f"{name}: the file name {shown(path)} leaves the directory; this repository is not fetched")
        parts = PurePosixPath(path)
        if any(part.startswith(".") for part in parts.parts) or any(parts.match(skip) for skip in remote.IGNORED):
            left_out.append(path)
        else:
            wanted[path] = file
    for path in wanted:
        above = next((str(parent) for parent in PurePosixPath(path).parents if str(parent) in wanted), None)
        if above is not None:
            raise HubError(f"{name}: {shown(above)} is a file and a folder; this repository is not fetched")
    if not wanted:
        raise HubError(f"{name}: the repository holds no file of a model")
    for path in _JSON_FIRST:
        if path in wanted and wanted[path].size > repository.MAX_JSON_BYTES:
            raise HubError(f"{name}: {path} has {wanted[path].size} bytes, which is not plausible; it is not fetched")
    return wanted, tuple(left_out)


class Fetch:
    """The files of one commit, on their way into a directory."""

    def __init__(
        self,
        client: HubClient,
        name: str,
        commit: str,
        directory: Path,
        wanted: Mapping[str, RemoteFile],
        progress: Callable[[Progress], None] | None,
    ) -> None:
        self._client = client
        self._name = name
        self._directory = directory
        self._wanted = wanted
        self._stop = threading.Event()
        total = sum(file.size for file in wanted.values())
        self._meter = ProgressMeter(progress, len(wanted), total, "fetching", "files")
        place = directory / CACHE
        self._transfers = {
            path: Transfer(client, name, commit, file, place, self._stop, self._meter.add)
            for path, file in wanted.items()
        }

    def run(self) -> int:
        """Fetch and check everything; returns the bytes that were there already.

        Raises:
            HubError, FormatError, TargetError, OSError: see `pull`.
        """
        self._drop_others()
        whole = {path for path in self._wanted if self._is_whole(path)}
        missing = [path for path in self._wanted if path not in whole]
        kept = sum(self._wanted[path].size for path in whole) + sum(self._transfers[path].there for path in missing)
        require_space(self._directory, sum(file.size for file in self._wanted.values()) - kept)
        self._meter.add(kept, len(whole))
        first = [path for path in _JSON_FIRST if path in missing]
        for path in first:
            self._fetch(path)
        self._check_promises()
        self._fetch_all(sorted(set(missing) - set(first), key=lambda path: -self._wanted[path].size))
        return kept

    def _fetch_all(self, paths: Sequence[str]) -> None:
        run_all([partial(self._fetch, path) for path in paths], _FILES_AT_ONCE, self._stop)

    def _fetch(self, path: str) -> None:
        self._transfers[path].run(self._directory / path)
        self._meter.add(0, 1)

    def _is_whole(self, path: str) -> bool:
        local, file = self._directory / path, self._wanted[path]
        if local.is_symlink() or not local.is_file() or local.stat().st_size != file.size:
            return False
        return equals(local, file.size, hash_file(local)[1] if file.sha256 is not None else "", file)

    def _drop_others(self) -> None:
        """Remove what an interrupted run of another commit left and this one does not have."""
        for parent, folders, names in os.walk(self._directory):
            if Path(parent) == self._directory and CACHE in folders:
                folders.remove(CACHE)
            for name in names:
                path = Path(parent, name)
                relative = path.relative_to(self._directory).as_posix()
                if relative not in self._wanted and not relative.startswith(OWN_PREFIX):
                    path.unlink()

    def _check_promises(self) -> None:
        """Compare the manifest with the list of files before the weights are fetched.

        Raises:
            FormatError: the manifest breaks a rule.
            QlfError: a file that it lists is not there, or has another size.
        """
        if manifest.FILE_NAME not in self._wanted or CONFIG_NAME not in self._wanted:
            return
        data = repository.read_file(self._directory, manifest.FILE_NAME)
        root = _object(data)
        if root.get("kind") != "base":
            return
        for entry in manifest.parse(data).files:
            file = self._wanted.get(entry.name)
            if file is None or file.size != entry.size:
                found = "no such file" if file is None else f"{file.size} bytes"
                raise FormatError(f"found {found}, qlf.json says {entry.size} bytes", rule="M6", file=entry.name)


def _object(data: bytes) -> dict[str, Any]:
    """qlf.json as an object.

    Raises:
        FormatError: M1.
    """
    try:
        root = strict_json(data)
    except ValueError as error:
        raise FormatError(f"not valid JSON: {error}", rule="M1", file=manifest.FILE_NAME) from None
    if not isinstance(root, dict):
        raise FormatError("found no JSON object", rule="M1", file=manifest.FILE_NAME)
    return root
