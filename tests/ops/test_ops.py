"""The torch operators: the reference's bits on every path, what PyTorch asks of an operator, and clear refusals."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import bitsandbytes  # noqa: F401 (registers the operators that stand in)
import numpy as np
import pytest
import torch

from qlformat import native, ops
from qlformat.backends import cpu, cuda, cuda_launch, torch_ref
from qlformat.codebook import DYNAMIC8
from qlformat.errors import QlfError
from qlformat.layout import QuantState, Recipe
from qlformat.native import NonFiniteError
from tests.ops.cuda_on_cpu import Launches, on_cpu
from tests.ops.weights import DTYPES, Case, assert_same_bits, encoded, random_cases

__all__ = ["on_cpu"]

OPS = torch.ops.qlformat
CASE = Case((37, 129), "bfloat16", "nf4", 64, seed=1)


@pytest.mark.parametrize("backend", [torch_ref, cpu], ids=lambda module: module.__name__.rpartition(".")[2])
def test_backends_equal_the_reference(backend: Any) -> None:
    for case in random_cases(96, seed=8):
        expected = encoded(case)
        packed, absmax = backend.quantize(case.weight(), case.quant_type, case.blocksize)
        assert_same_bits(packed, expected.packed)
        assert_same_bits(absmax, expected.absmax)
        codes, nested_absmax, offset = backend.double_quantize(absmax)
        assert_same_bits(codes, expected.codes)
        assert_same_bits(nested_absmax, expected.nested_absmax)
        assert_same_bits(offset, torch.tensor(expected.nested_offset))
        how = case.shape, DTYPES[case.dtype], case.quant_type, case.blocksize
        assert_same_bits(backend.dequantize(packed, absmax, *how, None, None, 0.0), expected.plain)
        nested = backend.dequantize(packed, codes, *how, nested_absmax, None, expected.nested_offset)
        assert_same_bits(nested, expected.nested)


@pytest.mark.parametrize("backend", [torch_ref, cpu], ids=lambda module: module.__name__.rpartition(".")[2])
def test_another_table_for_the_scales(backend: Any) -> None:
    """Older bitsandbytes wrote another 8-bit table; the stored one counts (spec, "Plain repositories")."""
    expected = encoded(CASE)
    other = torch.from_numpy(DYNAMIC8.copy())
    other[0] = -1.0
    codes = expected.codes.clone()
    codes[::3] = 0
    factors = expected.nested_absmax.repeat_interleave(256)[: codes.numel()]
    scales = other[codes.int()] * factors + expected.nested_offset
    how = CASE.shape, torch.float32, "nf4", 64
    nested = backend.dequantize(expected.packed, codes, *how, expected.nested_absmax, other, expected.nested_offset)
    assert_same_bits(nested, backend.dequantize(expected.packed, scales, *how, None, None, 0.0))
    standard = torch.from_numpy(DYNAMIC8.copy())
    same = backend.dequantize(expected.packed, codes, *how, expected.nested_absmax, standard, expected.nested_offset)
    assert not torch.equal(nested, same)


def test_operators_on_the_cpu() -> None:
    """Through the dispatcher, with tensors that are not contiguous."""
    expected, weight = encoded(CASE), CASE.weight()
    packed, absmax = OPS.quantize_nf4(weight.t().contiguous().t())
    assert_same_bits(packed, expected.packed)
    codes, nested_absmax, offset = OPS.double_quantize(absmax.repeat_interleave(2)[::2])
    assert_same_bits(codes, expected.codes)
    strided = packed.repeat(1, 3)[:, 1:2]
    dense = OPS.dequantize_nf4(strided, codes, CASE.shape, torch.bfloat16, nested_absmax, None, offset.item())
    assert_same_bits(dense, expected.nested)
    assert_same_bits(OPS.dequantize_nf4(packed, absmax, [4773], torch.bfloat16), expected.plain.flatten())


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(quant_type: str, dtype: str) -> None:
    case = Case((5, 77), dtype, quant_type, 128, seed=5)
    expected = encoded(case)
    how = {"quant_type": quant_type, "blocksize": 128}
    torch.library.opcheck(OPS.quantize_nf4.default, (case.weight(),), how)
    torch.library.opcheck(OPS.double_quantize.default, (expected.absmax,))
    dense = (case.shape, DTYPES[dtype])
    torch.library.opcheck(OPS.dequantize_nf4.default, (expected.packed, expected.absmax, *dense), how)
    nested = (expected.nested_absmax, torch.from_numpy(DYNAMIC8.copy()), expected.nested_offset)
    torch.library.opcheck(OPS.dequantize_nf4.default, (expected.packed, expected.codes, *dense, *nested), how)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(dynamic: bool) -> None:
    """One graph with the arithmetic around the operators, and the bits of eager mode."""

    def linear(x: torch.Tensor, weight: torch.Tensor, packed: torch.Tensor, absmax: torch.Tensor) -> Any:
        dense = OPS.dequantize_nf4(packed, absmax, weight.shape, torch.float32)
        codes, scales = OPS.quantize_nf4(weight * 2.0)
        return x @ dense.t() + 1.0, codes, OPS.double_quantize(scales)

    compiled = torch.compile(linear, fullgraph=True, dynamic=dynamic)
    for rows in (16, 48):
        weight = Case((rows, 64), "float32", "nf4", 64, seed=rows).weight()
        packed, absmax = OPS.quantize_nf4(weight)
        x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
        (dense, codes, nested), (dense2, codes2, nested2) = (
            function(x, weight, packed, absmax) for function in (linear, compiled)
        )
        torch.testing.assert_close(dense2, dense)  # a product of matrices: its order of sums is not ours
        assert_same_bits(codes2, codes)
        for found, expected in zip(nested2, nested, strict=True):
            assert_same_bits(found, expected)


def test_compiled_dequantization_has_the_same_bits() -> None:
    expected = encoded(CASE)

    @torch.compile(fullgraph=True)
    def decode(packed: torch.Tensor, codes: torch.Tensor, nested_absmax: torch.Tensor) -> torch.Tensor:
        state = QuantState("nf4", 64, "bfloat16", CASE.shape, expected.nested_offset)
        return ops.dequantize_weight(packed, codes, state, nested_absmax)

    assert_same_bits(decode(expected.packed, expected.codes, expected.nested_absmax), expected.nested)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_there_and_back(dtype: str, double_quant: bool) -> None:
    case = Case((33, 70), dtype, "fp4", 32, seed=6)
    expected = encoded(case)
    parameter = torch.nn.Parameter(case.weight())
    recipe = Recipe("fp4", 32, double_quant)
    packed, absmax, nested_absmax, state = ops.quantize_weight(parameter, recipe)
    offset = expected.nested_offset if double_quant else None
    assert state == QuantState("fp4", 32, dtype, (33, 70), offset)
    assert_same_bits(packed, expected.packed)
    assert_same_bits(absmax, expected.codes if double_quant else expected.absmax)
    dense = ops.dequantize_weight(packed, absmax, state, nested_absmax, DTYPES[dtype])
    assert_same_bits(dense, expected.nested if double_quant else expected.plain)
    assert not dense.requires_grad and not absmax.requires_grad


def test_no_derivative_is_an_error_not_a_zero() -> None:
    weight = torch.randn(64, requires_grad=True)
    _, absmax = OPS.quantize_nf4(weight)
    with pytest.raises(QlfError, match="qlformat::quantize_nf4 has no derivative"):
        absmax.sum().backward()


def test_without_the_native_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = encoded(CASE)
    monkeypatch.setattr(native, "available", lambda: False)
    packed, absmax, nested_absmax, state = ops.quantize_weight(CASE.weight())
    assert_same_bits(packed, expected.packed)
    assert_same_bits(ops.dequantize_weight(packed, absmax, state, nested_absmax), expected.nested)


def nested_parts() -> dict[str, Any]:
    expected = encoded(CASE)
    return {
        "packed": expected.packed,
        "absmax": expected.codes,
        "shape": CASE.shape,
        "dtype": torch.bfloat16,
        "nested_absmax": expected.nested_absmax,
        "nested_offset": expected.nested_offset,
    }


BAD: dict[str, tuple[dict[str, Callable[[Any], Any]], str]] = {
    "short packed": ({"packed": lambda t: t[:-1]}, "packed: found 2386 elements, needed 2387"),
    "long packed": ({"packed": lambda t: torch.cat((t, t))}, "packed: found 4774 elements"),
    "signed packed": ({"packed": lambda t: t.to(torch.int8)}, "packed: found dtype torch.int8"),
    "short absmax": ({"absmax": lambda t: t[:-1]}, "absmax: found 74 elements, needed 75"),
    "float absmax with nested_absmax": ({"absmax": lambda t: t.float()}, "absmax: found dtype torch.float32"),
    "8-bit absmax alone": ({"nested_absmax": lambda t: None}, "absmax: found dtype torch.uint8"),
    "empty nested_absmax": ({"nested_absmax": lambda t: t[:0]}, "nested_absmax: found 0 elements, needed 1"),
    "double nested_absmax": ({"nested_absmax": lambda t: t.double()}, "nested_absmax: found dtype torch.float64"),
    "short map": ({"nested_quant_map": lambda t: torch.zeros(255)}, "nested_quant_map: found 255 elements"),
    "larger shape": ({"shape": lambda s: (38, 129)}, "packed: found 2387 elements, needed 2451"),
    "empty shape": ({"shape": lambda s: ()}, "found shape ()"),
    "no elements": ({"shape": lambda s: (0, 4)}, "found shape (0, 4)"),
    "negative shape": ({"shape": lambda s: (-37, -129)}, "found shape (-37, -129)"),
    "huge shape": ({"shape": lambda s: (1 << 40, 1 << 40)}, "fewer than 2**48"),
    "integer output": ({"dtype": lambda d: torch.int32}, "found dtype torch.int32"),
    "double output": ({"dtype": lambda d: torch.float64}, "found dtype torch.float64"),
    "unknown quant_type": ({"quant_type": lambda q: "nf3"}, "found quant_type 'nf3'"),
    "odd blocksize": ({"blocksize": lambda b: 48}, "found blocksize 48"),
    "infinite offset": ({"nested_offset": lambda o: float("inf")}, "found nested_offset inf"),
    "offset of a double": ({"nested_offset": lambda o: 0.1}, "found nested_offset 0.1"),
    "meta device": ({"absmax": lambda t: t.to("meta")}, "absmax: found device meta, needed cpu"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused_before_any_kernel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for function in ("dequantize", "dequantize_nested"):
        monkeypatch.setattr(native, function, lambda *_, **__: pytest.fail("a kernel was called"))
    changes, message = BAD[name]
    arguments = nested_parts()
    for key, change in changes.items():
        arguments[key] = change(arguments.get(key))
    with pytest.raises(QlfError) as caught:
        OPS.dequantize_nf4(**arguments)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_map_without_nested_absmax_is_refused() -> None:
    expected = encoded(CASE)
    with pytest.raises(QlfError, match="needed both or neither"):
        OPS.dequantize_nf4(expected.packed, expected.absmax, CASE.shape, torch.float32, None, torch.zeros(256))


def test_what_cannot_be_quantized_is_refused() -> None:
    with pytest.raises(QlfError, match=r"\[E3\] found a tensor of torch.int32"):
        OPS.quantize_nf4(torch.zeros(64, dtype=torch.int32))
    with pytest.raises(QlfError, match="found 0 elements"):
        OPS.quantize_nf4(torch.zeros(0, 64))
    with pytest.raises(QlfError, match="found a scalar"):
        ops.quantize_weight(torch.tensor(1.0))
    with pytest.raises(QlfError, match="found no elements"):
        OPS.double_quantize(torch.zeros(0))
    with pytest.raises(QlfError, match=r"absmax: found dtype torch.float64"):
        OPS.double_quantize(torch.zeros(3, dtype=torch.float64))
    state = QuantState("nf4", 64, "float32", (64,), None)
    with pytest.raises(QlfError, match="found a nested_absmax, needed none"):
        ops.dequantize_weight(torch.zeros(32, 1, dtype=torch.uint8), torch.zeros(1), state, torch.zeros(1))


@pytest.mark.parametrize("backend", [torch_ref, cpu], ids=lambda module: module.__name__.rpartition(".")[2])
def test_non_finite_values_are_refused(backend: Any) -> None:
    weight = torch.zeros(200)
    weight[130] = float("nan")
    with pytest.raises(NonFiniteError) as caught:
        backend.quantize(weight, "nf4", 64)
    assert caught.value.block == 2 and caught.value.rule == "E1"
    with pytest.raises(NonFiniteError) as caught:
        backend.double_quantize(weight)
    assert caught.value.block == 130


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `backends.cuda` take CPU tensors and find no kernels of its own; bitsandbytes has its CPU kernels."""
    monkeypatch.setattr(cuda_launch, "why_unavailable", lambda _: "no kernels in this test")
    monkeypatch.setattr(cuda, "_bitsandbytes_works", lambda: True)
    cuda._warn.cache_clear()


