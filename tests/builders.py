"""Tiny checkpoints for tests, built with the slow reference and plain struct and json.

Nothing here goes through converter.py or ShardWriter, so these files check the writer. All bytes are deterministic.

    checkpoint = build_checkpoint(tmp_path / "out")              # two NF4+DQ weights, two plain ones, with qlf.json
    checkpoint = make_checkpoint(recipe=Recipe("fp4", 128, False), shards=2)   # in memory; change it, then
    checkpoint.write(tmp_path / "out")                           # qlf.json is computed from what is written
    edit_header(shard, change); flip_bit(shard, 100); reseal(out)   # or change the files, and the manifest after them
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qlformat import reference
from qlformat.codebook import CODEBOOKS, DYNAMIC8
from qlformat.layout import QuantState, Recipe, split_companion
from qlformat.manifest import FileEntry, Manifest, Source, TensorEntry, WeightEntry, fingerprint
from tests.shard_files import (
    DTYPE_BYTES,
    SINGLE,
    Tensor,
    container_bytes,
    edit_header,
    edit_json,
    flip_bit,
    json_bytes,
    read_container,
    read_tensors,
    shard_bytes,
    shard_name,
)

__all__ = [
    "DEFAULT_PLAIN", "DEFAULT_QUANTIZED", "DTYPE_BYTES", "INDEX", "LLAMA_CONFIG", "LLAMA_PLAIN", "LLAMA_QUANTIZED",
    "SINGLE", "Checkpoint", "Tensor", "build_checkpoint", "build_source", "container_bytes", "edit_header",
    "edit_json", "example_values", "file_entries", "flip_bit", "json_bytes", "make_checkpoint", "plain_weight",
    "quantization_config", "quantized_weight", "read_container", "read_tensors", "reseal", "shard_bytes",
    "shard_name", "source_bits",
]  # fmt: skip

F32 = npt.NDArray[np.float32]
Shapes = Mapping[str, tuple[int, ...]]

TORCH_NAMES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
}  # fmt: skip
SAFETENSORS_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
INDEX = "model.safetensors.index.json"
WRITER = "qlformat-tests"

DEFAULT_QUANTIZED: Shapes = {
    "model.layers.0.mlp.down_proj.weight": (16, 24),
    "model.layers.0.self_attn.q_proj.weight": (16, 16),
}
DEFAULT_PLAIN: Shapes = {"model.embed_tokens.weight": (32, 16), "model.norm.weight": (16,)}

LLAMA_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "hidden_size": 16,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "model_type": "llama",
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "vocab_size": 32,
}
"""A Llama that transformers can really load once every tensor of LLAMA_QUANTIZED and LLAMA_PLAIN is there."""

_LAYER = "model.layers.0."
LLAMA_QUANTIZED: Shapes = {
    f"{_LAYER}self_attn.q_proj.weight": (16, 16),
    f"{_LAYER}self_attn.k_proj.weight": (8, 16),
    f"{_LAYER}self_attn.v_proj.weight": (8, 16),
    f"{_LAYER}self_attn.o_proj.weight": (16, 16),
    f"{_LAYER}mlp.gate_proj.weight": (24, 16),
    f"{_LAYER}mlp.up_proj.weight": (24, 16),
    f"{_LAYER}mlp.down_proj.weight": (16, 24),
}
LLAMA_PLAIN: Shapes = {
    "model.embed_tokens.weight": (32, 16),
    f"{_LAYER}input_layernorm.weight": (16,),
    f"{_LAYER}post_attention_layernorm.weight": (16,),
    "model.norm.weight": (16,),
    "lm_head.weight": (32, 16),
}


@dataclass
class Checkpoint:
    """A checkpoint in memory. Change any field, then `write` it.

    Attributes:
        tensors: stored tensors by name, companions included.
        placement: tensor name -> shard file name.
        weights: what the manifest says about the model's weights.
        config: content of config.json.
        carried: further files by relative name.
        has_manifest: whether `write` makes qlf.json.
        header_hashed: shards that qlf.json lists with header_sha256 instead of sha256.
        path: where `write` put it last.
    """

    recipe: Recipe
    tensors: dict[str, Tensor]
    placement: dict[str, str]
    weights: list[WeightEntry]
    config: dict[str, Any]
    skip: tuple[str, ...] = ()
    source: Source = field(default_factory=Source)
    carried: dict[str, bytes] = field(default_factory=dict)
    has_manifest: bool = True
    header_hashed: tuple[str, ...] = ()
    path: Path = Path()

    def write(self, path: Path) -> Path:
        """Write every file of the checkpoint into the directory `path`, which is created."""
        path.mkdir(parents=True, exist_ok=True)
        shards = sorted(set(self.placement.values()))
        for shard in shards:
            here = {name: self.tensors[name] for name in self.tensors if self.placement[name] == shard}
            (path / shard).write_bytes(shard_bytes(here))
        if shards != [SINGLE]:
            total = sum(len(tensor.data) for tensor in self.tensors.values())
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(self.placement.items()))}
            (path / INDEX).write_bytes(json_bytes(index))
        (path / "config.json").write_bytes(json_bytes(self.config))
        for name, data in self.carried.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
        if self.has_manifest:
            (path / "qlf.json").write_bytes(self.manifest(path).to_json())
        self.path = path
        return path

    def manifest(self, path: Path) -> Manifest:
        """The manifest of this checkpoint, whose files are already in `path`."""
        rows = sorted(
            (name, tensor.dtype, tensor.shape, hashlib.sha256(tensor.data).hexdigest())
            for name, tensor in self.tensors.items()
        )
        return Manifest(
            writer=WRITER,
            source=self.source,
            recipe=self.recipe,
            skip=self.skip,
            tensors=tuple(TensorEntry(n, d, s, self.placement[n], h) for n, d, s, h in rows),
            weights=tuple(sorted([*self.weights, *self._unlisted()], key=lambda weight: weight.name)),
            files=file_entries(path, self.header_hashed),
            fingerprint=fingerprint(rows),
        )

    def _unlisted(self) -> list[WeightEntry]:
        """Entries for tensors that were added by hand and are no companions."""
        listed = {weight.name for weight in self.weights}
        return [
            WeightEntry(name, "none", TORCH_NAMES[tensor.dtype], tensor.shape, "not-linear")
            for name, tensor in self.tensors.items()
            if name not in listed and not split_companion(name) and tensor.dtype in TORCH_NAMES
        ]


def build_checkpoint(path: Path, **options: Any) -> Checkpoint:
    """`make_checkpoint(**options)`, written to the directory `path`."""
    checkpoint = make_checkpoint(**options)
    checkpoint.write(path)
    return checkpoint


def make_checkpoint(
    *,
    quantized: Shapes = DEFAULT_QUANTIZED,
    plain: Shapes = DEFAULT_PLAIN,
    recipe: Recipe | None = None,
    dtype: str = "bfloat16",
    values: Mapping[str, F32] | None = None,
    shards: int = 1,
    manifest: bool = True,
    skip_modules: Iterable[str] = ("lm_head",),
    carried: Mapping[str, bytes] | None = None,
) -> Checkpoint:
    """A sound checkpoint in memory.

    Args:
        quantized, plain: name -> shape of the weights to quantize and to store as they are.
        recipe: NF4, blocksize 64, double quantization unless given.
        dtype: source dtype of every weight, a torch name.
        values: name -> float32 elements; weights not named here get `example_values`.
        shards: how many files; weights go round robin in name order.
        skip_modules: llm_int8_skip_modules.
        carried: further files, relative name -> bytes.
    """
    recipe = recipe or Recipe()
    tensors: dict[str, Tensor] = {}
    placement: dict[str, str] = {}
    weights: list[WeightEntry] = []
    names = sorted([*quantized, *plain])
    for position, name in enumerate(names):
        shape = quantized[name] if name in quantized else plain[name]
        elements = values[name] if values and name in values else example_values(name, shape)
        stored, entry = (
            quantized_weight(name, elements, shape, recipe, dtype)
            if name in quantized
            else plain_weight(name, elements, shape, dtype)
        )
        tensors.update(stored)
        weights.append(entry)
        placement.update(dict.fromkeys(stored, shard_name(position % shards, shards)))
    config = {**LLAMA_CONFIG, "dtype": dtype, "quantization_config": quantization_config(recipe, skip_modules)}
    return Checkpoint(recipe, tensors, placement, weights, config, carried=dict(carried or {}), has_manifest=manifest)


def build_source(
    path: Path,
    *,
    weights: Shapes | None = None,
    dtype: str = "bfloat16",
    values: Mapping[str, F32] | None = None,
    shards: int = 1,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Write a 16- or 32-bit source repository: by default the tiny Llama, with the values of `make_checkpoint`."""
    weights = weights or {**LLAMA_QUANTIZED, **LLAMA_PLAIN}
    path.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for name, shape in weights.items():
        elements = values[name] if values and name in values else example_values(name, shape)
        tensors.update(plain_weight(name, elements, shape, dtype)[0])
    placement = {name: shard_name(i % shards, shards) for i, name in enumerate(sorted(tensors))}
    for shard in sorted(set(placement.values())):
        here = {name: tensor for name, tensor in tensors.items() if placement[name] == shard}
        (path / shard).write_bytes(shard_bytes(here))
    if shards > 1:
        total = sum(len(tensor.data) for tensor in tensors.values())
        (path / INDEX).write_bytes(json_bytes({"metadata": {"total_size": total}, "weight_map": placement}))
    (path / "config.json").write_bytes(json_bytes(config or {**LLAMA_CONFIG, "dtype": dtype}))
    return path


