"""Names, shapes and the quant_state JSON of a quantized weight (spec/format.md, "Tensor encoding")."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qlformat.errors import FormatError, QlfError, shown

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
QUANT_TYPES = ("nf4", "fp4")
SOURCE_DTYPES = ("float32", "float16", "bfloat16")
NESTED_BLOCKSIZE = 256
MAX_ELEMENTS = 1 << 48
MAX_QUANT_STATE_BYTES = 64 << 10
QUANT_STATE_PREFIX = "quant_state.bitsandbytes__"

COMPANIONS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
"""Suffixes of the companion tensors other than the quant_state, in the order of the spec."""


@dataclass(frozen=True)
class Recipe:
    """How a checkpoint is quantized.

    Attributes:
        quant_type: "nf4" or "fp4".
        blocksize: elements per absmax, one of BLOCKSIZES.
        double_quant: whether absmax is quantized again to 8 bits.
        compute_dtype: dtype that readers compute in; it does not change the stored bytes.
    """

    quant_type: str = "nf4"
    blocksize: int = 64
    double_quant: bool = True
    compute_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.quant_type not in QUANT_TYPES:
            raise QlfError(f"quant_type {shown(self.quant_type)} is unknown; use one of {', '.join(QUANT_TYPES)}")
        if self.blocksize not in BLOCKSIZES:
            raise QlfError(
                f"blocksize {shown(self.blocksize)} is not supported; use one of {', '.join(map(str, BLOCKSIZES))}"
            )
        if self.compute_dtype not in SOURCE_DTYPES:
            raise QlfError(
                f"compute dtype {shown(self.compute_dtype)} is unknown; use one of {', '.join(SOURCE_DTYPES)}"
            )


@dataclass(frozen=True, slots=True)
class QuantState:
    """What the quant_state JSON of one weight says.

    Attributes:
        quant_type, blocksize: as in Recipe.
        dtype: dtype of the source, and the one decoded to.
        shape: shape of the weight, [out, in] for a linear layer.
        nested_offset: mean that was subtracted from absmax, or None without double quantization.
    """

    quant_type: str
    blocksize: int
    dtype: str
    shape: tuple[int, ...]
    nested_offset: float | None

    @property
    def elements(self) -> int:
        """Element count n of the weight."""
        return math.prod(self.shape)

    @property
    def blocks(self) -> int:
        """Count of absmax values: ceil(n / blocksize)."""
        return -(-self.elements // self.blocksize)

    @property
    def nested(self) -> bool:
        """Whether absmax is double quantized."""
        return self.nested_offset is not None

    def to_json(self) -> bytes:
        """The bytes of the quant_state tensor: json.dumps with its defaults, keys in the order of bitsandbytes."""
        fields: dict[str, Any] = {
            "quant_type": self.quant_type,
            "blocksize": self.blocksize,
            "dtype": self.dtype,
            "shape": list(self.shape),
        }
        if self.nested_offset is not None:
            fields["nested_blocksize"] = NESTED_BLOCKSIZE
            fields["nested_dtype"] = "float32"
            fields["nested_offset"] = float(self.nested_offset)
        return json.dumps(fields).encode()

    def tensor_specs(self, weight: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name -> (safetensors dtype, shape) of the packed weight and its companions; the quant_state comes last."""
        packed = -(-self.elements // 2)
        specs: dict[str, tuple[str, tuple[int, ...]]] = {
            weight: ("U8", (packed, 1)),
            f"{weight}.absmax": ("U8" if self.nested else "F32", (self.blocks,)),
            f"{weight}.quant_map": ("F32", (16,)),
        }
        if self.nested:
            specs[f"{weight}.nested_absmax"] = ("F32", (-(-self.blocks // NESTED_BLOCKSIZE),))
            specs[f"{weight}.nested_quant_map"] = ("F32", (256,))
        specs[quant_state_name(weight, self.quant_type)] = ("U8", (len(self.to_json()),))
        return specs


def quant_state_name(weight: str, quant_type: str) -> str:
    """Name of the quant_state tensor of a weight."""
    return f"{weight}.{QUANT_STATE_PREFIX}{quant_type}"


def split_companion(name: str) -> tuple[str, str] | None:
    """(weight, suffix) when `name` is named like a companion, else None.

    An unknown quant_type counts as a companion too, so that it is refused rather than taken for a plain tensor.
    """
    weight, mark, quant_type = name.rpartition(f".{QUANT_STATE_PREFIX}")
    if mark:
        return weight, QUANT_STATE_PREFIX + quant_type
    weight, _, suffix = name.rpartition(".")
    return (weight, suffix) if suffix in COMPANIONS and weight else None


def element_count(shape: Sequence[int]) -> int:
    """Product of the dimensions; once it is past 2**63 the product so far, since a hostile shape may be long."""
    count = 0 if 0 in shape else 1
    for dim in shape:
        count *= dim
        if count >= 1 << 63:
            break
    return count


def strict_json(data: bytes) -> Any:
    """Parse UTF-8 JSON; repeated keys, NaN, Infinity, -0 and numbers beyond float64 raise ValueError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key is repeated")
        return found

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    def finite(digits: str) -> float:
        number = float(digits)
        if math.isinf(number):
            raise ValueError(f"{digits[:40]} is too large")
        return number

    def integer(digits: str) -> int:
        if digits == "-0":
            raise ValueError("-0 is no integer")
        return int(digits)

    try:
        return json.loads(
            data.decode("utf-8"),
            object_pairs_hook=unique,
            parse_constant=refuse,
            parse_float=finite,
            parse_int=integer,
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


_STATE_KEYS = ("quant_type", "blocksize", "dtype", "shape")
_NESTED_KEYS = ("nested_blocksize", "nested_dtype", "nested_offset")


def parse_quant_state(data: bytes, weight: str, suffix_type: str) -> QuantState:
    """Read and check the bytes of a quant_state tensor.

    Args:
        data: the tensor's bytes.
        weight: name of the weight, for messages.
        suffix_type: quant_type in the tensor's name.

    Raises:
        FormatError: rule T6 (JSON, keys, values), T7 (shape) or D3 (nested fields).
    """

    def bad(rule: str, message: str) -> FormatError:
        return FormatError(message, rule=rule, tensor=quant_state_name(weight, suffix_type))

    if len(data) > MAX_QUANT_STATE_BYTES:
        raise bad("T6", f"found {len(data)} bytes, at most {MAX_QUANT_STATE_BYTES} are allowed")
    try:
        fields = strict_json(data)
    except ValueError as error:
        raise bad("T6", f"not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise bad("T6", f"found a JSON {type(fields).__name__}, needed an object")
    nested = any(key in fields for key in _NESTED_KEYS)
    needed = _STATE_KEYS + (_NESTED_KEYS if nested else ())
    if set(fields) != set(needed):
        wrong = sorted(set(fields) ^ set(needed))
        raise bad("T6", f"missing or unknown keys {wrong}, needed exactly {list(needed)}")
    problem = _state_problem(fields, suffix_type)
    if problem:
        raise bad("T6", problem)
    problem = _shape_problem(fields["shape"])
    if problem:
        raise bad("T7", problem)
    problem = _nested_problem(fields) if nested else None
    if problem:
        raise bad("D3", problem)
    offset = float(fields["nested_offset"]) if nested else None
    return QuantState(fields["quant_type"], fields["blocksize"], fields["dtype"], tuple(fields["shape"]), offset)


def _state_problem(fields: Mapping[str, Any], suffix_type: str) -> str | None:
    if suffix_type not in QUANT_TYPES or fields["quant_type"] != suffix_type:
        found = shown(fields["quant_type"])
        return f"found quant_type {found} under the suffix {shown(suffix_type)}, needed nf4 or fp4 in both"
    if type(fields["blocksize"]) is not int or fields["blocksize"] not in BLOCKSIZES:
        return f"found blocksize {shown(fields['blocksize'])}, needed one of {BLOCKSIZES}"
    if fields["dtype"] not in SOURCE_DTYPES:
        return f"found dtype {shown(fields['dtype'])}, needed one of {SOURCE_DTYPES}"
    return None


def _shape_problem(shape: Any) -> str | None:
    if not isinstance(shape, list) or not shape or any(type(dim) is not int or dim < 1 for dim in shape):
        return f"found shape {shown(shape)}, needed a list of positive integers"
    if element_count(shape) >= MAX_ELEMENTS:
        return f"found shape {shown(shape)} with at least {element_count(shape)} elements, needed fewer than 2**48"
    return None


def _nested_problem(fields: Mapping[str, Any]) -> str | None:
    if fields["nested_blocksize"] != NESTED_BLOCKSIZE or type(fields["nested_blocksize"]) is not int:
        return f"found nested_blocksize {shown(fields['nested_blocksize'])}, needed {NESTED_BLOCKSIZE}"
    if fields["nested_dtype"] != "float32":
        return f"found nested_dtype {shown(fields['nested_dtype'])}, needed 'float32'"
    offset = fields["nested_offset"]
    if type(offset) not in (int, float):
        return f"found nested_offset {shown(offset)}, needed a number"
    try:
        with np.errstate(over="ignore"):
            exact = float(np.float32(offset)) == float(offset) and math.isfinite(float(offset))
    except OverflowError:
        exact = False
    return None if exact else f"found nested_offset {shown(offset)}, needed a finite number that float32 holds exactly"
