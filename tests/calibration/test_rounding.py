"""Codes and scales for one weight: better than plain rounding where it counts, and exactly what a reader decodes."""

from __future__ import annotations

import pytest
import torch

from qlformat import codec
from qlformat.calibration import feedback, scales
from qlformat.calibration.engine import Rounding
from qlformat.calibration.settings import CalibrationSettings
from qlformat.layout import QuantState

SHAPES = [(32, 128), (40, 96), (7, 50), (3, 21)]
"""Rows of whole blocks, blocks that cross rows, and ragged ends with an even and an odd number of elements."""


def example(shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and the Hessian of correlated inputs of very different sizes."""
    generator = torch.Generator().manual_seed(sum(shape))
    width = shape[1]
    mix = torch.randn(width, width, generator=generator) * torch.logspace(-1, 1, width)
    inputs = torch.randn(8 * width, width, generator=generator) @ mix
    return torch.randn(shape, generator=generator) * 0.05, inputs.T @ inputs / len(inputs)


def rounding(weight: torch.Tensor, quant_type: str = "nf4", nested: bool = True, **settings: float) -> Rounding:
    state = QuantState(quant_type, 64, "float32", tuple(weight.shape), 0.0 if nested else None)
    return Rounding(weight, state, CalibrationSettings(**settings))  # type: ignore[arg-type]


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_output_error_is_well_below_that_of_plain_rounding(
    shape: tuple[int, int], quant_type: str, nested: bool
) -> None:
    weight, hessian = example(shape)
    made = rounding(weight, quant_type, nested)
    plain = feedback.output_error(weight, made.nearest()[1], hessian)
    fitted = feedback.output_error(weight, made.fit(hessian)[1], hessian)
    assert fitted < 0.6 * plain


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_stored_decodes_to_what_was_measured(shape: tuple[int, int], quant_type: str, nested: bool) -> None:
    weight, hessian = example(shape)
    (packed, absmax), expected = rounding(weight, quant_type, nested).fit(hessian)
    scale = codec.double_dequantize(*codec.double_quantize(absmax)) if nested else absmax
    decoded = codec.dequantize(packed, scale, weight.numel(), quant_type=quant_type, blocksize=64, dtype="float32")
    assert packed.size == -(-weight.numel() // 2)
    torch.testing.assert_close(torch.from_numpy(decoded).view(weight.shape), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_each_step_lowers_the_error(shape: tuple[int, int]) -> None:
    weight, hessian = example(shape)
    hessian = feedback.damped(hessian, 0.01)
    grid = rounding(weight)._grid
    scale = scales.search(weight, hessian.diagonal(), 64, grid)
    every = scales.spread(scale, 64, weight.shape)
    errors = [feedback.output_error(weight, grid.nearest(weight, every), hessian)]
    rounded = feedback.round_columns(weight, every, feedback.inverse_factor(hessian), grid)
    errors.append(feedback.output_error(weight, rounded, hessian))
    rounded = feedback.descend(weight, rounded, every, hessian, grid)
    errors.append(feedback.output_error(weight, rounded, hessian))
    codes = rounded / every
    fitted = scales.refit(weight, codes, scale, hessian, 64)
    errors.append(feedback.output_error(weight, codes * scales.spread(fitted, 64, weight.shape), hessian))
    assert errors[3] < errors[2] <= errors[1]
    assert errors[2] < errors[0]


def test_refit_finds_the_scales_that_made_the_weight() -> None:
    weight, hessian = example((40, 96))
    grid = rounding(weight)._grid
    true = torch.rand(60, generator=torch.Generator().manual_seed(1)) + 0.5
    codes = grid.nearest(weight / weight.abs().max(), torch.ones(1))
    target = codes * scales.spread(true, 64, weight.shape)
    found = true * 1.2
    for _ in range(200):
        found = scales.refit(target, codes, found, feedback.damped(hessian, 0.1), 64)
    torch.testing.assert_close(found, true, rtol=1e-2, atol=0)


def test_inputs_never_seen_do_no_harm() -> None:
    weight, hessian = example((32, 128))
    hessian[:, 5] = hessian[5] = 0
    assert rounding(weight).fit(hessian)[1].isfinite().all()
    assert rounding(weight).fit(torch.zeros_like(hessian))[1].isfinite().all()
    assert rounding(torch.zeros(32, 128)).fit(hessian)[1].abs().max() < 1e-9
