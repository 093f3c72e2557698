"""The windows of a text: what counts, and what stands before it."""

from __future__ import annotations

import numpy as np
import pytest

from qlformat import QlfError
from qlformat.quality.windows import choose_stride, choose_window, row_windows, text_windows

BOS = 99


def counted(tokens: int, window: int, stride: int, bos: int | None) -> list[tuple[int, int]]:
    """(token of the text, how many tokens of the text it is predicted from), in the order in which they count."""
    found = []
    for begin, item in zip(range(0, tokens, stride), text_windows(range(tokens), window, stride, bos), strict=False):
        assert item.ids.size <= window
        prefix = int(bos is not None)
        assert item.ids[:prefix].tolist() == [bos][:prefix]
        assert item.ids[prefix:].tolist() == list(range(begin, begin + item.ids.size - prefix))
        found += [(int(item.ids[at]), int(at) - prefix) for at in item.counted]
    return found


@pytest.mark.parametrize("bos", [None, BOS])
@pytest.mark.parametrize("tokens", [2, 3, 7, 8, 9, 31])
@pytest.mark.parametrize("window", [2, 3, 8])
def test_every_token_counts_once(tokens: int, window: int, bos: int | None) -> None:
    for stride in range(1, window):
        found = counted(tokens, window, stride, bos)
        # The first token is predicted from BOS, or not at all.
        assert [token for token, _ in found] == list(range(int(bos is None), tokens))
        room = window - int(bos is not None)
        least = min(room - stride, room - 1)
        assert all(before >= least for token, before in found if token >= room)
        assert all(before == token for token, before in found if token < room)


def test_an_example() -> None:
    first, second, third = text_windows([10, 11, 12, 13, 14, 15, 16], 4, 2, None)
    assert (first.ids.tolist(), first.counted.tolist()) == ([10, 11, 12, 13], [1, 2, 3])
    assert (second.ids.tolist(), second.counted.tolist()) == ([12, 13, 14, 15], [2, 3])
    assert (third.ids.tolist(), third.counted.tolist()) == ([14, 15, 16], [2])
    (whole,) = text_windows([10, 11], 4, 2, BOS)
    assert (whole.ids.tolist(), whole.counted.tolist()) == ([BOS, 10, 11], [1, 2])


def test_rows_count_where_they_have_a_label() -> None:
    rows = [
        {"input_ids": [1, 2, 3, 4], "labels": [-100, -100, 3, 4]},
        {"input_ids": [5, 6], "labels": [5, -100]},  # nothing stands before the only label
        {"input_ids": [7, 8], "labels": [7, 8]},
    ]
    found = [(item.ids.tolist(), item.counted.tolist()) for item in row_windows(rows, -100)]
    assert found == [([1, 2, 3, 4], [2, 3]), ([7, 8], [1])]


def test_defaults() -> None:
    assert choose_window(None, None) == choose_window(None, 8192) == 1024
    assert choose_window(None, 256) == choose_window(256, 256) == 256
    assert choose_stride(None, 256) == 128
    assert choose_stride(None, 2) == choose_stride(1, 2) == 1


@pytest.mark.parametrize(("window", "text"), [(257, "the model's context is 256"), (1, "needed at least 2")])
def test_windows_that_do_not_fit(window: int, text: str) -> None:
    with pytest.raises(QlfError, match=text):
        choose_window(window, 256)


@pytest.mark.parametrize("stride", [0, 8, 9])
def test_strides_that_leave_tokens_without_context(stride: int) -> None:
    with pytest.raises(QlfError, match="needed 1 to 7: less than the window"):
        choose_stride(stride, 8)


def test_windows_are_arrays_of_int64() -> None:
    (item,) = text_windows([1, 2], 4, 2, BOS)
    assert item.ids.dtype == item.counted.dtype == np.int64
