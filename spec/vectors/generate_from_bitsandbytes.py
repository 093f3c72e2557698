"""Write the golden vectors: decode/, encode/, double_quantize/ and checkpoints/valid/plain-from-transformers.

    python spec/vectors/generate_from_bitsandbytes.py [DIRECTORY]

Everything here comes out of bitsandbytes and transformers. qlformat is not imported, so an error of its own encoder
cannot hide in these files. They were made once, with the versions that each file names, and are never made again for
a released format version: a difference after an upgrade of bitsandbytes is a finding, not a reason to regenerate.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bitsandbytes
import bitsandbytes.functional as bnb
import torch

HERE = Path(__file__).resolve().parent
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
MADE_WITH = {"bitsandbytes": bitsandbytes.__version__, "torch": torch.__version__, "device": "cpu"}
State = bnb.QuantState


def raw(tensor: torch.Tensor) -> bytes:
    """Little-endian bytes of a tensor."""
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def stored(tensor: torch.Tensor) -> dict[str, Any]:
    """A tensor as JSON: safetensors dtype, shape, little-endian bytes in hexadecimal."""
    return {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "hex": raw(tensor).hex()}


def weights(count: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Normal values with a few outliers."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, generator=generator) * 0.02
    values[:: max(count // 5, 1)] *= 7
    return values.to(dtype)


def table_zeros(decoded: torch.Tensor, packed: torch.Tensor, state: State) -> tuple[torch.Tensor, int]:
    """Give the zeros of FP4's code 8 the sign that the code table implies, +0.0 * absmax.

    The table of bitsandbytes, which it stores as quant_map, has +0.0 there; its native decoder computes with -0.0.
    """
    codes = torch.stack([packed.reshape(-1) >> 4, packed.reshape(-1) & 15], dim=1).reshape(-1)[: decoded.numel()]
    absmax = state.absmax
    if state.nested:
        absmax = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    zeros = (absmax.repeat_interleave(state.blocksize)[: decoded.numel()] * 0.0).to(decoded.dtype)
    fixed = torch.where((codes == 8) & (decoded.reshape(-1) == 0), zeros, decoded.reshape(-1))
    changed = torch.signbit(fixed) != torch.signbit(decoded.reshape(-1))
    return fixed.reshape(decoded.shape), int(changed.sum())


def decode_vector(about: str, packed: torch.Tensor, state: State) -> dict[str, Any]:
    """One decode case from a packed weight and its state."""
    decoded = bnb.dequantize_4bit(packed, state)
    if state.quant_type == "fp4":
        decoded, changed = table_zeros(decoded, packed, state)
    else:
        changed = 0
    tensors = {"weight": stored(packed)}
    tensors.update({f"weight.{key}": stored(value) for key, value in state.as_dict(packed=True).items()})
    found = {
        "about": about,
        "made_with": MADE_WITH,
        "tensors": tensors,
        "decoded": stored(decoded.reshape(state.shape)),
    }
    if changed:
        found["signs_of_zero_changed"] = changed
    return found


def quantized(
    values: torch.Tensor, shape: tuple[int, ...], quant_type: str, blocksize: int, nested: bool
) -> tuple[torch.Tensor, State]:
    """What bitsandbytes makes of a weight."""
    found: tuple[torch.Tensor, State] = bnb.quantize_4bit(
        values.reshape(shape), blocksize=blocksize, compress_statistics=nested, quant_type=quant_type
    )
    return found


def decode_cases() -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, vector) of every decode case."""
    seed = 0
    for quant_type in ("nf4", "fp4"):
        for label, dtype in (("f32", torch.float32), ("f16", torch.float16), ("bf16", torch.bfloat16)):
            for nested in (False, True):
                seed += 1
                name = f"{quant_type}-{label}-{'dq' if nested else 'f32-absmax'}"
                parts = quantized(weights(400, dtype, seed), (4, 100), quant_type, 64, nested)
                yield name, decode_vector("six full blocks and a ragged tail of 16", *parts)
    for blocksize in BLOCKSIZES:
        parts = quantized(
            weights(blocksize + 70, torch.bfloat16, blocksize), (1, blocksize + 70), "nf4", blocksize, True
        )
        yield f"nf4-blocksize-{blocksize}", decode_vector("a full block and what remains", *parts)
    parts = quantized(weights(32 * 260, torch.bfloat16, 7), (65, 128), "nf4", 32, True)
    yield "nf4-two-nested-blocks", decode_vector("260 blocks: nested blocks of 256 and 4", *parts)
    for quant_type in ("nf4", "fp4"):
        for count in (1, 3, 65):
            parts = quantized(weights(count, torch.float32, count), (1, count), quant_type, 64, False)
            yield f"{quant_type}-elements-{count}", decode_vector("an odd count, with a pad nibble", *parts)
    for shape in ((128,), (2, 4, 24), (3, 1, 67)):
        parts = quantized(weights(torch.Size(shape).numel(), torch.bfloat16, len(shape)), shape, "nf4", 64, True)
        yield f"nf4-dimensions-{len(shape)}-of-{shape[-1]}", decode_vector("flattened row-major", *parts)
    yield from crafted_decode_cases()


