"""Invalid checkpoints: config.json (C), tensor encoding (T), double quantization (D) and placement (P)."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from case import (
    EMBEDDING,
    NORM,
    SHARDS,
    SINGLE,
    STATE,
    WEIGHT,
    Case,
    drop,
    in_memory,
    on_disk,
    put,
    state,
    state_text,
)

from qlformat.codebook import CODEBOOKS, DYNAMIC8
from qlformat.layout import Recipe
from tests import builders
from tests.builders import Checkpoint, Tensor

NO_DQ = Recipe(double_quant=False)
NAN, INFINITY = struct.pack("<f", float("nan")), struct.pack("<f", float("inf"))


def _config(name: str, change: Callable[[dict[str, Any]], object]) -> Case:
    def apply(checkpoint: Checkpoint) -> None:
        checkpoint.config["quantization_config"] = dict(checkpoint.config["quantization_config"])
        change(checkpoint.config)

    return Case(name, in_memory(apply), file="config.json")


def _quantization(name: str, **fields: Any) -> Case:
    return _config(name, lambda config: config["quantization_config"].update(fields))


CONFIG = [
    _config("C1-no-quantization-config", lambda config: config.pop("quantization_config")),
    _quantization("C1-eight-bit", load_in_4bit=False, load_in_8bit=True),
    _quantization("C1-other-method", quant_method="gptq"),
    _quantization("C2-other-quant-type", bnb_4bit_quant_type="fp4"),
    _quantization("C2-no-double-quant", bnb_4bit_use_double_quant=False),
    _quantization("C2-bfloat16-storage", bnb_4bit_quant_storage="bfloat16"),
    _quantization("C3-null-skip-modules", llm_int8_skip_modules=None),
    _quantization("C3-private-key", _load_in_4bit=True),
    _quantization("C4-skipped-module-is-quantized", llm_int8_skip_modules=["lm_head", WEIGHT.removesuffix(".weight")]),
]


def _tensor(
    name: str,
    change: Callable[[Checkpoint], None],
    tensor: str | None,
    recipe: Recipe | None = None,
    decode: str | None = WEIGHT,
    **options: Any,
) -> Case:
    return Case(name, in_memory(change, recipe, **options), tensor=tensor, file=SINGLE, decode=decode)


def _patched(name: str, position: int, data: bytes) -> Callable[[Checkpoint], None]:
    """Overwrite some bytes of a stored tensor."""

    def change(checkpoint: Checkpoint) -> None:
        old = checkpoint.tensors[name]
        patched = old.data[:position] + data + old.data[position + len(data) :]
        checkpoint.tensors[name] = Tensor(old.dtype, old.shape, patched)

    return change


def _flipped(name: str, position: int, bit: int) -> Callable[[Checkpoint], None]:
    """Flip one bit of a stored tensor."""

    def change(checkpoint: Checkpoint) -> None:
        byte = checkpoint.tensors[name].data[position] ^ (1 << bit)
        _patched(name, position, bytes([byte]))(checkpoint)

    return change


def _copied(name: str, new: str, change: Callable[[bytes], bytes] = lambda data: data) -> Callable[[Checkpoint], None]:
    """Store a second tensor like `name`."""

    def apply(checkpoint: Checkpoint) -> None:
        old = checkpoint.tensors[name]
        checkpoint.tensors[new] = Tensor(old.dtype, old.shape, change(old.data))
        checkpoint.placement[new] = checkpoint.placement[name]

    return apply


def _packed_shape(dtype: str, shape: tuple[int, ...]) -> Callable[[Checkpoint], None]:
    def change(checkpoint: Checkpoint) -> None:
        checkpoint.tensors[WEIGHT] = Tensor(dtype, shape, checkpoint.tensors[WEIGHT].data[: shape[0]])

    return change


ABSMAX, QUANT_MAP = f"{WEIGHT}.absmax", f"{WEIGHT}.quant_map"
NESTED, NESTED_MAP = f"{WEIGHT}.nested_absmax", f"{WEIGHT}.nested_quant_map"
ORPHAN = "model.layers.0.self_attn.k_proj.weight.absmax"
NF9 = f"{WEIGHT}.quant_state.bitsandbytes__nf9"
FP4 = f"{WEIGHT}.quant_state.bitsandbytes__fp4"
ODD = {"quantized": {WEIGHT: (3, 5)}}

COMPANIONS = [
    *(
        _tensor(f"T1-no-{tensor.rpartition('.')[2].replace('_', '-')}", drop(tensor), WEIGHT)
        for tensor in (ABSMAX, QUANT_MAP, NESTED, NESTED_MAP)
    ),
    _tensor("T1-no-quant-state", drop(STATE), WEIGHT),
    _tensor("T2-companion-without-its-weight", put(ORPHAN, "U8", (4,), bytes(4)), ORPHAN, decode=None),
    _tensor("T2-unknown-quant-type", _copied(STATE, NF9, lambda data: data.replace(b"nf4", b"nf9")), NF9),
    _tensor("T2-two-quant-states", _copied(STATE, FP4, lambda data: data.replace(b"nf4", b"fp4")), None),
    _tensor("T2-nested-absmax-without-double-quant", put(NESTED, "F32", (1,), bytes(4)), NESTED, NO_DQ),
    _tensor("T3-flat", _packed_shape("U8", (128,)), WEIGHT),
    _tensor("T3-one-byte-short", _packed_shape("U8", (127, 1)), WEIGHT),
    _tensor("T3-signed", _packed_shape("I8", (128, 1)), WEIGHT),
    _tensor("T4-float-with-double-quant", put(ABSMAX, "F32", (4,), bytes(16)), ABSMAX),
    _tensor("T4-codes-without-double-quant", put(ABSMAX, "U8", (4,), bytes(4)), ABSMAX, NO_DQ),
    _tensor("T4-one-too-few", put(ABSMAX, "U8", (3,), bytes(3)), ABSMAX),
    _tensor("T4-nan", _patched(ABSMAX, 4, NAN), ABSMAX, NO_DQ),
    _tensor("T4-infinity", _patched(ABSMAX, 0, INFINITY), ABSMAX, NO_DQ),
    _tensor("T4-negative", _patched(ABSMAX, 12, struct.pack("<f", -1.0)), ABSMAX, NO_DQ),
    _tensor("T5-last-bit-of-one-value", _flipped(QUANT_MAP, 12, 0), QUANT_MAP),
    _tensor("T5-table-of-fp4", _patched(QUANT_MAP, 0, CODEBOOKS["fp4"].values.tobytes()), QUANT_MAP),
    _tensor("T5-fifteen-values", put(QUANT_MAP, "F32", (15,), CODEBOOKS["nf4"].values[:15].tobytes()), QUANT_MAP),
]


def _state(name: str, change: Callable[[dict[str, Any]], object], recipe: Recipe | None = None) -> Case:
    return _tensor(name, state(lambda fields: void(change(fields))), STATE, recipe)


def _state_text(name: str, change: Callable[[bytes], bytes]) -> Case:
    return _tensor(name, state_text(change), STATE)


def void(_: object) -> None:
    """Lets an expression with a value stand where none is wanted."""


def _set(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda state_fields: state_fields.update(fields)


def _state_dtype(checkpoint: Checkpoint) -> None:
    old = checkpoint.tensors[STATE]
    checkpoint.tensors[STATE] = Tensor("I8", old.shape, old.data)


QUANT_STATE = [
    _state_text("T6-not-json", lambda text: text[:-1]),
    _state_text("T6-text-after-the-object", lambda text: text + b"}"),
    _state_text("T6-repeated-key", lambda text: text.replace(b"{", b'{"blocksize": 64, ', 1)),
    _state_text("T6-more-than-64-kib", lambda text: text + b" " * (65537 - len(text))),
    _state_text("T6-nan", lambda text: text[: text.rindex(b":")] + b": NaN}"),
    _state_text("T6-list", lambda text: b"[" + text + b"]"),
    _state("T6-unknown-key", _set(zero_point=0)),
    _state("T6-missing-key", lambda fields: fields.pop("dtype")),
    _state("T6-half-of-the-nested-keys", lambda fields: fields.pop("nested_dtype")),
    _state("T6-quant-type-differs-from-the-suffix", _set(quant_type="fp4")),
    _state("T6-blocksize-48", _set(blocksize=48)),
    _state("T6-blocksize-is-a-string", _set(blocksize="64")),
    _state("T6-dtype-float64", _set(dtype="float64")),
    _tensor("T6-signed-bytes", _state_dtype, STATE),
    _state("T7-no-dimension", _set(shape=[])),
    _state("T7-zero-dimension", _set(shape=[0, 16])),
    _state("T7-negative-dimension", _set(shape=[-16, -16])),
    _state("T7-two-to-the-48-elements", _set(shape=[1 << 24, 1 << 24])),
    _state("T7-element-count-wraps", _set(shape=[1 << 32, 1 << 32, 256])),
    _tensor("T8-pad-nibble", _patched(WEIGHT, 7, b"\x70"), WEIGHT, decode=None, **ODD),
    _tensor("T9-float8", put(NORM, "F8_E4M3", (16,), bytes(16)), NORM, decode=None),
    _tensor("T9-foreign-4-bit", put(NORM, "F4", (16,), bytes(8)), NORM, decode=None),
    _tensor("D1-two-values", put(NESTED, "F32", (2,), bytes(8)), NESTED),
    _tensor("D1-half-precision", put(NESTED, "F16", (1,), bytes(2)), NESTED),
    _tensor("D1-nan", _patched(NESTED, 0, NAN), NESTED),
    _tensor("D1-negative", _patched(NESTED, 0, struct.pack("<f", -1.0)), NESTED),
    _tensor("D2-last-bit-of-one-value", _flipped(NESTED_MAP, 400, 0), NESTED_MAP),
    _tensor("D2-255-values", put(NESTED_MAP, "F32", (255,), DYNAMIC8[:255].tobytes()), NESTED_MAP),
    _state("D3-blocksize-128", _set(nested_blocksize=128)),
    _state("D3-half-precision", _set(nested_dtype="float16")),
    _state("D3-offset-is-no-float32", _set(nested_offset=0.1)),
    _state("D3-offset-beyond-float32", _set(nested_offset=1e39)),
    _state("D3-offset-is-a-string", _set(nested_offset="0.0")),
]


def _split_weight(checkpoint: Checkpoint) -> None:
    checkpoint.placement[ABSMAX] = SHARDS[0]


def _reordered(repo: Path, order: Callable[[str], object], align: int = 64) -> None:
    """Write the shard again with its tensors in another order."""
    tensors = builders.read_tensors(repo / SINGLE)
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name in sorted(tensors, key=order):  # type: ignore[arg-type]
        span = [len(data), len(data) + len(tensors[name].data)]
        entries[name] = {"dtype": tensors[name].dtype, "shape": list(tensors[name].shape), "data_offsets": span}
        data += tensors[name].data
    (repo / SINGLE).write_bytes(builders.container_bytes(entries, data, align))


def _shifted_data(repo: Path) -> None:
    entries, data = builders.read_container(repo / SINGLE)
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (8 + -(8 + len(text)) % 64)
    (repo / SINGLE).write_bytes(builders.container_bytes(text, data))


PLACEMENT = [
    Case("P1-absmax-in-another-shard", in_memory(_split_weight, shards=2), tensor=WEIGHT),
    Case("P2-data-starts-at-8-modulo-64", on_disk(_shifted_data), file=SINGLE),
    Case(
        "P2-packed-weight-after-an-odd-one",
        on_disk(
            lambda repo: _reordered(repo, lambda name: ("quant_state" in name, name != EMBEDDING + ".x", len(name)))
        ),
        file=SINGLE,
        tensor=WEIGHT,
    ),
    Case(
        "P3-quant-state-before-other-tensors",
        on_disk(lambda repo: _reordered(repo, lambda name: (name != WEIGHT, name != STATE, name))),
        file=SINGLE,
    ),
]
