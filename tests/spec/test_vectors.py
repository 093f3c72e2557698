"""The encoder and the decoder give exactly what bitsandbytes gave: spec/vectors/{decode,encode,double_quantize}."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from bitsandbytes import functional

from qlformat import codec, reference
from qlformat.layout import QuantState, parse_quant_state

VECTORS = Path(__file__).resolve().parents[2] / "spec" / "vectors"
NUMPY = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "U8": "u1"}
TORCH = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
Array = npt.NDArray[np.generic]


def load(kind: str, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((VECTORS / kind / f"{name}.json").read_text())
    return found


def names(kind: str) -> list[str]:
    return sorted(path.stem for path in (VECTORS / kind).glob("*.json"))


def elements(stored: dict[str, Any]) -> Array:
    """A stored tensor, flat; bfloat16 as its bits."""
    return np.frombuffer(bytes.fromhex(stored["hex"]), dtype=NUMPY[stored["dtype"]])


def decode_parts(vector: dict[str, Any]) -> tuple[QuantState, npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """(state, packed, decoded absmax) of a decode vector."""
    tensors = vector["tensors"]
    state_name = next(name for name in tensors if ".quant_state." in name)
    data = bytes.fromhex(tensors[state_name]["hex"])
    state = parse_quant_state(data, "weight", state_name.rpartition("__")[2])
    absmax: Any = elements(tensors["weight.absmax"])
    if state.nested_offset is not None:
        nested: Any = elements(tensors["weight.nested_absmax"])
        absmax = reference.double_dequantize(absmax, nested, np.float32(state.nested_offset))
    packed: Any = elements(tensors["weight"])
    return state, packed, absmax


@pytest.mark.parametrize("name", names("decode"))
def test_decode(name: str) -> None:
    vector = load("decode", name)
    state, packed, absmax = decode_parts(vector)
    needed = elements(vector["decoded"])
    assert list(state.shape) == vector["decoded"]["shape"]
    values = reference.dequantize(packed, absmax, state.elements, state.quant_type, state.blocksize)
    assert reference.from_float32(values, state.dtype).tobytes() == needed.tobytes()
    fast = codec.dequantize(
        packed, absmax, state.elements, quant_type=state.quant_type, blocksize=state.blocksize, dtype=state.dtype
    )
    assert fast.tobytes() == needed.tobytes()


@pytest.mark.parametrize("name", names("decode"))
def test_our_quant_state_is_written_as_bitsandbytes_writes_it(name: str) -> None:
    tensors = load("decode", name)["tensors"]
    state_name = next(name for name in tensors if ".quant_state." in name)
    state, _, _ = decode_parts({"tensors": tensors})
    assert state.to_json() == bytes.fromhex(tensors[state_name]["hex"])
    specs = state.tensor_specs("weight")
    assert {name: (tensor["dtype"], tuple(tensor["shape"])) for name, tensor in tensors.items()} == specs


@pytest.mark.parametrize("name", names("encode"))
def test_encode(name: str) -> None:
    vector = load("encode", name)
    dtype = TORCH[vector["input"]["dtype"]]
    source = elements(vector["input"])
    wide = reference.to_float32(source, dtype)
    packed, absmax = reference.quantize(wide, vector["quant_type"], vector["blocksize"])
    assert packed.tobytes() == elements(vector["packed"]).tobytes()
    assert absmax.tobytes() == elements(vector["absmax"]).tobytes()
    fast = codec.quantize(source, dtype=dtype, quant_type=vector["quant_type"], blocksize=vector["blocksize"])
    assert fast[0].tobytes() == packed.tobytes()
    assert fast[1].tobytes() == absmax.tobytes()


@pytest.mark.parametrize("name", names("double_quantize"))
def test_double_quantize(name: str) -> None:
    vector = load("double_quantize", name)
    absmax: Any = elements(vector["absmax"])
    needed = [elements(vector[key]).tobytes() for key in ("codes", "nested_absmax", "nested_offset")]
    for encoder in (reference.double_quantize, codec.double_quantize):
        codes, nested, offset = encoder(absmax)
        assert [codes.tobytes(), nested.tobytes(), np.float32(offset).tobytes()] == needed


def test_the_vectors_cover_what_they_should() -> None:
    decode = [load("decode", name) for name in names("decode")]
    states = [decode_parts(vector)[0] for vector in decode]
    assert {(s.quant_type, s.dtype, s.nested) for s in states} == {
        (quant_type, dtype, nested)
        for quant_type in ("nf4", "fp4")
        for dtype in ("float32", "float16", "bfloat16")
        for nested in (False, True)
    }
    assert {s.blocksize for s in states} == {32, 64, 128, 256, 512, 1024, 2048, 4096}
    assert {len(s.shape) for s in states} == {1, 2, 3}
    assert any(s.elements == 1 for s in states)
    assert any(s.blocks > 256 and s.nested for s in states)
    subnormal = np.finfo(np.float32).tiny
    scales = np.concatenate([decode_parts(vector)[2] for vector in decode])
    assert ((np.abs(scales) < subnormal) & (scales != 0)).any()
    assert (scales == 0).any()
    encode = [load("encode", name) for name in names("encode")]
    assert {(v["quant_type"], v["blocksize"]) for v in encode} >= {
        (q, b) for q in ("nf4", "fp4") for b in (32, 64, 128, 256, 512, 1024, 2048, 4096)
    }
    assert {v["input"]["dtype"] for v in encode} == {"F32", "F16", "BF16"}


def test_bitsandbytes_still_decodes_like_the_vectors() -> None:
    """The committed bytes are what the installed bitsandbytes gives, for a sample that is quick to run."""
    for name in ("nf4-bf16-dq", "nf4-f16-f32-absmax", "nf4-two-nested-blocks", "nf4-elements-65"):
        vector = load("decode", name)
        tensors = {
            key.removeprefix("weight."): torch.from_numpy(elements(stored).copy()).reshape(stored["shape"])
            for key, stored in vector["tensors"].items()
        }
        packed = tensors.pop("weight")
        state = functional.QuantState.from_dict(tensors, device=torch.device("cpu"))
        with torch.compiler.set_stance("force_eager"):  # odd shapes would be compiled, which takes half a minute
            decoded = functional.dequantize_4bit(packed, state).contiguous().view(-1)
        assert decoded.view(torch.uint8).numpy().tobytes() == elements(vector["decoded"]).tobytes(), name
