"""Codes chosen with second-order error feedback (GPTQ, arXiv 2210.17323), on scales that are fixed before.

The error of a layer's output is tr((Q - W) H (Q - W)^T), H = X^T X / n of the layer's inputs. Columns are rounded in
order of their activation; what rounding one column does to the output is made up for by the columns still to come.
Coordinate descent then takes every code to the best one given all the others, which never makes the error larger.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

COLUMNS = 64
"""Columns whose updates of the rest of the matrix are done at once."""


class Grid:
    """The values a code can have.

    Args:
        values: float32 [16], ascending.
        thresholds: float32 [15] between them.
    """

    def __init__(self, values: torch.Tensor, thresholds: torch.Tensor) -> None:
        self.values = values
        self.thresholds = thresholds

    def nearest(self, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """The values of the grid nearest to weight / scale, times scale."""
        import torch

        return self.values[torch.bucketize(weight / scale, self.thresholds)] * scale


def round_columns(weight: torch.Tensor, scale: torch.Tensor, factor: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Round column after column, each error spread over the columns after it.

    Args:
        weight, scale: float32 [out, in], the columns in the order of the factor.
        factor: of inverse_factor.

    Returns:
        The rounded weight, values of the grid times the scale.
    """
    import torch

    rest, result = weight.clone(), torch.empty_like(weight)
    width = weight.shape[1]
    for start in range(0, width, COLUMNS):
        stop = min(start + COLUMNS, width)
        part, scales = rest[:, start:stop].T.contiguous(), scale[:, start:stop].T.contiguous()
        rounded, errors, local = torch.empty_like(part), torch.empty_like(part), factor[start:stop, start:stop]
        for column in range(stop - start):
            rounded[column] = grid.nearest(part[column], scales[column])
            errors[column] = (part[column] - rounded[column]) / local[column, column]
            part[column + 1 :] -= torch.outer(local[column, column + 1 :], errors[column])
        result[:, start:stop] = rounded.T
        rest[:, stop:] -= errors.T @ factor[start:stop, stop:]
    return result


def descend(
    weight: torch.Tensor, rounded: torch.Tensor, scale: torch.Tensor, hessian: torch.Tensor, grid: Grid
) -> torch.Tensor:
    """One pass of coordinate descent over the columns; returns the better rounding."""
    import torch

    result = rounded.clone()
    width = weight.shape[1]
    for start in range(0, width, COLUMNS):
        stop = min(start + COLUMNS, width)
        local = hessian[start:stop, start:stop]
        slope = ((result - weight) @ hessian[:, start:stop]).T.contiguous()
        part, scales = result[:, start:stop].T.contiguous(), scale[:, start:stop].T.contiguous()
        for column in range(stop - start):
            better = grid.nearest(part[column] - slope[column] / local[column, column], scales[column])
            change = better - part[column]
            part[column] = better
            slope += torch.outer(local[column], change)
        result[:, start:stop] = part.T
    return result
