"""How the deltas of several adapters become one: peft's combination methods on whole task tensors."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from qlformat.errors import QlfError

F32 = npt.NDArray[np.float32]

METHODS = ("linear", "ties", "dare-linear", "dare-ties", "magnitude-prune", "svd", "cat")
SPARSE = ("ties", "dare-linear", "dare-ties", "magnitude-prune")
DEFAULT_DENSITY = 0.5


@dataclass(frozen=True)
class Part:
    """scale * left @ right of one adapter, and its weight."""

    left: F32
    right: F32
    scale: float
    weight: float

    def delta(self) -> F32:
        """The task tensor, without the weight."""
        made: F32 = self.left @ self.right * np.float32(self.scale)
        return made


@dataclass(frozen=True)
class Method:
    """A way to combine.

    Attributes:
        name: one of METHODS.
        density: share of the values that the sparse methods keep.
        rank: of the result of svd; the largest rank of its parts when None.
        seed: of DARE's random choice, together with the weight's name.
    """

    name: str = "linear"
    density: float = DEFAULT_DENSITY
    rank: int | None = None
    seed: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.name not in METHODS:
            raise QlfError(f"method {self.name!r} is unknown; use one of {', '.join(METHODS)}")
        if not 0 < self.density <= 1:
            raise QlfError(f"found density {self.density}, needed more than 0 and at most 1")

    def combines(self, count: int) -> bool:
        """Whether the parts must be combined before they are added."""
        return self.name != "linear" and (count > 1 or self.name in ("svd", *SPARSE))

    def combine(self, name: str, parts: Sequence[Part]) -> F32:
        """The delta of all parts, [rows, columns]; what is random depends on the seed and on `name` alone."""
        if self.name == "cat":
            left, right = concatenated(parts)
            return left @ right
        if self.name == "svd":
            left, right = truncated(parts, self.rank or max(part.left.shape[1] for part in parts))
            return left @ right
        return self._task_tensors(name, parts)

    def _task_tensors(self, name: str, parts: Sequence[Part]) -> F32:
        import torch
        from peft.utils import merge_utils

        functions = {
            "linear": lambda tensors, weights: merge_utils.task_arithmetic(tensors, weights),
            "ties": lambda tensors, weights: merge_utils.ties(tensors, weights, self.density),
            "dare-linear": lambda tensors, weights: merge_utils.dare_linear(tensors, weights, self.density),
            "dare-ties": lambda tensors, weights: merge_utils.dare_ties(tensors, weights, self.density),
            "magnitude-prune": lambda tensors, weights: merge_utils.magnitude_prune(tensors, weights, self.density),
        }
        tensors = [torch.from_numpy(part.delta()) for part in parts]
        weights = torch.tensor([part.weight for part in parts])
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        with self._lock, torch.random.fork_rng(devices=[]):  # merge_utils draws from the global generator
            torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            made: F32 = functions[self.name](tensors, weights).to(torch.float32).numpy()
        return made


def concatenated(parts: Sequence[Part]) -> tuple[F32, F32]:
    """(left, right) of the exact sum, with the ranks of all parts (peft's "cat": weight and scale go to A)."""
    left = np.concatenate([part.left for part in parts], axis=1)
    right = np.concatenate([part.right * np.float32(part.weight) * np.float32(part.scale) for part in parts])
    return np.ascontiguousarray(left), np.ascontiguousarray(right)


def truncated(parts: Sequence[Part], rank: int) -> tuple[F32, F32]:
    """(left, right) of the best approximation of the sum by `rank`: the SVD of the sum, taken of its factors.

    left is U diag(S), right is Vh, as peft's "svd" has them.
    """
    left, right = concatenated(parts)
    q, r = np.linalg.qr(left.astype(np.float64))
    p, s = np.linalg.qr(right.T.astype(np.float64))
    u, values, vh = np.linalg.svd(r @ s.T)
    rank = min(rank, values.size)
    return _signed(q @ (u[:, :rank] * values[:rank]), vh[:rank] @ p.T)


def truncated_matrix(delta: F32, rank: int) -> tuple[F32, F32]:
    """(left, right) of the best approximation of a whole delta."""
    u, values, vh = np.linalg.svd(delta.astype(np.float64), full_matrices=False)
    rank = min(rank, values.size)
    return _signed(u[:, :rank] * values[:rank], vh[:rank])


def _signed(left: npt.NDArray[np.float64], right: npt.NDArray[np.float64]) -> tuple[F32, F32]:
    """The signs that an SVD leaves open, fixed: the largest entry of each row of `right` is positive."""
    largest = right[np.arange(right.shape[0]), np.abs(right).argmax(axis=1)]
    signs = np.where(largest < 0, -1.0, 1.0)
    return (left * signs).astype(np.float32), (right * signs[:, None]).astype(np.float32)
