"""A checksum at the speed of memory, for what --resume compares with its own writing; what is published has sha256."""

from __future__ import annotations

import hashlib

import numpy as np

_ROW_WORDS = 512
"""4,096 bytes, a page: what a crash leaves unwritten."""


class PageSums:
    """Sums of the 64-bit words of every page, and of equal places of all pages, hashed; a hashing.Digest.

    A missing, zeroed or exchanged page and any single changed word change it. Unlike with a hash, it matters how the
    bytes are cut into pieces, and it is no protection from a forger. 11 GB/s where sha256 has 1.5 and CRC-32 2.6.
    """

    def __init__(self) -> None:
        self._digest = hashlib.blake2b(digest_size=8)

    def update(self, data: memoryview, /) -> None:
        """Take further bytes."""
        size = data.nbytes // (_ROW_WORDS * 8) * (_ROW_WORDS * 8)
        if size:
            words = np.frombuffer(data[:size], dtype="<u8").reshape(-1, _ROW_WORDS)
            for axis in (1, 0):
                self._digest.update(np.add.reduce(words, axis=axis).data)
        self._digest.update(data[size:])

    def hexdigest(self) -> str:
        """16 digits."""
        return self._digest.hexdigest()
