"""Hash and check a directory on threads of its own, while the hub is asked, the card is written and files are sent."""

from __future__ import annotations

import threading
from collections.abc import Callable, Container, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress

from qlformat import native
from qlformat.errors import FormatError, QlfError
from qlformat.hashing import hash_file
from qlformat.hub.contents import Contents, LocalFile, is_weights
from qlformat.hub.soundness import require_sound
from qlformat.progress import Progress
from qlformat.shard_hashes import hash_shard
from qlformat.verifier import ShardTensorHashes


class Examination:
    """The work on a directory's bytes, which begins at once.

    The hashes come first, since nothing can be sent without them: those of the files, and in the same pass those of
    the tensors of a 4-bit checkpoint, which are checked then. Whoever sends meanwhile looks at `failed` and asks
    `notes` before publishing.

    Args:
        contents: what the directory holds.
        threads: workers; all CPUs of the process by default.
        progress: called from the workers, under a lock, until `leave_the_screen`.
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
        self.failed = threading.Event()
        self._contents = contents
        self._threads = threads or native.default_threads()
        self._progress = progress
        self._allow_base_mismatch = allow_base_mismatch
        self._stop = threading.Event()
        self._structure: Future[None] = Future()
        # In the order of sending. The main thread is at work, too: it imports the client, which cannot send before.
        self._hashing = ThreadPoolExecutor(max(1, self._threads - 1), thread_name_prefix="qlf")
        self._tensors: dict[str, Mapping[str, str]] = {}
        self._hashes = {file: self._hashing.submit(self._hash, file) for file in contents.files}
        self._first_hashes = list(self._hashes.values())
        self._checking = ThreadPoolExecutor(1, thread_name_prefix="qlf")
        self._notes: Future[tuple[str, ...]] = Future()
        # An adapter is small, and its base is looked for on the hub, which is the main thread's to ask.
        self._waits = contents.kind == "adapter"
        if not self._waits:
            self._notes = self._checking.submit(self._examine)
        self._checking.shutdown(wait=False)  # it ends with what was given to it

    def cancel(self) -> None:
        """Give up, and wait for the threads."""
        self._stop.set()
        self._hashing.shutdown()  # not by cancelling: whoever waits for a hash would wait for ever
        self._checking.shutdown()

    def leave_the_screen(self) -> None:
        """Report no progress from now on."""
        self._progress = None

    def structure(self) -> None:
        """Wait for what can be checked without reading the weights' bytes; all of it, of an adapter.

        Raises:
            QlfError: it is not sound.
        """
        if self._waits and not self._structure.done():
            self._notes.set_result(self._check())
            self._structure.set_result(None)
        self._structure.result()

    def notes(self) -> tuple[str, ...]:
        """Wait for the whole check: what is worth knowing about a sound directory.

        Raises:
            QlfError: it is not sound.
        """
        self.structure()
        return self._notes.result()

    def hashes(self, contents: Contents, written: Container[str]) -> dict[str, Future[str]]:
        """The sha256 of each file by name, as they become known.

        Args:
            contents: what the directory holds by now.
            written: names of files that may have been written since the start.

        Raises:
            QlfError: another file has changed, so what is checked is not what would be published.
        """
        for file in contents.files:
            if file in self._hashes:
                continue
            if file.name not in written:
                raise QlfError(f"{file.name} changed while it was being checked; nothing was published: run it again")
            self._hashes[file] = self._hashing.submit(self._hash, file)
        self._hashing.shutdown(wait=False)
        return {file.name: self._hashes[file] for file in contents.files}

    def _hash(self, file: LocalFile) -> str:
        if self._contents.four_bit and is_weights(file.name):
            with suppress(FormatError):  # found by the check, too; its hash is that of any file
                found = hash_shard(file.path, self._stop)
                self._tensors[file.name] = found.tensors
                return found.sha256
        return hash_file(file.path, self._stop)[1]

    def _examine(self) -> tuple[str, ...]:
        """On a thread."""
        try:
            found = self._check(self._before_the_values)
            if not self._structure.done():
                self._structure.set_result(None)
        except BaseException as error:
            self.failed.set()
            if not self._structure.done():
                self._structure.set_exception(error)
            raise
        return found

    def _check(self, structure_is_sound: Callable[[], ShardTensorHashes] | None = None) -> tuple[str, ...]:
        return require_sound(
            self._contents,
            self._threads,
            self._report,
            allow_base_mismatch=self._allow_base_mismatch,
            stop=self._stop,
            structure_is_sound=structure_is_sound,
        )

    def _before_the_values(self) -> ShardTensorHashes:
        """The hashes of the tensors."""
        self._structure.set_result(None)
        wait(self._first_hashes)
        return self._tensors

    def _report(self, now: Progress) -> None:
        progress = self._progress
        if progress is not None:
            progress(now)
