"""One weight of an open checkpoint, decoded when it is asked for, as a whole or in rows."""

from __future__ import annotations

import operator
from types import EllipsisType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from qlformat.errors import QlfError
from qlformat.weights import Weight

if TYPE_CHECKING:
    import torch

AnyArray = npt.NDArray[np.generic]


class Decoder(Protocol):
    """What decodes: an open checkpoint."""

    def dequantize(self, name: str, dtype: str | None = None, rows: tuple[int, int] | None = None) -> AnyArray:
        """A weight, or some rows of it."""

    def decoded_dtype(self, weight: Weight, dtype: str | None) -> str:
        """The torch name of what a weight is decoded to."""


class LazyWeight:
    """A weight by name; the checkpoint must stay open while it is used.

    `weight[a:b]` decodes rows a to b and reads no others, `weight[i]` one row without its dimension, `weight[:]` all.
    The result is a NumPy array that owns its memory; bfloat16 comes as uint16 bits. `tensor` gives a torch tensor. Row
    numbers count as they do for lists; a step is refused.

    Attributes:
        name: name of the weight.
        shape: logical shape, [out, in] for a linear layer, also where the 16-bit model has it the other way around
            (`transposed`, the Conv1D of GPT-2).
        dtype: torch name of the elements that come out.
        transposed: see shape.
        quantized: whether it is stored in 4 bits.
    """

    def __init__(self, decoder: Decoder, weight: Weight, dtype: str | None = None) -> None:
        self._decoder = decoder
        self._weight = weight
        self._asked = dtype
        self.name = weight.name
        self.shape = weight.shape
        self.dtype = decoder.decoded_dtype(weight, dtype)
        self.transposed = weight.transposed
        self.quantized = weight.quant_state is not None

    def astype(self, dtype: Any) -> LazyWeight:
        """The same weight, decoded to "float32", "float16" or "bfloat16" or torch's of these; None: its own dtype."""
        return LazyWeight(self._decoder, self._weight, dtype)

    def __len__(self) -> int:
        """Number of rows."""
        if not self.shape:
            raise TypeError("a weight without dimensions has no length")
        return self.shape[0]

    def __getitem__(self, rows: int | slice | EllipsisType) -> AnyArray:
        """The rows asked for, decoded.

        Raises:
            IndexError: there is no such row.
            QlfError: the index has a step or is neither a number nor a slice.
            FormatError: T4 or D1, a scale of these rows is negative or not finite.
        """
        if rows is Ellipsis or (isinstance(rows, slice) and rows == slice(None)):
            return self._decoder.dequantize(self.name, self._asked)
        if isinstance(rows, slice):
            first, last, step = rows.indices(len(self))
            if step != 1:
                raise QlfError(f"rows were asked for in steps of {step}, needed consecutive ones", tensor=self.name)
            return self._decoder.dequantize(self.name, self._asked, (first, max(first, last)))
        try:
            row = operator.index(rows)
        except TypeError:
            raise QlfError(f"found the index {rows!r}, needed a row or a slice of rows", tensor=self.name) from None
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} was asked for, the shape is {list(self.shape)}")
        row %= len(self)
        return self._decoder.dequantize(self.name, self._asked, (row, row + 1)).reshape(self.shape[1:])

    def tensor(self, rows: int | slice | EllipsisType = ...) -> torch.Tensor:
        """The rows asked for, all by default, as a torch tensor on the CPU; see `__getitem__`."""
        import torch

        return torch.from_numpy(self[rows]).view(getattr(torch, self.dtype))

    def __repr__(self) -> str:
        """Name, shape and dtype."""
        return f"LazyWeight({self.name!r}, shape={self.shape}, dtype={self.dtype})"
