"""PageSums: what a crash or a slip of the disk does to a file changes them."""

from __future__ import annotations

import random

import pytest

from qlformat.merge.checksum import PageSums

PAGE = 4096
SIZE = 8 * PAGE + 123


def sums(data: bytes) -> str:
    found = PageSums()
    found.update(memoryview(data))
    return found.hexdigest()


@pytest.fixture(scope="module")
def data() -> bytes:
    return random.Random(0).randbytes(SIZE)


def test_the_same_bytes_have_the_same_sums(data: bytes) -> None:
    assert sums(data) == sums(bytes(data)) and len(sums(data)) == 16
    assert sums(b"") == sums(b"") != sums(b"\0")


def test_a_page_that_was_not_written_is_seen(data: bytes) -> None:
    for page in range(9):
        begin, end = page * PAGE, min((page + 1) * PAGE, SIZE)
        for other in (bytes(end - begin), bytes(data[begin + 1 : end]) + b"\0"):
            assert sums(data[:begin] + other + data[end:]) != sums(data)


def test_pages_and_words_that_changed_places_are_seen(data: bytes) -> None:
    pages = [data[at : at + PAGE] for at in range(0, 8 * PAGE, PAGE)]
    assert sums(b"".join([pages[1], pages[0], *pages[2:]])) != sums(b"".join(pages))
    page = pages[0]
    assert sums(page[8:16] + page[:8] + page[16:]) != sums(page)


def test_every_flipped_bit_is_seen(data: bytes) -> None:
    chances = random.Random(1)
    for _ in range(2000):
        at, bit = chances.randrange(SIZE), chances.randrange(8)
        changed = bytearray(data)
        changed[at] ^= 1 << bit
        assert sums(bytes(changed)) != sums(data)


def test_pieces_are_told_from_each_other(data: bytes) -> None:
    first, second = data[:PAGE], data[PAGE : 2 * PAGE]
    one, other = PageSums(), PageSums()
    for piece in (first, second):
        one.update(memoryview(piece))
    for piece in (second, first):
        other.update(memoryview(piece))
    assert one.hexdigest() != other.hexdigest()
