"""Files of a model repository for reading headers only: in a local directory, or on the Hub by range requests."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, Protocol

from qlformat import repository
from qlformat.errors import FormatError, QlfError
from qlformat.source import is_repo_id

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_MERGE_GAP = 64 << 10
"""Ranges closer than this are fetched together: a request costs more time than these bytes do."""
_REQUESTS = 8
_TIMEOUT_SECONDS = 30.0
_MAX_SKIPPED = 16 << 20
IGNORED = ("*.bin", "*.gguf", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.onnx", "*.ckpt", "original/*", "onnx/*")

Range = tuple[int, int]


class Files(Protocol):
    """The top-level files of a repository.

    Attributes:
        name: path or repository id.
        repo_id, revision: repository and commit on the Hub, or None.
        sizes: file name -> size in bytes.
    """

    name: str
    repo_id: str | None
    revision: str | None
    sizes: dict[str, int]

    def read(self, name: str) -> bytes:
        """All bytes of a small file."""

    def read_ranges(self, name: str, ranges: Sequence[Range]) -> list[bytes]:
        """The bytes [begin, end) of each range."""


def open_files(path: str | Path) -> Files:
    """The files of a directory, or of a Hub repository id "ORG/NAME" or "ORG/NAME@revision".

    Raises:
        QlfError: there is no such directory or repository, it is gated, or the Hub cannot be reached.
    """
    if Path(path).is_dir():
        return LocalFiles(Path(path))
    if Path(path).exists():
        raise QlfError(f"{path}: found a file, needed the directory that holds it")
    repo_id, revision = _parse(path)
    from huggingface_hub import constants  # not an attribute of the package until it is imported

    if constants.HF_HUB_OFFLINE:
        return LocalFiles(local_directory(path), repo_id)
    return HubFiles(repo_id, revision)


def local_directory(path: str | Path) -> Path:
    """`path` itself when it is a directory, else the snapshot of that Hub repository, downloaded where needed.

    Raises:
        QlfError: as for `open_files`.
    """
    if Path(path).exists():
        return Path(path)
    repo_id, revision = _parse(path)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo_id, revision=revision, ignore_patterns=list(IGNORED)))
    except Exception as error:
        _raise_hub_error(error, str(path))


class LocalFiles:
    """Files of a directory (see Files)."""

    def __init__(self, directory: Path, repo_id: str | None = None) -> None:
        self.directory = directory
        self.name = repo_id or str(directory)
        self.repo_id = repo_id
        self.revision = directory.name if repo_id else None
        self.sizes: dict[str, int] = {}
        for entry in os.scandir(directory):
            if not entry.is_dir():
                try:
                    self.sizes[entry.name] = entry.stat().st_size
                except OSError:  # a dangling link: whoever needs the file gets rule R4
                    self.sizes[entry.name] = 0

    def read(self, name: str) -> bytes:
        """All bytes of a small file."""
        return repository.read_file(self.directory, name)

    def read_ranges(self, name: str, ranges: Sequence[Range]) -> list[bytes]:
        """The bytes [begin, end) of each range."""
        path = repository.resolve_file(self.directory, name)
        try:
            with path.open("rb", buffering=0) as file:
                return [os.pread(file.fileno(), end - begin, begin) for begin, end in ranges]
        except OSError as error:
            raise FormatError(f"this file cannot be read: {error.strerror}", rule="R4", file=name) from None


class HubFiles:
    """Files of a Hub repository, fetched by range requests (see Files).

    Attributes:
        transferred: bytes of file content fetched so far.
    """

    def __init__(self, repo_id: str, revision: str | None) -> None:
        from huggingface_hub import HfApi

        self.name = f"{repo_id}@{revision}" if revision else repo_id
        self.repo_id: str | None = repo_id
        self.transferred = 0
        self._repo_id = repo_id
        self._api: HfApi = HfApi()
        self._lock = threading.Lock()
        try:
            info = self._api.model_info(repo_id, revision=revision, files_metadata=True, timeout=_TIMEOUT_SECONDS)
        except Exception as error:
            _raise_hub_error(error, self.name)
        self.revision = info.sha
        self.sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or []}

    def read(self, name: str) -> bytes:
        """All bytes of a small file."""
        size = self.sizes.get(name)
        if size is None:
            raise FormatError("this file is missing in the repository", rule="R4", file=name)
        if size > repository.MAX_JSON_BYTES:
            raise FormatError(f"found {size} bytes, such a file is not plausible", rule="R4", file=name)
        return self._fetch(name, (0, size)) if size else b""

    def read_ranges(self, name: str, ranges: Sequence[Range]) -> list[bytes]:
        """The bytes [begin, end) of each range; neighbouring ranges share a request."""
        merged = merge_ranges(ranges)
        with ThreadPoolExecutor(_REQUESTS) as pool:
            parts = list(pool.map(lambda part: self._fetch(name, part), merged))
        found = []
        for begin, end in ranges:
            (start, _), data = next((m, p) for m, p in zip(merged, parts, strict=True) if m[0] <= begin and end <= m[1])
            found.append(data[begin - start : end - start])
        return found

    def _fetch(self, name: str, part: Range) -> bytes:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import (  # type: ignore[attr-defined]  # documented, but without __all__
            build_hf_headers,
            get_session,
            hf_raise_for_status,
        )

        begin, end = part
        url = hf_hub_url(self._repo_id, name, revision=self.revision, endpoint=self._api.endpoint)
        # identity: a compressed range cannot be cut.
        headers = {**build_hf_headers(), "Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
        data = bytearray()
        try:
            with get_session().stream(
                "GET", url, headers=headers, follow_redirects=True, timeout=_TIMEOUT_SECONDS
            ) as response:
                hf_raise_for_status(response)
                skip = 0 if response.status_code == 206 else begin  # 200: the server ignored the range
                if skip > _MAX_SKIPPED:
                    raise QlfError(f"{self.name}: the server ignores range requests; download the repository first")
                for chunk in response.iter_raw():
                    with self._lock:
                        self.transferred += len(chunk)
                    data += chunk
                    if len(data) >= skip + end - begin:
                        break
        except Exception as error:
            _raise_hub_error(error, f"{self.name}/{name}")
        if len(data) < skip + end - begin:
            raise QlfError(f"{self.name}: found {len(data) - skip} bytes, needed {end - begin}; try again", file=name)
        return bytes(data[skip : skip + end - begin])


def merge_ranges(ranges: Sequence[Range], gap: int = _MERGE_GAP) -> list[Range]:
    """The fewest ranges that cover all of `ranges` without bridging more than `gap` bytes."""
    merged: list[Range] = []
    for begin, end in sorted(ranges):
        if merged and begin - merged[-1][1] <= gap:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged


def _parse(path: str | Path) -> tuple[str, str | None]:
    text = str(path)
    if not is_repo_id(text):
        raise QlfError(f"found no directory {text!r}; give a path or a Hub repository id, ORG/NAME")
    repo_id, _, revision = text.partition("@")
    return repo_id, revision or None


def _raise_hub_error(error: Exception, name: str) -> NoReturn:
    """Raise one line for a failure of the Hub; what is none is raised as it is."""
    from huggingface_hub import errors as hub

    if isinstance(error, hub.GatedRepoError):
        message = f"{name} is gated: accept its terms on the Hub and log in with `hf auth login`"
    elif isinstance(error, hub.RevisionNotFoundError):
        message = f"{name}: the repository has no such revision; check the branch, tag or commit"
    elif isinstance(error, hub.RepositoryNotFoundError):
        message = f"found no path {name!r} and no such repository; check the spelling, or log in if it is private"
    elif isinstance(error, hub.OfflineModeIsEnabled):
        message = f"{name} is no path and not in the cache; HF_HUB_OFFLINE keeps the Hub from being asked"
    elif isinstance(error, hub.LocalEntryNotFoundError):
        message = f"{name} is not in the local cache and the Hub cannot be reached; check the connection"
    elif isinstance(error, hub.EntryNotFoundError):
        message = f"{name}: the repository lacks this file"
    # The first base of HfHubHTTPError is the HTTP library's own error, whichever library huggingface_hub is built on.
    elif isinstance(error, (hub.HfHubHTTPError.__bases__[0], ConnectionError, TimeoutError)):
        reason = str(error).strip().split("\n")[0][:160] or type(error).__name__
        message = f"the Hub did not deliver {name} ({reason}); check the connection and try again"
    elif isinstance(error, OSError):
        message = f"{name} cannot be stored in the Hub cache: {error.strerror or error}"
    else:
        raise error
    raise QlfError(message) from None