def crafted_decode_cases() -> Iterator[tuple[str, dict[str, Any]]]:
    """States that a decoder must handle although no usual weight leads to them."""
    every = torch.arange(256, dtype=torch.uint8).reshape(-1, 1)
    scales = {
        "every-byte": [1.0, 0.5, 0.1, 3.0, 1e-3, 7.25, 2.0**-14, 2.0**-24],
        "zero-absmax": [0.0, -0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0],
        "subnormal-absmax": [1e-45, 1e-40, 5.877e-39, 1.1754944e-38, 1e-38, 3e-42, 2.3e-41, 9e-39],
        "huge-absmax": [3.4028235e38, 3.39e38, 65504.0, 65520.0, 65536.0, 1e5, 1e30, 1.7e38],
        "half-precision-limits": [6e-8, 2.98e-8, 2.9802322e-8, 6.1e-5, 65504.0, 65519.99, 65520.0, 1e-7],
    }
    for quant_type in ("nf4", "fp4"):
        code = bnb.get_4bit_type(quant_type, device="cpu")
        for label, values in scales.items():
            for name, dtype in (("f32", torch.float32), ("f16", torch.float16), ("bf16", torch.bfloat16)):
                state = State(torch.tensor(values), torch.Size((8, 64)), code, 64, quant_type, dtype)
                yield f"{quant_type}-{label}-{name}", decode_vector(f"absmax {values}", every, state)
        nested_code = bnb.create_dynamic_map()
        scaling = {"rounding": (0.1, 0.3, 256), "overflowing": (65504.0, 40.0, 256), "cancelling": (0.9929688, 1.0, 64)}
        for label, (offset, nested, blocks) in scaling.items():
            blocks = blocks if quant_type == "nf4" else 32
            state = State(
                torch.arange(blocks, dtype=torch.uint8), torch.Size((blocks, 32)), code, 32, quant_type, torch.float16,
                torch.tensor(offset), State(torch.tensor([nested]), None, nested_code, 256, None, torch.float32),
            )  # fmt: skip
            packed = every.repeat(16, 1)[: blocks * 16]
            yield (
                f"{quant_type}-nested-codes-{label}",
                decode_vector(f"codes 0 to {blocks - 1} of absmax", packed, state),
            )


def encode_vector(about: str, values: torch.Tensor, quant_type: str, blocksize: int) -> dict[str, Any]:
    """One encode case: a flat weight, its packed codes and its absmax."""
    packed, state = bnb.quantize_4bit(values, blocksize=blocksize, quant_type=quant_type)
    return {
        "about": about, "made_with": MADE_WITH, "quant_type": quant_type, "blocksize": blocksize,
        "input": stored(values), "packed": stored(packed), "absmax": stored(state.absmax),
    }  # fmt: skip


