"""One file from a hub by range requests: hashed while it is written, and gone on with after a break."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path

from qlformat.hub.client import TIMEOUT_SECONDS, HubClient, RemoteFile
from qlformat.hub.refusals import HubError
from qlformat.workers import Stopped

CHUNK_BYTES = 1 << 20
_SUFFIX = ".incomplete"


class Transfer:
    """A file on its way.

    Args:
        client: the hub.
        repo_id, commit: where the file is.
        file: its name, size and hash.
        place: directory for what is not whole yet.
        stop: set it to end the transfer soon.
        arrived: told of bytes as they come; a negative count takes some back.
    """

    def __init__(
        self,
        client: HubClient,
        repo_id: str,
        commit: str,
        file: RemoteFile,
        place: Path,
        stop: threading.Event,
        arrived: Callable[[int], None],
    ) -> None:
        self._client = client
        self._name = f"{repo_id}/{file.path}"
        self._repo_id = repo_id
        self._commit = commit
        self._file = file
        self._stop = stop
        self._arrived = arrived
        # Named by content: what another commit had under the name is not gone on with.
        key = hashlib.sha256(f"{file.path}\0{file.sha256}\0{file.blob_id}".encode()).hexdigest()
        self.part = place / f"{key[:40]}{_SUFFIX}"

    @property
    def there(self) -> int:
        """Bytes that are here already."""
        try:
            return min(self.part.stat().st_size, self._file.size)
        except FileNotFoundError:
            return 0

    def run(self, target: Path) -> None:
        """Fetch the file to `target`. A wrong one is fetched once more: what was gone on with may have been damaged.

        Raises:
            HubError: the hub failed, without a byte of progress in all tries, or its bytes have another hash.
            OSError: it cannot be written here.
            Stopped: `stop` was set; what came is kept.
        """
        for attempt in (1, 2):
            found = self._all()
            if found == self._needed():
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(self.part, target)
                return
            self._drop()
            if attempt == 2:
                raise HubError(
                    f"{self._name}: found bytes with hash {found}, the hub lists {self._needed()}, also when fetched "
                    "again; its copy is damaged"
                )

    def _needed(self) -> str:
        return self._file.sha256 or self._file.blob_id

    def _all(self) -> str:
        """Fetch until every byte is here; returns their hash. While there is progress, breaks are not counted."""
        while True:
            before = self.there
            try:
                return self._client.call(self._name, self._rest)
            except HubError:
                if self.there <= before:
                    raise

    def _rest(self) -> str:
        """Fetch what is missing, by one request."""
        file = self._file
        if file.sha256 is not None:
            digest = hashlib.sha256()
        else:  # as git names it
            digest = hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
        self.part.parent.mkdir(parents=True, exist_ok=True)
        with self.part.open("a+b", buffering=0) as out:
            if os.fstat(out.fileno()).st_size > file.size:
                out.truncate(0)
            out.seek(0)
            while chunk := out.read(CHUNK_BYTES):
                digest.update(chunk)
            begin = out.tell()
            if begin < file.size:
                self._stream(begin, out.fileno(), digest.update)
        return digest.hexdigest()

    def _stream(self, begin: int, handle: int, update: Callable[[bytes], None]) -> None:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import (  # type: ignore[attr-defined]  # documented, but without __all__
            build_hf_headers,
            get_session,
            hf_raise_for_status,
        )

        url = hf_hub_url(self._repo_id, self._file.path, revision=self._commit, endpoint=self._client.api.endpoint)
        headers = {**build_hf_headers(), "Range": f"bytes={begin}-", "Accept-Encoding": "identity"}
        left = self._file.size - begin
        with get_session().stream(
            "GET", url, headers=headers, follow_redirects=True, timeout=TIMEOUT_SECONDS
        ) as response:
            hf_raise_for_status(response)
            if begin and response.status_code != 206:
                raise HubError(f"{self._name}: the hub ignores range requests, so it cannot be gone on with")
            for chunk in response.iter_raw(CHUNK_BYTES):
                if self._stop.is_set():
                    raise Stopped
                if len(chunk) > left:
                    raise HubError(f"{self._name}: the hub sends more than the {self._file.size} bytes that it lists")
                _write(handle, chunk)
                update(chunk)
                self._arrived(len(chunk))
                left -= len(chunk)
        if left:
            raise ConnectionError(f"{left} bytes are missing")

    def _drop(self) -> None:
        self._arrived(-self.there)
        self.part.unlink(missing_ok=True)


def _write(handle: int, data: bytes) -> None:
    view = memoryview(data)
    while view.nbytes:
        view = view[os.write(handle, view) :]
