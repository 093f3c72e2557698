"""Hash and check a directory on threads of its own, while the hub is asked and the card is written."""

from __future__ import annotations

import threading
from collections.abc import Callable, Container
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import Self

from qlformat import native
from qlformat.errors import QlfError
from qlformat.hub.contents import Contents, hash_files
from qlformat.hub.soundness import require_sound
from qlformat.progress import Progress


class Examination:
    """The work on a directory's bytes that a push needs before it may send any. A context manager; leaving it gives up.

    Args:
        contents: what the directory holds.
        threads: workers of each of the two; all CPUs of the process by default.
        progress: called from the workers, under a lock.
        allow_base_mismatch: accept an adapter though the base that it names is another one by now.
    """

    def __init__(
        self,
        contents: Contents,
        threads: int | None,
        progress: Callable[[Progress], None] | None,
        *,
        allow_base_mismatch: bool,
    ) -> None:
        self._contents = contents
        self._threads = threads or native.default_threads()
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="qlf")  # each reads what the other has just read
        self._hashes = self._pool.submit(hash_files, contents.files, self._threads, self._stop)
        self._check = partial(
            require_sound, contents, threads, progress, allow_base_mismatch=allow_base_mismatch, stop=self._stop
        )
        # An adapter's base is looked for on the hub, which is the main thread's to ask (see quiet_client).
        self._notes: Future[tuple[str, ...]] | None = (
            None if contents.kind == "adapter" else self._pool.submit(self._check)
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)

    def notes(self) -> tuple[str, ...]:
        """Wait for the check: what is worth knowing about a sound directory.

        Raises:
            QlfError: it is not sound.
        """
        return self._check() if self._notes is None else self._notes.result()

    def hashes(self, contents: Contents, written: Container[str]) -> dict[str, str]:
        """Wait for the sha256 of each file by name.

        Args:
            contents: what the directory holds by now.
            written: names of files that may have been written since the start.

        Raises:
            OSError: a file cannot be read.
            QlfError: another file has changed, so what was checked is not what would be published.
        """
        found = self._hashes.result()
        before = set(self._contents.files)
        later = [file for file in contents.files if file not in before]
        for file in later:
            if file.name not in written:
                raise QlfError(f"{file.name} changed while it was being checked; nothing was published: run it again")
        return {**found, **hash_files(later, self._threads, self._stop)}
