"""Small 16- and 32-bit Llama repositories to convert, written with NumPy and struct alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qlformat import reference

Array = npt.NDArray[np.generic]

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 80,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SAFETENSORS_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
SIZES = {"U8": 1, "I8": 1, "BOOL": 1, "F8_E4M3": 1, "F16": 2, "BF16": 2, "F32": 4, "F64": 8, "I64": 8}

Tensors = Mapping[str, tuple[str, tuple[int, ...], bytes]]
"""name -> (safetensors dtype, shape, little-endian bytes)."""


def llama_values(config: Mapping[str, Any] = CONFIG, seed: int = 0) -> dict[str, npt.NDArray[np.float32]]:
    """float32 weights of a Llama with the names that transformers saves."""
    rng = np.random.default_rng(seed)
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name, shape in {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }.items():
            shapes[f"{prefix}{name}.weight"] = shape
    return {
        name: (rng.standard_normal(shape) * 0.05).astype(np.float32) + np.float32(len(shape) == 1)
        for name, shape in shapes.items()
    }


def encoded(values: Mapping[str, npt.NDArray[np.float32]], dtype: str) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """The values as tensors of one dtype."""
    return {
        name: (SAFETENSORS_DTYPES[dtype], value.shape, reference.from_float32(value, dtype).tobytes())
        for name, value in values.items()
    }


def write_safetensors(path: Path, tensors: Tensors) -> Path:
    """One safetensors file, tensors in the order given, written without any code of qlformat."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (dtype, shape, data) in tensors.items():
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + len(data)]}
        position += len(data)
    header = json.dumps(entries).encode()
    body = b"".join(data for _, _, data in tensors.values())
    path.write_bytes(len(header).to_bytes(8, "little") + header + body)
    return path


def write_source(
    path: Path,
    tensors: Tensors | None = None,
    *,
    dtype: str = "float16",
    shards: int = 1,
    config: Mapping[str, Any] = CONFIG,
) -> Path:
    """A repository: weights, config.json and a tokenizer file."""
    path.mkdir(parents=True, exist_ok=True)
    tensors = encoded(llama_values(config), dtype) if tensors is None else tensors
    names = list(tensors)
    if shards == 1:
        write_safetensors(path / "model.safetensors", tensors)
    else:
        weight_map = {}
        for shard in range(shards):
            file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
            part = names[shard::shards]
            write_safetensors(path / file, {name: tensors[name] for name in part})
            weight_map |= dict.fromkeys(part, file)
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text(json.dumps(dict(config) | {"dtype": dtype}))
    (path / "tokenizer.json").write_text('{"version": "1.0"}')
    return path


def file_bytes(directory: Path) -> dict[str, bytes]:
    """Relative name -> content of every file below a directory."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
