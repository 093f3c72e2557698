"""Packing: which rows share one sequence. No row is cut, and none sees another (TRL restarts the position ids)."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def pack(lengths: Sequence[int] | npt.NDArray[np.int64], capacity: int) -> list[list[int]]:
    """Put rows into as few sequences as best-fit decreasing finds (arXiv 2404.10830, section 3).

    Args:
        lengths: tokens of each row, between 1 and `capacity`.
        capacity: tokens of a sequence.

    Returns:
        The indices of the rows of each sequence; the same for the same lengths on every machine.

    Raises:
        ValueError: a row is longer than a sequence.
    """
    sizes = np.asarray(lengths, np.int64)
    if sizes.size and not 0 < sizes.min() <= sizes.max() <= capacity:
        raise ValueError(f"found rows of {sizes.min()} to {sizes.max()} tokens, needed 1 to {capacity}")
    sequences: list[list[int]] = []
    by_space: dict[int, deque[int]] = {}
    spaces: list[int] = []  # the keys of by_space, ascending
    for row in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[row])
        at = bisect_left(spaces, size)
        if at < len(spaces):
            space = spaces[at]
            sequence = by_space[space].popleft()
            if not by_space[space]:
                del by_space[space], spaces[at]
        else:
            space, sequence = capacity, len(sequences)
            sequences.append([])
        sequences[sequence].append(row)
        left = space - size
        if left:
            if left not in by_space:
                by_space[left] = deque()
                insort(spaces, left)
            by_space[left].append(sequence)
    return sequences
