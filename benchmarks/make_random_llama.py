"""Write a Llama with random weights: a real architecture at any size, in seconds.

    python benchmarks/make_random_llama.py OUT [--shape 1b|1.6b|4b-wide|4b-deep] [--dtype float16|bfloat16] [--shards 2]

    1b        1.100e9 parameters, TinyLlama-1.1B's shapes
    1.6b      1.584e9, the same tensors in 33 layers: 1.0 GB in 4 bits
    4b-wide   4.5e9, 4.1 times as many: twice the hidden size, so every tensor is larger
    4b-deep   4.4e9, 4.0 times as many: the same tensors in 97 layers

The weights are slices of one pool of normal numbers (standard deviation 0.02), so that the disk and not the
random generator sets the pace; norms are 1. The output embedding is untied. Safetensors headers are written here.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

POOL = 1 << 24
VOCAB = 32000


@dataclass(frozen=True)
class Shape:
    """A Llama's dimensions."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every weight, in the model's order."""
        kv = self.hidden // self.heads * self.kv_heads
        yield "model.embed_tokens.weight", (VOCAB, self.hidden)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            yield prefix + "input_layernorm.weight", (self.hidden,)
            yield prefix + "self_attn.q_proj.weight", (self.hidden, self.hidden)
            yield prefix + "self_attn.k_proj.weight", (kv, self.hidden)
            yield prefix + "self_attn.v_proj.weight", (kv, self.hidden)
            yield prefix + "self_attn.o_proj.weight", (self.hidden, self.hidden)
            yield prefix + "post_attention_layernorm.weight", (self.hidden,)
            yield prefix + "mlp.gate_proj.weight", (self.intermediate, self.hidden)
            yield prefix + "mlp.up_proj.weight", (self.intermediate, self.hidden)
            yield prefix + "mlp.down_proj.weight", (self.hidden, self.intermediate)
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (VOCAB, self.hidden)

    def parameters(self) -> int:
        """How many weights there are."""
        return sum(math.prod(shape) for _, shape in self.tensors())


SHAPES = {
    "1b": Shape(hidden=2048, intermediate=5632, layers=22, heads=32, kv_heads=4),
    "1.6b": Shape(hidden=2048, intermediate=5632, layers=33, heads=32, kv_heads=4),
    "4b-wide": Shape(hidden=4096, intermediate=11264, layers=24, heads=32, kv_heads=4),
    "4b-deep": Shape(hidden=2048, intermediate=5632, layers=97, heads=32, kv_heads=4),
}


def make_pool(dtype: str, seed: int) -> npt.NDArray[np.uint16]:
    """POOL normal numbers as the bits of a 16-bit dtype."""
    values = np.random.default_rng(seed).standard_normal(POOL, dtype=np.float32) * np.float32(0.02)
    if dtype == "float16":
        return values.astype(np.float16).view(np.uint16)
    return (values.view(np.uint32) >> 16).astype(np.uint16)  # rounding towards zero is random enough


def config(shape: Shape, dtype: str) -> dict[str, Any]:
    """What config.json says."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": dtype,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": 2048,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": 1e-05,
        "tie_word_embeddings": False,
        "vocab_size": VOCAB,
    }


def split(shape: Shape, shards: int) -> list[list[tuple[str, tuple[int, ...]]]]:
    """The tensors in order, in `shards` runs of about equal size."""
    parts: list[list[tuple[str, tuple[int, ...]]]] = [[] for _ in range(shards)]
    total, done = shape.parameters(), 0
    for name, dims in shape.tensors():
        parts[min(shards - 1, done * shards // total)].append((name, dims))
        done += math.prod(dims)
    return parts


def write_shard(path: Path, tensors: list[tuple[str, tuple[int, ...]]], dtype: str, pool: npt.NDArray[np.uint16],
                rng: np.random.Generator) -> None:  # fmt: skip
    """Write one safetensors file, tensor after tensor."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dims in tensors:
        size = 2 * math.prod(dims)
        header[name] = {
            "dtype": {"float16": "F16", "bfloat16": "BF16"}[dtype],
            "shape": dims,
            "data_offsets": [offset, offset + size],
        }
        offset += size
    one = np.full(1, 0x3C00 if dtype == "float16" else 0x3F80, dtype=np.uint16)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, dims in tensors:
            left = math.prod(dims)
            if len(dims) == 1:
                file.write(one.repeat(left).data)
                continue
            while left:
                start = int(rng.integers(POOL // 2))
                piece = pool[start : start + min(left, POOL - start)]
                file.write(piece.data)
                left -= piece.size


def write_model(out: Path, shape: Shape, dtype: str = "float16", shards: int = 2, seed: int = 0) -> None:
    """Write the model repository; `out` is complete once config.json is there."""
    out.mkdir(parents=True, exist_ok=True)
    pool, rng = make_pool(dtype, seed), np.random.default_rng(seed + 1)
    weight_map = {}
    for index, tensors in enumerate(split(shape, shards), 1):
        name = f"model-{index:05}-of-{shards:05}.safetensors" if shards > 1 else "model.safetensors"
        write_shard(out / name, tensors, dtype, pool, rng)
        weight_map.update({tensor: name for tensor, _ in tensors})
    if shards > 1:
        index_json = {"metadata": {"total_size": 2 * shape.parameters()}, "weight_map": weight_map}
        (out / "model.safetensors.index.json").write_text(json.dumps(index_json, indent=2), encoding="utf-8")
    (out / "config.json").write_text(json.dumps(config(shape, dtype), indent=2), encoding="utf-8")


def main() -> None:
    """Parse, write, say what was written."""
    parser = argparse.ArgumentParser(description="Write a Llama with random weights.")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--shape", choices=list(SHAPES), default="1b")
    parser.add_argument("--dtype", choices=["float16", "bfloat16"], default="float16")
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    write_model(options.out, shape, options.dtype, options.shards, options.seed)
    parameters = shape.parameters()
    print(f"{options.out}: {parameters / 1e9:.3f}e9 parameters, {2 * parameters / 1e9:.2f} GB of {options.dtype}")


if __name__ == "__main__":
    main()
