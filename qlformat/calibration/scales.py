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
    best = torch.full_like(largest, math.inf)
    chosen = largest
    for share in torch.linspace(LOWEST, HIGHEST, CANDIDATES):
        scale = largest * share
        error = ((grid.nearest(values, scale[:, None]) - values).square() * weights).sum(1)
        better = error < best
        best, chosen = torch.where(better, error, best), torch.where(better, scale, chosen)
    return chosen


def refit(
    weight: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, hessian: torch.Tensor, blocksize: int
) -> torch.Tensor:
    """The scales with the smallest output error for given codes, one block after another.

    Blocks at the same place of every period of rows share no row, so all of them are fitted at once.

    Args:
        weight: float32 [out, in].
        codes: float32 [out, in], the grid's values that the weight was rounded to.
        scale: float32 [blocks], where to begin.
        hessian: float32 [in, in].

    Returns:
        float32 [blocks].
    """
    import torch

    rows, width = weight.shape
    period = blocksize // math.gcd(width, blocksize)  # rows after which a block begins with a row again
    places = period * width // blocksize
    count = -(-rows // period)
    codes = torch.nn.functional.pad(codes, (0, 0, 0, count * period - rows))
    target = torch.nn.functional.pad(weight, (0, 0, 0, count * period - rows))
    fitted = torch.nn.functional.pad(scale, (0, count * places - scale.numel())).view(count, places)
    error = codes * spread(fitted.reshape(-1), blocksize, codes.shape) - target
    codes, error = codes.view(count, period, width), error.view(count, period, width)
    for place in range(places):
        slope = curvature = torch.zeros(count)
        segments = list(_segments(place * blocksize, (place + 1) * blocksize, width))
        for row, begin, end in segments:
            code = codes[:, row, begin:end]
            slope = slope + (code * (error[:, row] @ hessian[:, begin:end])).sum(1)
            curvature = curvature + ((code @ hessian[begin:end, begin:end]) * code).sum(1)
        step = torch.where(curvature > 0, slope / curvature.clamp_min(1e-30), 0.0)
        fitted[:, place] -= step
        for row, begin, end in segments:
            error[:, row, begin:end] -= codes[:, row, begin:end] * step[:, None]
    return fitted.reshape(-1)[: scale.numel()].clamp_min(SMALLEST)


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


def _segments(start: int, stop: int, width: int) -> list[tuple[int, int, int]]:
    """(row, first column, end column) of the parts of a run of the flattened matrix that lie in one row each."""
    found = []
    while start < stop:
        row, begin = divmod(start, width)
        end = min(width, begin + stop - start)
        found.append((row, begin, end))
        start += end - begin
    return found
