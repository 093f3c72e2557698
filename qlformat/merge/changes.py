"""What an adapter does to one weight of the base, and the formulas of peft 0.21 for it.

All arrays are float32 in the orientation of the 16-bit model. A product `left @ right` is B @ A of a linear layer, its
transpose for a Conv1D (fan_in_fan_out) and for an embedding.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class LowRank:
    """delta = scale * left @ right, and for DoRA the magnitude vector.

    Attributes:
        adapter: its position on the command line.
        left, right: names of the tensors in the adapter.
        turned: left is A.T and right is B.T (Conv1D, embedding).
        rank: columns of left.
        scale: with the user's weight in it.
        magnitude: name of the DoRA vector, or None; it belongs to the outputs.
        norm_axis: over which axis of the weight DoRA's norm is taken.
    """

    adapter: int
    left: str
    right: str
    turned: bool
    rank: int
    scale: float
    magnitude: str | None = None
    norm_axis: int = 1


@dataclass(frozen=True)
class Replaced:
    """The weight is the adapter's own: modules_to_save, a trained bias, a saved embedding."""

    adapter: int
    tensor: str


@dataclass(frozen=True)
class Tokens:
    """Rows `indices` are the adapter's own (trainable_token_indices)."""

    adapter: int
    tensor: str
    indices: tuple[int, ...]


@dataclass(frozen=True)
class BiasDelta:
    """The bias of lora_B, times the scale, is added (lora_bias)."""

    adapter: int
    tensor: str
    scale: float


Change = LowRank | Replaced | Tokens | BiasDelta


def row_factors(values: F32, magnitude: F32) -> F32:
    """DoRA's factor of some rows: magnitude / norm of (weight + delta), [rows, 1]."""
    squares = np.einsum("ij,ij->i", values, values, dtype=np.float64)
    norm = np.sqrt(squares).astype(np.float32)
    factors: F32 = np.divide(magnitude, norm, dtype=np.float32)[:, None]
    return factors


def column_factors(pieces: Iterable[F32], columns: int, magnitude: F32) -> F32:
    """DoRA's factor of all columns, [1, columns]; `pieces` iterates over (weight + delta) in rows."""
    squares = np.zeros(columns, dtype=np.float64)
    for values in pieces:
        squares += np.einsum("ij,ij->j", values, values, dtype=np.float64)
    factors: F32 = np.divide(magnitude, np.sqrt(squares).astype(np.float32), dtype=np.float32)[None, :]
    return factors
