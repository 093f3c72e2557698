"""Files on their way to a hub: as soon as each is hashed, counted, and broken off when they turn out to be unsound."""

from __future__ import annotations

import importlib.util
import io
import threading
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from qlformat.errors import QlfError
from qlformat.hub.client import TIMEOUT_SECONDS, HubClient, large_pieces, without_bars
from qlformat.hub.contents import is_weights
from qlformat.hub.examination import Examination
from qlformat.hub.plan import PlannedFile
from qlformat.progress import HIDDEN, Progress, ProgressMeter
from qlformat.workers import Stopped, run_all

if TYPE_CHECKING:
    from collections.abc import Sequence

    from huggingface_hub import CommitOperationAdd

_AT_ONCE = 5
"""Files, as the client itself sends them."""


class SentFile(io.BufferedReader):
    """A file to read from, which stops when told to.

    Args:
        path: of the file.
        given_up: asked before each read; when it says so, reading raises Stopped.
        meter: counts the bytes, and the file at its end; what is read again for a further try is not counted twice.
    """

    def __init__(self, path: Path, given_up: Callable[[], bool], meter: ProgressMeter) -> None:
        super().__init__(io.FileIO(path))
        self._size = path.stat().st_size
        self._given_up = given_up
        self._meter = meter
        self._farthest = 0

    def read(self, size: int | None = -1, /) -> bytes:
        """Up to `size` bytes.

        Raises:
            Stopped: it was given up.
        """
        if self._given_up():
            raise Stopped
        found = super().read(size)
        position = self.tell()
        if position > self._farthest:
            self._meter.add(position - self._farthest, int(position == self._size))
            self._farthest = position
        return found


class Sending:
    """The files of a plan, sent to where only their content names them; a commit then brings them out.

    A context manager: the files are open until the commit.

    Args:
        client: the hub.
        repo_id: exists.
        revision: whose right to write is asked; None for main.
        files: what to send, weights first.
        examination: of the files.
        progress: called from the client's threads, under a lock.
        create_pr: they are for a proposed change.

    Attributes:
        additions: each file, and what stands for it in the commit.
    """

    def __init__(
        self,
        client: HubClient,
        repo_id: str,
        revision: str | None,
        files: Sequence[PlannedFile],
        examination: Examination,
        progress: Callable[[Progress], None] | None,
        *,
        create_pr: bool,
    ) -> None:
        self._client = client
        self._repo_id = repo_id
        self._target = f"{repo_id}@{revision}" if revision else repo_id
        self._revision = revision
        self._examination = examination
        self._progress = progress
        self._create_pr = create_pr
        self._stop = threading.Event()
        self._open_files = ExitStack()
        self._by_xet = self._takes_xet()
        total = sum(file.local.size for file in files)
        self._meter = ProgressMeter(progress, len(files), total, "sending", "files")
        self.additions = [(file, self._addition(file)) for file in files]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open_files.close()

    def run(self) -> None:
        """Send what a hub stores apart from git; returns early when the examination fails.

        Raises:
            HubError: the hub refused or failed.
        """
        if self._by_xet:  # the client's native part cannot be broken off; it draws how far it is
            self._examination.notes()
            if self._progress:
                self._progress(HIDDEN)
            self._preupload([addition for _, addition in self.additions])
            return
        self._examination.leave_the_screen()
        weights = [entry for entry in self.additions if is_weights(entry[0].local.name)]
        others = [entry for entry in self.additions if not is_weights(entry[0].local.name)]
        # One by one as their hashes become known, so that the first is on its way while the last is hashed.
        batches = [*([entry] for entry in weights), *([others] if others else [])]
        with without_bars(), large_pieces():
            run_all([partial(self._hash_and_send, batch) for batch in batches], _AT_ONCE, self._stop)

    def _hash_and_send(self, batch: Sequence[tuple[PlannedFile, CommitOperationAdd]]) -> None:
        for file, addition in batch:
            addition.upload_info.sha256 = bytes.fromhex(file.sha256)
        if self._given_up():
            raise Stopped
        try:
            self._preupload([addition for _, addition in batch])
        except QlfError:
            if self._given_up():  # the client has an error of its own for a file that cannot be read on
                raise Stopped from None
            raise

    def _preupload(self, additions: list[CommitOperationAdd]) -> None:
        self._client.call(
            self._target,
            lambda: self._client.api.preupload_lfs_files(
                self._repo_id, additions, revision=self._revision, create_pr=self._create_pr, free_memory=False
            ),
            tries=1,  # the client tries each request again itself
        )

    def _addition(self, file: PlannedFile) -> CommitOperationAdd:
        from huggingface_hub import CommitOperationAdd

        addition = CommitOperationAdd(file.local.name, str(file.local.path))
        if not self._by_xet:  # the client sends an open file by LFS, a path by xet where it can
            sent = SentFile(file.local.path, self._given_up, self._meter)
            addition.path_or_fileobj = self._open_files.enter_context(sent)
        return addition

    def _given_up(self) -> bool:
        return self._stop.is_set() or self._examination.failed.is_set()

    def _takes_xet(self) -> bool:
        """Whether client and hub send by xet; the client itself never falls back to LFS."""
        from huggingface_hub import constants
        from huggingface_hub.utils import (  # type: ignore[attr-defined]  # documented, but without __all__
            build_hf_headers,
            get_session,
            hf_raise_for_status,
        )

        if constants.HF_HUB_DISABLE_XET or importlib.util.find_spec("hf_xet") is None:
            return False
        url = f"{self._client.api.endpoint}/api/models/{self._repo_id}/xet-write-token/main"

        def ask() -> bool:
            parameters = {"create_pr": "1"} if self._create_pr else None
            response = get_session().get(url, headers=build_hf_headers(), params=parameters, timeout=TIMEOUT_SECONDS)
            if response.status_code == 404:
                return False
            hf_raise_for_status(response)
            return True

        return self._client.call(self._target, ask)
