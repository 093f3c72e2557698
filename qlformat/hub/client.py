"""A hub as push and pull see it: what a repository holds at a commit, and calls that are tried again, so often."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from qlformat.errors import QlfError
from qlformat.hub.refusals import RETRIED, HubError, is_unreachable, refusal, scrub, status_of, token, waits_for
from qlformat.source import is_repo_id
from qlformat.workers import Stopped

if TYPE_CHECKING:
    import httpx2
    from huggingface_hub import HfApi

T = TypeVar("T")

TRIES = 5
FIRST_WAIT_SECONDS = 1.0
"""Before the second try; each further wait is twice as long, and none is longer than a hub may ask for."""
LONGEST_WAIT_SECONDS = 60.0
MAX_FILES = 50_000
TIMEOUT_SECONDS = 30.0
_PIECE_BYTES = 256 << 10
"""Sent at a time; on a slow line it is also how often the bar moves."""


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository at a commit.

    Attributes:
        sha256: of a file that is stored as LFS or xet; None for one that git holds.
        blob_id: git's SHA-1 of the file, or of the pointer to it.
    """

    path: str
    size: int
    sha256: str | None
    blob_id: str


@dataclass(frozen=True)
class RemoteState:
    """A repository at one commit; `commit` is None when it has none yet."""

    commit: str | None
    private: bool
    files: Mapping[str, RemoteFile] = field(default_factory=dict)


class HubClient:
    """One hub, asked through huggingface_hub with the user's token.

    Args:
        endpoint: address of the hub; by default that of HF_ENDPOINT, or the public one.
        tries: how often a call is tried before its failure is said.
    """

    def __init__(self, endpoint: str | None = None, tries: int = TRIES) -> None:
        from huggingface_hub import HfApi

        if endpoint is not None and not endpoint.startswith(("http://", "https://")):
            raise QlfError(f"found the endpoint {endpoint[:100]!r}, needed an address that begins with https://")
        self.api: HfApi = HfApi(endpoint=endpoint.rstrip("/") if endpoint else None)
        self.host: str = scrub(self.api.endpoint)
        self.tries = tries

    def call(self, name: str, action: Callable[[], T], *, tries: int | None = None) -> T:
        """The result of `action`, tried again while the hub is busy or out of reach.

        Args:
            name: of the repository, for messages.
            action: one call of the client.
            tries: at most so often; 1 for what the client tries again itself.

        Raises:
            HubError: the hub refused or failed; the line says how.
            Stopped: `action` was asked to give up.
            OSError: a failure of this machine, such as a full disk.
        """
        tries = tries or self.tries
        for attempt in range(1, tries + 1):
            try:
                return action()
            except (QlfError, Stopped):
                raise
            except Exception as error:
                wait = max(FIRST_WAIT_SECONDS * 2 ** (attempt - 1), waits_for(error) or 0.0)
                retried = status_of(error) in RETRIED or is_unreachable(error)
                if retried and attempt < tries and wait <= LONGEST_WAIT_SECONDS:
                    time.sleep(wait)
                    continue
                raise self.explained(error, name, attempt) from None
        raise HubError(f"{name}: nothing was tried")  # tries is at least 1

    def explained(self, error: Exception, name: str, attempt: int) -> Exception:
        """The error to raise for one of the client, tried `attempt` times."""
        found = refusal(error, name, self.host, tries=attempt)
        if found is not None:
            return found
        if isinstance(error, OSError) and error.errno is not None:
            return error  # this machine's, such as a full disk
        # Malformed answers, and whatever the upload's native part has to say.
        kind = type(error).__name__
        return HubError(f"{name}: {self.host} did not do as the Hub does ({kind}: {scrub(str(error), token())})")

    def state(self, repo_id: str, revision: str | None = None) -> RemoteState | None:
        """The repository at a revision; None when there is no such repository that the token may see.

        Raises:
            HubError: there is no such revision, or the hub cannot be asked.
        """
        from huggingface_hub import errors as hub

        def ask() -> Any:
            try:
                return self.api.model_info(repo_id, revision=revision, timeout=TIMEOUT_SECONDS)
            except hub.GatedRepoError:
                raise
            except hub.RepositoryNotFoundError as error:
                if error.response.status_code == 404:
                    return None
                raise

        info = self.call(_named(repo_id, revision), ask)
        if info is None:
            return None
        if not info.sha:
            return RemoteState(None, bool(info.private))
        files = self.call(_named(repo_id, revision), lambda: self._files(repo_id, info.sha))
        return RemoteState(info.sha, bool(info.private), files)

    def _files(self, repo_id: str, commit: str) -> dict[str, RemoteFile]:
        found: dict[str, RemoteFile] = {}
        for item in self.api.list_repo_tree(repo_id, recursive=True, revision=commit):
            size = getattr(item, "size", None)
            if size is None:
                continue  # a folder
            lfs = item.lfs  # type: ignore[union-attr]  # only files have a size
            sha256 = lfs.sha256 if lfs is not None else None
            texts = (item.path, sha256 or "", item.blob_id)  # type: ignore[union-attr]
            if type(size) is not int or size < 0 or not all(isinstance(text, str) for text in texts):
                raise HubError(f"{repo_id}: {self.host} lists a file without a plain name, size and hash")
            found[item.path] = RemoteFile(item.path, size, sha256, item.blob_id)  # type: ignore[union-attr]
            if len(found) > MAX_FILES:
                raise HubError(f"{repo_id}: found more than {MAX_FILES} files, which is no model repository")
        return found


def parse_repo_id(text: str) -> tuple[str, str | None]:
    """("ORG/NAME", revision or None) of "ORG/NAME" or "ORG/NAME@revision".

    Raises:
        QlfError: it is neither, or the Hub does not allow the name.
    """
    if not is_repo_id(text):
        raise QlfError(f"found {text[:100]!r}, needed a repository id ORG/NAME")
    repo_id, _, revision = text.partition("@")
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented, but without __all__

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise QlfError(f"the name {repo_id[:100]!r} is not allowed: {scrub(str(error))}") from None
    return repo_id, revision or None


@contextmanager
def quiet_client() -> Iterator[None]:
    """Keep the client's own words off the terminal: what matters of them is said once, in one line.

    For the main thread, around everything: what it sets is of the whole process.
    """
    from huggingface_hub.utils import logging as client_log

    before = client_log.get_verbosity()
    client_log.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        client_log.set_verbosity(before)


@contextmanager
def without_bars() -> Iterator[None]:
    """Keep the client's progress bars off the terminal, where there is one of ours."""
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # documented, but without __all__
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextmanager
def large_pieces() -> Iterator[None]:
    """Have the client's HTTP library send files in larger pieces than its 64 KiB, each of which costs it 40 us."""
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]  # documented, but without __all__

    session = get_session()
    before = session.event_hooks
    session.event_hooks = {**before, "request": [*before["request"], _enlarge]}
    try:
        yield
    finally:
        session.event_hooks = before


def _enlarge(request: httpx2.Request) -> None:
    stream: Any = request.stream
    if hasattr(stream, "CHUNK_SIZE"):  # of a file; other versions of the library keep their size
        stream.CHUNK_SIZE = _PIECE_BYTES


def _named(repo_id: str, revision: str | None) -> str:
    return f"{repo_id}@{revision}" if revision else repo_id