def example_values(name: str, shape: tuple[int, ...], scale: float = 0.05) -> F32:
    """Bell-shaped float32 values that depend on the name only, the same on every machine and NumPy version."""
    source = random.Random(name)
    count = math.prod(shape)
    # Sums of four uniform numbers are exact in float64; a normal sampler would use libm, which differs by platform.
    sums = [source.random() + source.random() + source.random() + source.random() - 2.0 for _ in range(count)]
    return (np.array(sums, dtype=np.float64) * scale).astype(np.float32)


def source_bits(values: F32, dtype: str) -> bytes:
    """Little-endian bytes of values rounded to the source dtype."""
    return reference.from_float32(values, dtype).tobytes()


def plain_weight(name: str, values: F32, shape: tuple[int, ...], dtype: str) -> tuple[dict[str, Tensor], WeightEntry]:
    """A weight stored as it was."""
    tensor = Tensor(SAFETENSORS_DTYPES[dtype], shape, source_bits(values, dtype))
    module = name.removesuffix(".weight").rpartition(".")[2]
    reason = {"embed_tokens": "embedding", "lm_head": "output-embedding"}.get(module, "norm")
    return {name: tensor}, WeightEntry(name, "none", dtype, shape, reason)


def quantized_weight(
    name: str, values: F32, shape: tuple[int, ...], recipe: Recipe, dtype: str
) -> tuple[dict[str, Tensor], WeightEntry]:
    """A quantized weight with its companions, by the reference encoder."""
    exact = reference.to_float32(reference.from_float32(values, dtype), dtype)
    packed, absmax = reference.quantize(exact, recipe.quant_type, recipe.blocksize)
    parts: dict[str, npt.NDArray[np.generic]] = {"": packed, ".absmax": absmax}
    parts[".quant_map"] = CODEBOOKS[recipe.quant_type].values
    offset, decoded = None, absmax
    if recipe.double_quant:
        codes, nested, mean = reference.double_quantize(absmax)
        offset, decoded = float(mean), reference.double_dequantize(codes, nested, mean)
        parts.update({".absmax": codes, ".nested_absmax": nested, ".nested_quant_map": DYNAMIC8})
    state = QuantState(recipe.quant_type, recipe.blocksize, dtype, shape, offset)
    parts[f".quant_state.bitsandbytes__{recipe.quant_type}"] = np.frombuffer(state.to_json(), dtype=np.uint8)
    tensors = {}
    for suffix, array in parts.items():
        stored_shape = (array.size, 1) if suffix == "" else (array.size,)
        tensors[name + suffix] = Tensor("F32" if array.dtype == np.float32 else "U8", stored_shape, array.tobytes())
    moments = reference.block_moments(exact, packed, recipe.quant_type, recipe.blocksize)
    error, signal = reference.squared_error(decoded, moments)
    figures = (math.sqrt(max(error, 0.0) / exact.size), math.sqrt(max(error, 0.0) / signal) if signal else 0.0)
    rms, relative = (float(f"{figure:.6g}") for figure in figures)
    return tensors, WeightEntry(name, recipe.quant_type, dtype, shape, "linear", False, rms, relative)


