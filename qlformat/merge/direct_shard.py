"""A ShardWriter whose tensors go past the page cache: the memory of every new cached page costs more than the write.

What is written is flushed to the disk before it is published anyway. Whole pages are written from where they lie, if
that is aligned, or from one aligned buffer of each thread; the ends of a tensor, which share their pages with a
neighbour, go through the cache. So no page is ever written in both ways.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from qlformat.shards import ShardWriter, TensorSpec

PAGE = 4096
"""Offsets, sizes and memory are multiples of it: at least the block size of any disk."""
BUFFER_BYTES = 2 << 20
_LEAST_BYTES = 16 * PAGE
_REFUSED = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP)


class DirectShardWriter(ShardWriter):
    """Like ShardWriter, and the same bytes; where the system or the file system cannot, it is one."""

    def __init__(self, path: Path, specs: Iterable[TensorSpec]) -> None:
        super().__init__(path, specs)
        self._local = threading.local()
        self._carried: dict[str, tuple[int, bytes]] = {}
        """Tensor -> position and bytes of the begun page at the end of its last piece."""
        self._sizes = {spec.name: spec.nbytes for spec in self._specs}
        self._direct = -1
        try:
            if hasattr(os, "O_DIRECT"):
                self._direct = os.open(path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            if error.errno not in _REFUSED:
                self.close()
                raise
        size = self.data_start + sum(self._sizes.values())
        if self._direct >= 0 and os.fstat(self._fd).st_size < size:
            os.ftruncate(self._fd, size)  # a write past the end would have to wait for all others

    def finish(self) -> tuple[int, str]:
        """Write what is held of begun pages, and what ShardWriter.finish writes."""
        for position, carried in self._carried.values():
            self._write_at(position, memoryview(carried))
        self._carried.clear()
        return super().finish()

    def close(self) -> None:
        """Close the file."""
        if self._direct >= 0:
            os.close(self._direct)
            self._direct = -1
        super().close()

    def read_back(self, name: str, offset: int, buffer: memoryview) -> int:
        """Read bytes of a tensor back from the disk; the count read is returned."""
        done = 0
        while self._direct >= 0 and buffer.nbytes - done >= _LEAST_BYTES:
            count = self._read_pages(self.data_start + self._offsets[name] + offset + done, buffer[done:])
            if not count:
                break
            done += count
        return done + (super().read_back(name, offset + done, buffer[done:]) if done < buffer.nbytes else 0)

    def _read_pages(self, position: int, buffer: memoryview) -> int:
        """Read what one buffer holds of the pages around `position`; 0 at the end, and where the system refuses to."""
        skipped = position % PAGE
        count = min(buffer.nbytes, BUFFER_BYTES - skipped)
        pages = self._pages()[: -(-(skipped + count) // PAGE) * PAGE]
        try:
            found = os.preadv(self._direct, [pages.data], position - skipped)
        except OSError as error:
            if error.errno not in _REFUSED:
                raise
            return 0
        count = min(max(found - skipped, 0), count)
        np.copyto(np.frombuffer(buffer, dtype=np.uint8)[:count], pages[skipped : skipped + count])
        return count

    def write(self, name: str, offset: int, data: memoryview | bytes) -> None:
        """Write bytes of a tensor at `offset` within it; one thread writes the pieces of a tensor, best in order."""
        view = memoryview(data).cast("B")
        position = self.data_start + self._offsets[name] + offset
        held, carried = self._carried.pop(name, (position, b""))
        if held + len(carried) != position:  # not the next piece
            self._write_at(held, memoryview(carried))
            held, carried = position, b""
        first, end = held + -held % PAGE, (position + view.nbytes) // PAGE * PAGE
        if self._direct < 0 or end - first < _LEAST_BYTES:
            self._write_at(held, memoryview(carried + bytes(view)) if carried else view)
            return
        if first > position:
            self._write_at(position, view[: first - position])
        self._write_pages(first, carried, view[max(first - position, 0) : end - position])
        rest = view[end - position :]
        if rest.nbytes and offset + view.nbytes < self._sizes[name]:
            self._carried[name] = (end, bytes(rest))
        else:
            self._write_at(end, rest)

    def _write_pages(self, position: int, carried: bytes, data: memoryview) -> None:
        """Write whole pages: `carried`, which is shorter than one, and `data`."""
        source = np.frombuffer(data, dtype=np.uint8)
        if not carried and source.__array_interface__["data"][0] % PAGE == 0 and self._put(position, source):
            return
        pages, done = self._pages(), 0
        while done < data.nbytes:
            room = min(BUFFER_BYTES - len(carried), data.nbytes - done)
            size = len(carried) + room
            pages[: len(carried)] = np.frombuffer(carried, dtype=np.uint8)
            np.copyto(pages[len(carried) : size], source[done : done + room])
            if not self._put(position, pages[:size]):
                self._write_at(position, pages[:size].data)
            position, done, carried = position + size, done + room, b""

    def _put(self, position: int, pages: npt.NDArray[np.uint8]) -> bool:
        """Write whole pages; False when the file system refuses to, and then nothing counts as written."""
        done = 0
        while done < pages.size:
            try:
                done += os.pwrite(self._direct, pages[done:].data, position + done)
            except OSError as error:
                if error.errno not in _REFUSED:
                    raise
                return False
            if done % PAGE:
                return False  # stopped within a page, as on a full disk: the cached way goes on or says why not
        return True

    def _header(self, sizes: Mapping[str, int], length: int) -> bytes:
        """The header, padded so that the data begins with a page."""
        text = super()._header(sizes, length)
        return text if length else text.ljust(-(-(8 + len(text)) // PAGE) * PAGE - 8)

    def _pages(self) -> npt.NDArray[np.uint8]:
        """The aligned buffer of this thread."""
        if not hasattr(self._local, "pages"):
            self._local.pages = np.frombuffer(mmap.mmap(-1, BUFFER_BYTES), dtype=np.uint8)
        found: npt.NDArray[np.uint8] = self._local.pages
        return found
