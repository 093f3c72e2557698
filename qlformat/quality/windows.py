"""What is evaluated: token sequences, and which of their tokens count. docs/evaluation.md gives the rules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qlformat.errors import QlfError

Tokens = npt.NDArray[np.int64]

DEFAULT_WINDOW = 1024


@dataclass(frozen=True)
class Window:
    """One sequence that a model is run on.

    Attributes:
        ids: int64 [tokens], what the model sees.
        counted: int64, ascending positions in `ids` of the tokens that count, each predicted from those before it.
    """

    ids: Tokens
    counted: Tokens


def text_windows(ids: Sequence[int], window: int, stride: int, bos: int | None) -> Iterator[Window]:
    """Windows over the tokens of a text, each of which counts once; but the very first one, where nothing precedes it.

    Window k begins at token k * stride of the text and counts what no window before it has counted.

    Args:
        ids: tokens of the text, without special tokens.
        window: tokens of a window, BOS included.
        stride: tokens from the beginning of one window to that of the next, from 1 to window - 1.
        bos: the token that every window begins with, or None for none.
    """
    tokens = np.asarray(ids, np.int64)
    prefix = np.array([] if bos is None else [bos], np.int64)
    room, counted = window - prefix.size, 1 - prefix.size
    for begin in range(0, tokens.size, stride):
        end = min(begin + room, tokens.size)
        if counted < end:
            positions = np.arange(counted - begin, end - begin, dtype=np.int64) + prefix.size
            yield Window(np.concatenate([prefix, tokens[begin:end]]), positions)
            counted = end
        if end == tokens.size:
            return


def row_windows(rows: Any, ignored: int) -> Iterator[Window]:
    """A window for each tokenized row: the tokens with a label count, as in training.

    Args:
        rows: of finetune.dataset.tokenize, not packed: rows of "input_ids" and "labels".
        ignored: the label of a token that does not count.
    """
    for row in rows:
        labels = np.asarray(row["labels"], np.int64)
        counted = np.flatnonzero(labels != ignored)
        counted = counted[counted > 0]
        if counted.size:
            yield Window(np.asarray(row["input_ids"], np.int64), counted)


def choose_window(window: int | None, context: int | None) -> int:
    """The window to use: as asked, else DEFAULT_WINDOW or what the model's context allows.

    Raises:
        QlfError: it is longer than the context, or too short to predict anything in.
    """
    if window is None:
        return min(DEFAULT_WINDOW, context or DEFAULT_WINDOW)
    if context is not None and window > context:
        raise QlfError(f"found a window of {window} tokens, the model's context is {context}; give a smaller window")
    if window < 2:
        raise QlfError(f"found a window of {window} tokens, needed at least 2: one to predict, and one before it")
    return window


def choose_stride(stride: int | None, window: int) -> int:
    """The stride to use: as asked, else half a window.

    Raises:
        QlfError: some tokens would have nothing before them.
    """
    if stride is None:
        return window // 2
    if not 1 <= stride < window:
        raise QlfError(f"found a stride of {stride} tokens, needed 1 to {window - 1}: less than the window")
    return stride
