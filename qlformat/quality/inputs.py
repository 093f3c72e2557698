"""The texts and conversations that models are evaluated on, as windows of tokens."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlformat.errors import QlfError
from qlformat.finetune.dataset import load_rows, tokenize
from qlformat.finetune.masking import IGNORED
from qlformat.finetune.rows import Rows
from qlformat.quality.windows import Window, choose_stride, choose_window, row_windows, text_windows


@dataclass(frozen=True)
class Inputs:
    """What to evaluate on; for the fields that it has in common with Evaluation see there."""

    kind: str
    source: str
    sha256: str
    windows: list[Window]
    text_tokens: int
    window: int
    stride: int | None
    bos: bool
    data: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()


def text_inputs(
    path: Path,
    tokenizer: Any,
    window: int | None,
    stride: int | None,
    context: int | None,
    bos: bool | None,
    max_tokens: int | None,
) -> Inputs:
    """A UTF-8 file, tokenized as a whole and cut into windows; arguments as for `evaluate`.

    Raises:
        QlfError: it cannot be read, is not UTF-8, or has less than two tokens; or the window or stride does not fit.
    """
    size = choose_window(window, context)
    step = choose_stride(stride, size)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise QlfError(f"{path}: the text cannot be read: {error.strerror}; give a file of UTF-8 text") from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise QlfError(f"{path}: byte {error.start} is not UTF-8 text; give a text file, or rows with --data") from None
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:max_tokens]
    if len(ids) < 2:
        raise QlfError(f"{path}: found {len(ids)} tokens, needed at least 2; give a longer text")
    begin = _bos(tokenizer, bos)
    windows = list(text_windows(ids, size, step, begin))
    digest = hashlib.sha256(content).hexdigest()
    return Inputs("text", str(path), digest, windows, len(ids), size, step, begin is not None)


def data_inputs(
    spec: str,
    tokenizer: Any,
    window: int | None,
    stride: int | None,
    context: int | None,
    max_tokens: int | None,
) -> Inputs:
    """Training rows with their loss masks, one window each; arguments as for `evaluate`.

    Raises:
        DataError: they cannot be read, or have nothing to evaluate on within the window.
        QlfError: the window does not fit, a stride is given, or the datasets library is missing.
    """
    if stride is not None:
        raise QlfError("found a stride with data, where every row is a window of its own; leave it out")
    size = choose_window(window, context)
    try:
        rows = load_rows(spec)
        dataset, stats = tokenize(rows, tokenizer, size, packing=False)
    except ImportError as error:
        raise QlfError(f"found no {error.name}; install what data needs: pip install 'qlformat[finetune]'") from None
    windows = _within(list(row_windows(dataset, IGNORED)), max_tokens)
    notes = list(stats.notes)
    if stats.truncated_rows:
        notes.append(f"{stats.truncated_rows} rows are longer than {size} tokens and lost their end")
    tokens = sum(len(window.ids) for window in windows)
    return Inputs("data", spec, rows.sha256, windows, tokens, size, None, False, _told(rows, stats), tuple(notes))


def _told(rows: Rows, stats: Any) -> dict[str, Any]:
    return {**rows.as_dict(), "truncated_rows": stats.truncated_rows, "dropped_rows": stats.dropped_rows}


def _bos(tokenizer: Any, wanted: bool | None) -> int | None:
    """The BOS token to begin windows with, or None."""
    bos: int | None = tokenizer.bos_token_id
    if wanted is None:
        adds = bos is not None and tokenizer("")["input_ids"][:1] == [bos]
        return bos if adds else None
    if wanted and bos is None:
        raise QlfError("BOS was asked for, the tokenizer has none; leave it out")
    return bos if wanted else None


def _within(windows: list[Window], limit: int | None) -> list[Window]:
    """The first windows that together have at most `limit` tokens; at least one."""
    if limit is None:
        return windows
    total = 0
    for number, window in enumerate(windows):
        total += len(window.ids)
        if total > limit:
            return windows[: max(number, 1)]
    return windows
