"""Which tokens are trained, from what is trained of the text.

The text is tokenized as a whole, so that the tokens are those that the model sees when it is used; characters are
mapped to tokens by the tokenizer's offsets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from qlformat.finetune.rendering import Rendered, Span

IGNORED = -100
"""The label of a token that is not trained, as in transformers."""


def tokenize_rendered(tokenizer: Any, items: Sequence[Rendered]) -> Iterator[tuple[npt.NDArray[np.int32], ...]]:
    """(input_ids, labels), both int32 [tokens], of each text: labels are IGNORED outside the spans.

    A token is trained when any character of it is: one that a merge stretches over the boundary must be predicted from
    the prompt as well. The first token never is, as nothing predicts it.
    """
    for special in (False, True):
        if any(item.special is special for item in items) and all(item.special is special for item in items):
            yield from _tokenize(tokenizer, items, special)
            return
    for item in items:
        yield from _tokenize(tokenizer, [item], item.special)


def _tokenize(tokenizer: Any, items: Sequence[Rendered], special: bool) -> Iterator[tuple[npt.NDArray[np.int32], ...]]:
    eos = tokenizer.eos_token_id
    encoded = tokenizer([item.text for item in items], add_special_tokens=special, return_attention_mask=False,
                        return_offsets_mapping=tokenizer.is_fast)  # fmt: skip
    for index, item in enumerate(items):
        ids = np.array(encoded["input_ids"][index], np.int32)
        if tokenizer.is_fast:
            trained = _by_offsets(np.array(encoded["offset_mapping"][index], np.int64).reshape(-1, 2), item.spans)
        else:
            trained = _by_prefixes(tokenizer, ids, item)
        if item.close and eos is not None:
            if not ids.size or ids[-1] != eos:
                ids, trained = np.append(ids, np.int32(eos)), np.append(trained, True)
            trained[-1] = True
        trained[:1] = False
        yield ids, np.where(trained, ids, np.int32(IGNORED)).astype(np.int32)


def _by_offsets(offsets: npt.NDArray[np.int64], spans: list[Span]) -> npt.NDArray[np.bool_]:
    """Which tokens overlap a span; an empty token (a lone word mark) counts as the character it stands before."""
    begins, ends = offsets[:, 0], np.maximum(offsets[:, 1], offsets[:, 0] + 1)
    trained = np.zeros(len(offsets), np.bool_)
    for begin, end in spans:
        trained |= (begins < end) & (ends > begin)
    return trained


def _by_prefixes(tokenizer: Any, ids: npt.NDArray[np.int32], item: Rendered) -> npt.NDArray[np.bool_]:
    """The same for a tokenizer without offsets: a boundary is where the tokens of the text up to it stop agreeing."""

    def agreeing(position: int) -> int:
        head = tokenizer(item.text[:position], add_special_tokens=item.special)["input_ids"][: len(ids)]
        differs = np.flatnonzero(np.array(head, np.int32) != ids[: len(head)])
        return int(differs[0]) if differs.size else len(head)

    trained = np.zeros(len(ids), np.bool_)
    for begin, end in item.spans:
        last = len(ids) if end == len(item.text) else agreeing(end)
        trained[agreeing(begin) : last] = True
    return trained
