"""What is known of the input of a linear layer: second moments to round by, and windows to check the result on."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from qlformat.calibration.settings import CalibrationSettings

if TYPE_CHECKING:
    import torch

HELD_OUT = 16
"""Every sixteenth window takes no part in the moments; on it the result must beat plain rounding."""


class Moments:
    """The input of the linear layers that read one tensor.

    H = X^T X / n is taken of the input as it is, behind all that is quantized already, and C = Y^T X / n of the input Y
    that the layer has in the model of the source. The first token of each window is left out, and no token counts more
    than the usual one: in many models a few tokens have activations a thousand times as large, and would hide what all
    the others need.

    Args:
        entering: float32 [windows, tokens, in] or [windows * tokens, in], or fewer tokens if the layer reads only some.
        exact: the same in the model of the source; other tokens when its shape differs, and then it is not used.
        windows: number of windows.
        settings: damping and correction.

    Attributes:
        entering: as given.
        hessian: float32 [in, in], damped.
        order, back: int64 [in], columns by falling activation, and how to turn that around.
        factor: float32 [in, in], upper triangular U with U^T U the inverse of the Hessian, its columns in that order.
    """

    def __init__(
        self, entering: torch.Tensor, exact: torch.Tensor, windows: int, settings: CalibrationSettings
    ) -> None:
        import torch

        self.entering = entering
        comparable = exact.shape == entering.shape
        rows, self._held_out = _parts(entering, windows)
        exact_rows, self._held_out_exact = _parts(exact, windows) if comparable else (rows, self._held_out)
        norms = rows.square().sum(1, keepdim=True)
        shared = rows * (norms.median() / norms.clamp_min(1e-30)).clamp_max(1)
        moments = shared.T @ rows / len(rows)
        self.hessian = damped(moments, settings.damping)
        self.order = torch.argsort(self.hessian.diagonal(), descending=True, stable=True)
        self.back = torch.argsort(self.order)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(self.hessian[self.order][:, self.order].double()))
        self.factor = torch.linalg.cholesky(inverse, upper=True).float()
        self._correction: torch.Tensor | None = None
        if settings.correction and comparable and not torch.equal(exact, entering):
            shift = (exact_rows.T @ shared / len(rows) - moments).double()
            inverse = inverse[self.back][:, self.back]
            self._correction = (settings.correction * (shift @ inverse)).float()

    @cached_property
    def importance(self) -> torch.Tensor:
        """What an error in each column costs once the columns after it have made up for it, float32 [in]."""
        return self.factor.diagonal().square().reciprocal()[self.back]

    def corrected(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight whose output is nearest to the source's for the input as it is, float32 [out, in]."""
        return weight if self._correction is None else weight + weight @ self._correction

    def output_error(self, weight: torch.Tensor, rounded: torch.Tensor) -> float:
        """Mean squared error of the output on held-out tokens, summed over the outputs."""
        difference = self._held_out @ rounded.T - self._held_out_exact @ weight.T
        return float(difference.square().sum()) / len(difference)


def damped(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """The Hessian with `damping` times the mean of its diagonal added to the diagonal; the unit matrix for a zero one.

    Args:
        hessian: float32 [in, in], symmetric.
    """
    import torch

    mean = hessian.diagonal().mean()
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    result = hessian.clone()
    result.diagonal().add_(damping * mean)
    return result


def _parts(entering: torch.Tensor, windows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens to fit to and tokens held out, float32 [tokens, in]; all of them for both if there are no windows."""
    width = entering.shape[-1]
    rows = entering.float().reshape(-1, width)
    if len(rows) % windows or len(rows) // windows < 2:
        return rows, rows
    shaped = rows.view(windows, -1, width)[:, 1:]
    if windows < HELD_OUT:
        fitted = held_out = shaped
    else:
        chosen = [index % HELD_OUT == HELD_OUT - 1 for index in range(windows)]
        fitted, held_out = shaped[[not index for index in chosen]], shaped[chosen]
    return fitted.reshape(-1, width), held_out.reshape(-1, width)
