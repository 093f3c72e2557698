"""The plan of a conversion: what happens to each tensor, and where its bytes go. Only headers are read for it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from qlformat import __version__
from qlformat.errors import SourceError
from qlformat.layout import SOURCE_DTYPES, QuantState, Recipe, element_count, quant_state_name
from qlformat.selection import WITHOUT_MATRIX, Selection, select
from qlformat.shards import TORCH_NAMES, TensorSpec
from qlformat.source import TORCH_DTYPES, Source, SourceTensor

_OFFSET_DIGITS = 24
"""Longest text of a float32 value printed as a double, such as -1.1754943508222875e-38."""
_PLAIN_DTYPES = {dtype for dtype in TORCH_NAMES if not dtype.startswith(("F8", "C"))}


@dataclass(frozen=True, slots=True)
class Item:
    """One weight of the source and what is written for it.

    Attributes:
        tensor: where it is read from.
        reason: key of selection.py.
        state: quant_state without its nested_offset when the weight is quantized, else None.
        transpose: the source stores [in, out].
        shard: index of the output shard.
        specs: the stored tensors.
    """

    tensor: SourceTensor
    reason: str
    state: QuantState | None
    transpose: bool
    shard: int
    specs: tuple[TensorSpec, ...]

    @property
    def name(self) -> str:
        """Name of the weight."""
        return self.tensor.name

    @property
    def elements(self) -> int:
        """Element count of the weight."""
        return element_count(self.tensor.shape)


@dataclass(frozen=True)
class Plan:
    """Everything about the output but its bytes.

    Attributes:
        recipe: how weights are quantized.
        skip: the user's patterns.
        selection: the decisions and their reasons.
        items: one per tensor of the source, in the order of the source's files.
        shard_names: output files.
    """

    recipe: Recipe
    skip: tuple[str, ...]
    selection: Selection
    items: tuple[Item, ...]
    shard_names: tuple[str, ...]

    def shard_specs(self, shard: int) -> list[TensorSpec]:
        """The stored tensors of one shard."""
        return [spec for item in self.items if item.shard == shard for spec in item.specs]

    def key(self, source: Source) -> str:
        """Identity of this plan and of the source's files, by which --resume knows its own work again."""
        files = []
        for name, path in source.files:
            status = path.stat()
            files.append([name, status.st_size, status.st_mtime_ns])
        items = [
            [item.name, item.tensor.dtype, item.shard, item.transpose, item.state is not None] for item in self.items
        ]
        parts = [__version__, files, asdict(self.recipe), self.skip, self.shard_names, items, source.config]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @property
    def output_bytes(self) -> int:
        """Upper bound of the size of all shards, without their headers."""
        return sum(spec.nbytes for item in self.items for spec in item.specs)


def make_plan(source: Source, recipe: Recipe, skip: Sequence[str], shard_size: int) -> Plan:
    """Decide for every tensor and check all of them before anything is written.

    Raises:
        SourceError: E2 or E3 when a tensor cannot be stored; a weight has no elements or no dimensions; or nothing is
            left to quantize.
    """
    shapes = {name: tensor.shape for name, tensor in source.tensors.items()}
    selection = select(source.config, shapes, skip)
    items = [_item(tensor, selection, recipe) for tensor in source.tensors.values()]
    if not any(item.state for item in items):
        reasons = sorted({item.reason for item in items})
        raise SourceError(
            f"found no weight to quantize among {len(items)} tensors (reasons: {', '.join(reasons) or 'none'}); "
            "is this a language model with linear layers?"
        )
    placed, count = _place(items, shard_size)
    return Plan(recipe, tuple(skip), selection, tuple(placed), shard_names(count))


def shard_names(count: int) -> tuple[str, ...]:
    """The names that transformers gives to the files of a model."""
    if count == 1:
        return ("model.safetensors",)
    return tuple(f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count))