def decode_without_kernels(case: Case) -> None:
    expected = encoded(case)
    how = case.shape, DTYPES[case.dtype], case.quant_type, case.blocksize
    assert_same_bits(cuda.dequantize(expected.packed, expected.absmax, *how, None, None, 0.0), expected.plain)
    nested = expected.nested_absmax, None, expected.nested_offset
    assert_same_bits(cuda.dequantize(expected.packed, expected.codes, *how, *nested), expected.nested)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    theirs = cuda._bitsandbytes_dequantize

    def spy(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        return theirs(*arguments)

    monkeypatch.setattr(cuda, "_bitsandbytes_dequantize", spy)
    return calls


@pytest.mark.usefixtures("no_kernels")
def test_without_cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason is given once. bitsandbytes decodes ordinary nf4 weights; the bits are the specified ones."""
    calls = counted(monkeypatch)
    # Of one block each, so that no block of the case is near zero.
    cases = [Case((64,), dtype, "nf4", 64, seed) for seed in range(12) for dtype in DTYPES]
    ordinary = [case for case in cases if case.weight().float().abs().max() > 1e-3]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for case in ordinary:
            decode_without_kernels(case)
    reasons = [str(warning.message) for warning in caught if "qlformat" in str(warning.message)]
    assert reasons == ["qlformat's CUDA kernels are not used: no kernels in this test"]
    assert len(calls) == 2 * len(ordinary) > 20


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize(
    "case",
    [
        Case((4000,), "float32", "nf4", 64, seed=1),  # has scales near zero, unless they are double-quantized
        Case((64, 2), "float32", "fp4", 64, seed=2),
        Case((63,), "bfloat16", "nf4", 64, seed=3),
        Case((96,), "float16", "nf4", 32, seed=3),
    ],
    ids=lambda case: f"{case.quant_type}-{case.shape}-{case.blocksize}",
)
def test_bitsandbytes_gets_only_what_it_decodes_exactly(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels flush subnormals and have their own fp4 constants: such weights are decoded by plain torch."""
    calls = counted(monkeypatch)
    with pytest.warns(RuntimeWarning, match="no kernels in this test"):
        decode_without_kernels(case)
    assert len(calls) == (1 if case.shape == (4000,) else 0)


def test_the_library_and_the_command_stay_free_of_torch() -> None:
    script = "import sys, qlformat, qlformat.codec, qlf.main\nprint('torch' in sys.modules, 'cuda' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_host_code_of_the_cuda_backend_through_the_operators(on_cpu: Launches) -> None:
    """What `ops` hands over is what the kernels take: one launch for both levels."""
    expected = encoded(CASE)
    how = CASE.shape, torch.bfloat16, "nf4", 64
    nested = expected.nested_absmax, None, expected.nested_offset
    assert_same_bits(cuda.dequantize(expected.packed, expected.codes, *how, *nested), expected.nested)
    assert on_cpu.kernels == ["qlf_dequantize_nested_bfloat16"]
    assert np.array_equal(cuda.quantize(CASE.weight(), "nf4", 64)[0].numpy(), expected.packed.numpy())
