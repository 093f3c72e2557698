"""Codes and scales for one weight: better than plain rounding where it counts, and exactly what a reader decodes."""

from __future__ import annotations

import pytest
import torch

from qlformat import codec
from qlformat.calibration import feedback, scales
from qlformat.calibration.engine import Rounding
from qlformat.calibration.moments import HELD_OUT, Moments
from qlformat.calibration.settings import CalibrationSettings
from qlformat.layout import QuantState

SHAPES = [(32, 128), (40, 96), (7, 50), (3, 21)]
"""Rows of whole blocks, blocks that cross rows, and ragged ends with an even and an odd number of elements."""


def example(shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and correlated inputs of very different sizes."""
    generator = torch.Generator().manual_seed(sum(shape))
    width = shape[1]
    mix = torch.randn(width, width, generator=generator) * torch.logspace(-1, 1, width)
    inputs = torch.randn(8 * width, width, generator=generator) @ mix
    return torch.randn(shape, generator=generator) * 0.05, inputs


def moments_of(inputs: torch.Tensor, exact: torch.Tensor | None = None, **settings: float) -> Moments:
    asked = CalibrationSettings(**settings)  # type: ignore[arg-type]
    return Moments(inputs, inputs if exact is None else exact, 1, asked)


def rounding(weight: torch.Tensor, quant_type: str = "nf4", nested: bool = True) -> Rounding:
    state = QuantState(quant_type, 64, "float32", tuple(weight.shape), 0.0 if nested else None)
    return Rounding(weight, state, CalibrationSettings())


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_output_error_is_well_below_that_of_plain_rounding(
    shape: tuple[int, int], quant_type: str, nested: bool
) -> None:
    weight, inputs = example(shape)
    moments, made = moments_of(inputs, damping=0.01), rounding(weight, quant_type, nested)
    plain = moments.output_error(weight, made.nearest()[1])
    assert moments.output_error(weight, made.fit(moments)[1]) < 0.6 * plain


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_stored_decodes_to_what_was_measured(shape: tuple[int, int], quant_type: str, nested: bool) -> None:
    weight, inputs = example(shape)
    (packed, absmax), expected = rounding(weight, quant_type, nested).fit(moments_of(inputs))
    scale = codec.double_dequantize(*codec.double_quantize(absmax)) if nested else absmax
    decoded = codec.dequantize(packed, scale, weight.numel(), quant_type=quant_type, blocksize=64, dtype="float32")
    assert packed.size == -(-weight.numel() // 2)
    torch.testing.assert_close(torch.from_numpy(decoded).view(weight.shape), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_each_step_lowers_the_error(shape: tuple[int, int]) -> None:
    weight, inputs = example(shape)
    moments, grid = moments_of(inputs), rounding(weight)._grid

    def error(rounded: torch.Tensor) -> float:
        difference = rounded - weight
        return float(((difference @ moments.hessian) * difference).sum())

    scale = scales.search(weight, moments.importance, 64, grid)
    every = scales.spread(scale, 64, weight.shape)
    order, back = moments.order, moments.back
    nearest = error(grid.nearest(weight, every))
    rounded = feedback.round_columns(weight[:, order], every[:, order], moments.factor, grid)[:, back]
    once = error(rounded)
    twice = error(feedback.descend(weight, rounded, every, moments.hessian, grid))
    assert twice <= once < nearest


@pytest.mark.parametrize("shape", SHAPES)
def test_scales_are_as_good_as_trying_each_one(shape: tuple[int, int]) -> None:
    """The errors of candidates are tabulated; what is chosen must not cost more than one in a thousand."""
    weight, inputs = example(shape)
    grid, importance = rounding(weight)._grid, moments_of(inputs).importance

    def errors(scale: torch.Tensor) -> torch.Tensor:
        every = scales.spread(scale, 64, weight.shape)
        weighted = (grid.nearest(weight, every) - weight).square() * importance
        return torch.nn.functional.pad(weighted.reshape(-1), (0, -weight.numel() % 64)).view(-1, 64).sum(1)

    largest = scales.search(weight, importance, 64, grid)
    blocks = torch.nn.functional.pad(weight.reshape(-1), (0, -weight.numel() % 64)).view(-1, 64).abs().amax(1)
    shares = torch.linspace(scales.LOWEST, scales.HIGHEST, scales.CANDIDATES)
    best = torch.stack([errors(blocks * share) for share in shares]).amin(0)
    assert float(errors(largest).sum()) <= 1.001 * float(best.sum())


def test_the_weight_makes_up_for_an_input_that_is_off() -> None:
    weight, exact = example((32, 128))
    generator = torch.Generator().manual_seed(1)
    entering = 0.9 * exact + exact.std() * 0.1 * torch.randn(exact.shape, generator=generator)
    without, with_it = moments_of(entering, exact, correction=0.0), moments_of(entering, exact, correction=1.0)
    assert torch.equal(without.corrected(weight), weight)
    before = with_it.output_error(weight, weight)
    assert with_it.output_error(weight, with_it.corrected(weight)) < 0.5 * before
    rounded = [with_it.output_error(weight, rounding(weight).fit(moments)[1]) for moments in (with_it, without)]
    assert rounded[0] < rounded[1]


def test_windows_held_out_take_no_part() -> None:
    inputs = torch.randn(2 * HELD_OUT, 20, 8, generator=torch.Generator().manual_seed(0))
    other = inputs.clone()
    other[HELD_OUT - 1 :: HELD_OUT] = 5.0
    other[:, 0] = 7.0  # the first token of each window
    made = [Moments(given, given, len(inputs), CalibrationSettings()) for given in (inputs, other)]
    assert torch.equal(made[0].hessian, made[1].hessian)
    weight = torch.ones(4, 8)
    assert made[1].output_error(weight, weight * 1.5) == pytest.approx(4 * 20.0**2)


def test_one_token_does_not_rule() -> None:
    inputs = torch.randn(1, 200, 8, generator=torch.Generator().manual_seed(0))
    usual = moments_of(inputs).hessian
    inputs[0, 50] = 1000.0
    assert float((moments_of(inputs).hessian - usual).abs().max()) < 0.2


def test_inputs_never_seen_do_no_harm() -> None:
    weight, inputs = example((32, 128))
    inputs[:, 5] = 0
    assert rounding(weight).fit(moments_of(inputs))[1].isfinite().all()
    assert rounding(weight).fit(moments_of(torch.zeros_like(inputs)))[1].isfinite().all()
    assert rounding(torch.zeros(32, 128)).fit(moments_of(inputs))[1].abs().max() < 1e-9


def test_other_tokens_than_in_the_source_are_not_compared() -> None:
    """A layer that reads some tokens only may read others once the layers before it are quantized."""
    weight, inputs = example((32, 128))
    moments = moments_of(inputs, inputs[:-3])
    assert torch.equal(moments.corrected(weight), weight)
    assert moments.output_error(weight, weight) == 0