def _item(tensor: SourceTensor, selection: Selection, recipe: Recipe) -> Item:
    decision = selection.decisions[tensor.name]
    if tensor.dtype not in _PLAIN_DTYPES:
        raise SourceError(
            f"found dtype {tensor.dtype}: the model is quantized already; give the 16-bit model",
            rule="E3", tensor=tensor.name, file=tensor.file,
        )  # fmt: skip
    if decision.reason in WITHOUT_MATRIX and tensor.name.endswith(".weight"):
        raise SourceError(
            f"found the shape {list(tensor.shape)}, needed a weight with elements; a checkpoint saved from parts on "
            "several devices (DeepSpeed ZeRO-3, FSDP) may lack them: gather them before saving, or leave this one as "
            f"it is with --skip {tensor.name}",
            tensor=tensor.name, file=tensor.file,
        )  # fmt: skip
    if not decision.quantize:
        spec = TensorSpec(tensor.name, tensor.dtype, tensor.shape)
        return Item(tensor, decision.reason, None, decision.transpose, 0, (spec,))
    dtype = TORCH_DTYPES.get(tensor.dtype)
    if dtype is None:
        raise SourceError(
            f"found dtype {tensor.dtype}, needed F32, F16 or BF16 for a weight to be quantized; "
            f"convert it, or leave it out with --skip {tensor.name}",
            rule="E3", tensor=tensor.name, file=tensor.file,
        )  # fmt: skip
    shape = tuple(reversed(tensor.shape)) if decision.transpose else tensor.shape
    state = QuantState(recipe.quant_type, recipe.blocksize, dtype, shape, 0.0 if recipe.double_quant else None)
    return Item(tensor, decision.reason, state, decision.transpose, 0, _stored(tensor.name, state))


def _stored(weight: str, state: QuantState) -> tuple[TensorSpec, ...]:
    late = quant_state_name(weight, state.quant_type)
    slack = _OFFSET_DIGITS if state.nested else 0
    return tuple(
        TensorSpec(name, dtype, (shape[0] + slack,) if name == late else shape, name == weight, name == late)
        for name, (dtype, shape) in state.tensor_specs(weight).items()
    )


def _place(items: Iterable[Item], shard_size: int) -> tuple[list[Item], int]:
    """Fill shards in natural order of the names, so that the result does not depend on the source's own files."""
    shard_of: dict[str, int] = {}
    shard, used = 0, 0
    items = list(items)
    for item in sorted(items, key=lambda item: natural_key(item.name)):
        size = sum(spec.nbytes for spec in item.specs)
        if used and used + size > shard_size:
            shard, used = shard + 1, 0
        shard_of[item.name] = shard
        used += size
    return [replace(item, shard=shard_of[item.name]) for item in items], shard + 1


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sort key that puts layers.2 before layers.10."""
    parts = re.split(r"([0-9]+)", name)  # every second part is a number
    return [(0, int(part), part) if i % 2 else (1, 0, part) for i, part in enumerate(parts) if part]


def output_config(config: dict[str, Any], plan: Plan) -> bytes:
    """The bytes of config.json: the source's, with the quantization_config that readers of bitsandbytes expect."""
    recipe = plan.recipe
    written = {key: value for key, value in config.items() if key != "quantization_config"}
    if not written.get("dtype") and not written.get("torch_dtype"):
        # Without it readers take the dtype of the first float tensor, which may be an absmax in float32.
        dtypes = [item.state.dtype for item in plan.items if item.state]
        written["dtype"] = max(sorted(set(dtypes)), key=dtypes.count)
    written["quantization_config"] = {
        "bnb_4bit_compute_dtype": recipe.compute_dtype,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": recipe.quant_type,
        "bnb_4bit_use_double_quant": recipe.double_quant,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": plan.selection.skip_modules,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }
    return (json.dumps(written, indent=2) + "\n").encode()


def with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The config with its dtype keys set, those of nested configs too."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if key in ("dtype", "torch_dtype"):
            found[key] = dtype if value is None or value in SOURCE_DTYPES else value
        else:
            found[key] = with_dtype(value, dtype) if isinstance(value, dict) and key.endswith("_config") else value
    return found