def thresholds(quant_type: str) -> torch.Tensor:
    """Midpoints of neighbouring code values, in float32."""
    ranked: torch.Tensor = bnb.get_4bit_type(quant_type, device="cpu").sort().values
    return (ranked[:-1] + ranked[1:]) / 2


def encode_cases() -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, vector) of every encode case."""
    seed = 100
    for quant_type in ("nf4", "fp4"):
        for label, dtype in (("f32", torch.float32), ("f16", torch.float16), ("bf16", torch.bfloat16)):
            seed += 1
            vector = encode_vector("six full blocks and a ragged tail of 16", weights(400, dtype, seed), quant_type, 64)
            yield f"{quant_type}-{label}", vector
        for blocksize in BLOCKSIZES:
            values = weights(blocksize + 70, torch.bfloat16, seed + blocksize)
            yield (
                f"{quant_type}-blocksize-{blocksize}",
                encode_vector("a full block and the rest", values, quant_type, blocksize),
            )
        for count in (1, 2, 3, 63, 65):
            values = weights(count, torch.float32, count)
            yield (
                f"{quant_type}-elements-{count}",
                encode_vector("a ragged block alone or last", values, quant_type, 64),
            )
        for name, about, values in edge_inputs(quant_type):
            yield f"{quant_type}-{name}", encode_vector(about, values, quant_type, 64)


def edge_inputs(quant_type: str) -> Iterator[tuple[str, str, torch.Tensor]]:
    """(name, about, values) of inputs where rounding, sign or range matters."""
    middle, away = thresholds(quant_type), torch.tensor([float("inf")])
    near = torch.cat([middle, middle.nextafter(away), middle.nextafter(-away)])
    one = torch.tensor([1.0])
    yield "ties", "exact midpoints and their neighbours, absmax 1", torch.cat([one, near, near[:18].neg()])
    yield "ties-in-a-tail", "the same where the last block is ragged", torch.cat([torch.ones(64), one, near, one])
    yield (
        "ties-scaled",
        "midpoints times 3, whose reciprocal is rounded",
        torch.cat([one * 3, near * 3, near[:18] * -3]),
    )
    yield "code-values", "every code value itself", torch.cat([bnb.get_4bit_type(quant_type, device="cpu")] * 4)
    yield "zero-block", "a zero block, then one that is not", torch.cat([torch.zeros(64), torch.ones(64)])
    yield "zero-tail", "a full block, then a zero tail of 5", torch.cat([torch.ones(64), torch.zeros(5)])
    yield "zeros-alone", "five zeros", torch.zeros(5)
    yield "signed-zeros", "+0 and -0 beside a 1", torch.cat([one, torch.tensor([0.0, -0.0] * 31), one])
    tiny = torch.arange(-32, 32).float() * 1e-45
    yield "subnormal-block", "absmax far below 1e-38", tiny
    yield "subnormal-tail", "the same in a ragged tail", torch.cat([tiny, tiny[:33]])
    yield "around-1e-38", "absmax just below and above the smallest divisor", torch.cat([
        torch.linspace(-9.9e-39, 9.9e-39, 64), torch.linspace(-1.01e-38, 1.01e-38, 64),
        torch.linspace(-1.1754944e-38, 1.1754944e-38, 64), torch.linspace(-5e-39, 5e-39, 31)])  # fmt: skip
    yield "huge", "absmax whose reciprocal is subnormal", torch.linspace(-1, 1, 100) * 3.4028234663852886e38
    yield "float16-subnormals", "float16 subnormals", (torch.arange(-50, 50).float() * 2.0**-24).half()
    yield "bfloat16-subnormals", "bfloat16 subnormals", (torch.arange(-50, 50).float() * 2.0**-133).bfloat16()
    yield "outlier", "one large value flattens its block only", torch.cat([weights(127, torch.float32, 5), one * 50])


def nested_cases() -> Iterator[tuple[str, dict[str, Any]]]:
    """Double quantization, where bitsandbytes leaves no doubt.

    Its mean of absmax is a float32 sum that depends on threads, so these absmax are multiples of 1/1024: every order
    of summing them is exact. Its 8-bit encoder goes through a table of 65,536 cells, so that some codes are not the
    nearest; the largest case holds such codes, and fails an encoder that searches exactly.
    """
    code = bnb.create_dynamic_map()
    for blocks in (2, 17, 255, 256, 257, 600, 2500):
        generator = torch.Generator().manual_seed(blocks)
        absmax = torch.randint(1, 300, (blocks,), generator=generator) / 1024
        residual = absmax - absmax.mean()
        codes, state = bnb.quantize_blockwise(residual, code=code, blocksize=256)
        exact, _ = torch.ops.bitsandbytes.quantize_blockwise.default(residual.double(), code, 256)
        off = int((codes != exact).sum())
        if blocks == 2500 and not off:
            raise RuntimeError("every code is the nearest: this case tells nothing; take another seed")
        about = f"{blocks} blocks; {off} of the codes are not the nearest"
        yield f"blocks-{blocks}", nested_vector(about, absmax, codes, state.absmax, absmax.mean())
    for name, value, blocks in (("one-block", 0.75, 1), ("all-equal", 0.125, 300), ("all-zero", 0.0, 64)):
        absmax = torch.full((blocks,), value)
        codes, state = bnb.quantize_blockwise(absmax - absmax.mean(), code=code, blocksize=256)
        yield name, nested_vector("absmax minus its mean is zero", absmax, codes, state.absmax, absmax.mean())
    absmax = torch.tensor([1.0, 3.0] + [2.0] * 30)
    codes, state = bnb.quantize_blockwise(absmax - absmax.mean(), code=code, blocksize=256)
    yield "zero-residuals", nested_vector("residuals of zero have code 131", absmax, codes, state.absmax, absmax.mean())


def nested_vector(
    about: str, absmax: torch.Tensor, codes: torch.Tensor, nested: torch.Tensor, offset: torch.Tensor
) -> dict[str, Any]:
    """One case of double quantization."""
    return {
        "about": about, "made_with": MADE_WITH, "absmax": stored(absmax), "codes": stored(codes),
        "nested_absmax": stored(nested), "nested_offset": stored(offset.reshape(1)),
    }  # fmt: skip


def write_llama(target: Path) -> None:
    """A tiny random Llama, quantized and saved by transformers and bitsandbytes alone."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=64, dtype=torch.bfloat16,
    )  # fmt: skip
    torch.manual_seed(11)
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=options, dtype=torch.bfloat16)
    shutil.rmtree(target, ignore_errors=True)
    model.save_pretrained(target / "repo")
    (target / "repo" / "model.safetensors").chmod(0o644)
    decoded = {}
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            data = raw(bnb.dequantize_4bit(module.weight.data, module.weight.quant_state))
            decoded[f"{name}.weight"] = {
                "file": "model.safetensors",
                "dtype": "bfloat16",
                "shape": list(module.weight.quant_state.shape),
                "sha256": hashlib.sha256(data).hexdigest(),
            }
    about = "Written by transformers and bitsandbytes, which know nothing of this format; nested offsets are theirs."
    write_json(target / "expected.json", {"about": about, "made_with": MADE_WITH, "decoded": decoded})


def write_json(path: Path, value: object) -> None:
    """One readable JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def main(root: Path) -> None:
    """Write everything below `root`."""
    for folder, cases in (("decode", decode_cases()), ("encode", encode_cases()), ("double_quantize", nested_cases())):
        shutil.rmtree(root / folder, ignore_errors=True)
        for name, vector in cases:
            write_json(root / folder / f"{name}.json", vector)
    write_llama(root / "checkpoints" / "valid" / "plain-from-transformers")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