def quantization_config(recipe: Recipe, skip_modules: Iterable[str]) -> dict[str, Any]:
    """The quantization_config that belongs to a recipe."""
    return {
        "bnb_4bit_compute_dtype": recipe.compute_dtype,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": recipe.quant_type,
        "bnb_4bit_use_double_quant": recipe.double_quant,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": list(skip_modules),
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }


def file_entries(path: Path, header_hashed: Iterable[str] = ()) -> tuple[FileEntry, ...]:
    """Every file below `path` but qlf.json, sorted by name; those of `header_hashed` with a hash of their header."""
    names = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())
    contents = {name: (path / name).read_bytes() for name in names if name != "qlf.json"}
    return tuple(
        FileEntry(name, len(data), None, header_digest(data))
        if name in header_hashed
        else FileEntry(name, len(data), hashlib.sha256(data).hexdigest())
        for name, data in contents.items()
    )


def header_digest(shard: bytes) -> str:
    """The header_sha256 of a safetensors file."""
    return hashlib.sha256(shard[: 8 + int.from_bytes(shard[:8], "little")]).hexdigest()


def reseal(path: Path, *, tensors: bool = True) -> None:
    """Make qlf.json agree with the files again after they were changed.

    Args:
        path: the checkpoint.
        tensors: also list the tensors again; the shards must be readable then. False updates the files only.
    """

    def change(root: dict[str, Any]) -> None:
        root["files"] = [{"name": e.name, "size": e.size, "sha256": e.sha256} for e in file_entries(path)]
        if not tensors:
            return
        rows = []
        for shard in sorted(path.glob("*.safetensors")):
            for name, tensor in read_tensors(shard).items():
                digest = hashlib.sha256(tensor.data).hexdigest()
                rows.append(TensorEntry(name, tensor.dtype, tensor.shape, shard.name, digest))
        rows.sort(key=lambda entry: entry.name)
        root["tensors"] = [asdict(entry) for entry in rows]
        root["fingerprint"] = fingerprint((row.name, row.dtype, row.shape, row.sha256) for row in rows)

    edit_json(path / "qlf.json", change)
