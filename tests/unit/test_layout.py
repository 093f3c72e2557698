"""quant_state JSON: the exact bytes, and one rule for each way to be wrong."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from qlformat.errors import FormatError, QlfError
from qlformat.layout import QuantState, Recipe, parse_quant_state, split_companion

PLAIN = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [64, 64]}
NESTED = {**PLAIN, "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.0526580810546875}


def test_bytes_are_those_of_bitsandbytes() -> None:
    state = QuantState("nf4", 64, "bfloat16", (64, 64), 0.0526580810546875)
    assert state.to_json() == (
        b'{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [64, 64], '
        b'"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.0526580810546875}'
    )
    assert parse_quant_state(state.to_json(), "w", "nf4") == state
    assert parse_quant_state(json.dumps(PLAIN).encode(), "w", "nf4").nested is False


@pytest.mark.parametrize(
    ("rule", "change"),
    [
        ("T6", {"quant_type": "fp4"}),
        ("T6", {"quant_type": None}),
        ("T6", {"blocksize": 63}),
        ("T6", {"blocksize": 64.0}),
        ("T6", {"blocksize": True}),
        ("T6", {"dtype": "float64"}),
        ("T6", {"dtype": ["bfloat16"]}),
        ("T6", {"extra": 1}),
        ("T7", {"shape": []}),
        ("T7", {"shape": 4}),
        ("T7", {"shape": [0, 4]}),
        ("T7", {"shape": [4, -4]}),
        ("T7", {"shape": [True, 4]}),
        ("T7", {"shape": [1 << 24, 1 << 24]}),
        ("T7", {"shape": [1 << 30] * 1000}),
        ("D3", {"nested_blocksize": 64}),
        ("D3", {"nested_dtype": "float16"}),
        ("D3", {"nested_offset": "0"}),
        ("D3", {"nested_offset": 0.1}),
        ("D3", {"nested_offset": 1e300}),
        ("D3", {"nested_offset": 10**400}),
        ("D3", {"nested_offset": True}),
    ],
)
def test_each_wrong_field_has_its_rule(rule: str, change: dict[str, Any]) -> None:
    with pytest.raises(FormatError) as caught:
        parse_quant_state(json.dumps({**NESTED, **change}).encode(), "w", "nf4")
    assert caught.value.rule == rule
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("missing", sorted(NESTED))
def test_a_missing_key_is_refused(missing: str) -> None:
    fields = {key: value for key, value in NESTED.items() if key != missing}
    with pytest.raises(FormatError) as caught:
        parse_quant_state(json.dumps(fields).encode(), "w", "nf4")
    assert caught.value.rule == "T6"


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"\xff", b'{"a": 1, "a": 1}', b'{"a": Infinity}', b'{"a": 1e999}', b"[" * 60_000, b" " * 70_000],
)
def test_broken_json_is_refused(data: bytes) -> None:
    with pytest.raises(FormatError) as caught:
        parse_quant_state(data, "w", "nf4")
    assert caught.value.rule == "T6"


def test_tensor_specs() -> None:
    state = QuantState("nf4", 64, "float16", (3, 11001), 0.5)
    blocks = -(-33003 // 64)
    specs = state.tensor_specs("w")
    assert specs["w"] == ("U8", (16502, 1))
    assert specs["w.absmax"] == ("U8", (blocks,))
    assert specs["w.nested_absmax"] == ("F32", (-(-blocks // 256),))
    assert list(specs)[-1] == "w.quant_state.bitsandbytes__nf4"
    assert QuantState("fp4", 64, "float16", (3, 11001), None).tensor_specs("w")["w.absmax"] == ("F32", (blocks,))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.weight.absmax", ("a.weight", "absmax")),
        ("a.weight.quant_state.bitsandbytes__nf4", ("a.weight", "quant_state.bitsandbytes__nf4")),
        ("a.weight.quant_state.bitsandbytes__nf9", ("a.weight", "quant_state.bitsandbytes__nf9")),
        ("a.weight", None),
        ("absmax", None),
    ],
)
def test_split_companion(name: str, expected: tuple[str, str] | None) -> None:
    assert split_companion(name) == expected


@pytest.mark.parametrize("wrong", [{"quant_type": "nf3"}, {"blocksize": 48}, {"compute_dtype": "float64"}])
def test_recipe_refuses(wrong: dict[str, Any]) -> None:
    with pytest.raises(QlfError):
        Recipe(**wrong)


def test_offset_text_fits_the_space_reserved_for_it() -> None:
    from qlformat.plan import _OFFSET_DIGITS

    rng = np.random.default_rng(0)
    values = rng.integers(0, 1 << 32, 200_000, dtype=np.uint32).view(np.float32)
    longest = max(len(repr(float(value))) for value in values[np.isfinite(values)])
    assert longest <= _OFFSET_DIGITS
