"""Scales of blocks, chosen by what the error does to the output of the layer rather than by the largest weight.

Blocks are runs of the flattened weight, so they may cross rows and the last one may be ragged.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from qlformat import codec

if TYPE_CHECKING:
    import torch

    from qlformat.calibration.feedback import Grid

CANDIDATES = 26
LOWEST, HIGHEST = 0.6, 1.1
"""Scales tried, as shares of the block's largest magnitude."""
SMALLEST = 1e-12
"""Scales are at least this, so that weights can be divided by them."""
_BINS = 4096
"""Places between -1 and 1 for which the rounding error of each candidate is tabulated."""


def search(weight: torch.Tensor, importance: torch.Tensor, blocksize: int, grid: Grid) -> torch.Tensor:
    """The scale of each block with the smallest weighted squared error.

    Args:
        weight: float32 [out, in].
        importance: float32 [in], the weight of an error in each column.

    Returns:
        float32 [blocks].
    """
    import torch

    values = _blocks(weight, blocksize)
    weights = _blocks(importance.expand_as(weight), blocksize)
    largest = values.abs().amax(1).clamp_min(SMALLEST)
    bins = ((values / largest[:, None] + 1) * (_BINS // 2)).to(torch.int32).clamp_(0, _BINS - 1)
    middles = (torch.arange(_BINS) + 0.5) / (_BINS // 2) - 1
    best = torch.full_like(largest, math.inf)
    chosen = torch.ones_like(largest)
    for share in torch.linspace(LOWEST, HIGHEST, CANDIDATES):
        squares = (grid.nearest(middles, share) - middles).square()
        error = torch.linalg.vecdot(squares.index_select(0, bins.view(-1)).view(bins.shape), weights)
        better = error < best
        best, chosen = torch.where(better, error, best), torch.where(better, share, chosen)
    return largest * chosen


def stored(scale: torch.Tensor, double_quant: bool) -> torch.Tensor:
    """The scales as a reader will decode them."""
    import torch

    if not double_quant:
        return scale
    decoded = codec.double_dequantize(*codec.double_quantize(scale.contiguous().numpy()))
    return torch.from_numpy(decoded)


def spread(scale: torch.Tensor, blocksize: int, shape: torch.Size) -> torch.Tensor:
    """The scale of every element, float32 [out, in]."""
    return scale.repeat_interleave(blocksize)[: shape.numel()].view(shape)


def _blocks(values: torch.Tensor, blocksize: int) -> torch.Tensor:
    """[blocks, blocksize], the last block filled up with zeros."""
    import torch

    flat = values.reshape(-1)
    return torch.nn.functional.pad(flat, (0, -flat.numel() % blocksize)).view(-1, blocksize)
