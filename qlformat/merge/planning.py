"""The plan of a merge: what each weight becomes and where its bytes go."""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qlformat import __version__
from qlformat.checkpoint import FLOAT_DTYPES
from qlformat.layout import Recipe, element_count
from qlformat.merge.base import Base
from qlformat.plan import Item, Plan, make_plan, natural_key, output_config, shard_names, with_dtype
from qlformat.shards import DTYPE_BITS, TORCH_NAMES, TensorInfo, TensorSpec
from qlformat.source import Source, SourceTensor, WeightFile

STORED = {torch_name: dtype for dtype, torch_name in TORCH_NAMES.items()}


@dataclass(frozen=True)
class MergePlan:
    """Everything about the output but its bytes.

    Attributes:
        items: one per weight; that of a weight to be quantized has a quant_state and is read as float32.
        dtypes: weight -> the torch name of the dtype it has, or decodes to.
        shard_names: output files.
        config: bytes of config.json.
        quantized: the plan of the conversion, when the output is in 4 bits.
    """

    items: tuple[Item, ...]
    dtypes: Mapping[str, str]
    shard_names: tuple[str, ...]
    config: bytes
    quantized: Plan | None

    def shard_specs(self, shard: int) -> list[TensorSpec]:
        """The stored tensors of one shard."""
        return [spec for item in self.items if item.shard == shard for spec in item.specs]

    @property
    def output_bytes(self) -> int:
        """Upper bound of the size of all shards."""
        return sum(spec.nbytes for item in self.items for spec in item.specs)

    def key(self, identity: Mapping[str, Any]) -> str:
        """What --resume knows its own work by: the plan, and the `identity` of everything that goes into it."""
        items = [[item.name, item.tensor.dtype, item.shard, item.state is not None] for item in self.items]
        parts = [__version__, dict(identity), list(self.shard_names), items, self.config.decode()]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def plan_plain(base: Base, dtype: str, shard_size: int, reader: WeightFile) -> MergePlan:
    """All floating-point weights in `dtype`; integers and bools stay."""
    dtypes = {name: dtype if weight.dtype in FLOAT_DTYPES else weight.dtype for name, weight in base.weights.items()}
    items = []
    for name, weight in base.weights.items():
        tensor = _tensor(name, STORED[dtypes[name]], weight.shape, reader)
        items.append(Item(tensor, "", None, False, 0, (TensorSpec(name, tensor.dtype, tensor.shape),)))
    placed, names = _place(items, shard_size)
    config = dict(base.config)
    if not {"dtype", "torch_dtype"} & config.keys():
        config["dtype"] = dtype
    return MergePlan(placed, dtypes, names, (json.dumps(with_dtype(config, dtype), indent=2) + "\n").encode(), None)


def plan_quantized(base: Base, recipe: Recipe, shard_size: int, reader: WeightFile, like: Base) -> MergePlan:
    """The weights in 4 bits that `like` has so, or that a conversion of it would quantize; the others keep their dtype.

    `like` is `base` itself, or the 4-bit base of which `base` is the source.
    """
    dtypes = {name: weight.dtype for name, weight in base.weights.items()}
    merged = Source(base.path, base.repo_id, base.revision)
    merged.config = dict(base.config)
    merged.tensors = {
        name: _tensor(name, STORED[weight.dtype], weight.shape, reader) for name, weight in base.weights.items()
    }
    plan = make_plan(merged, recipe, (), shard_size)
    if like.recipe is not None:  # a user's --skip is in its choice
        others = [item.name for item in plan.items if item.state and not like.weights[item.name].quantized]
        if others:
            plan = make_plan(merged, recipe, [glob.escape(name) for name in others], shard_size)
    items = [
        replace(item, tensor=_tensor(item.name, "F32", item.tensor.shape, reader)) if item.state else item
        for item in plan.items
    ]
    return MergePlan(tuple(items), dtypes, plan.shard_names, output_config(merged.config, plan), plan)


def identity_of(paths: Iterable[Path]) -> list[list[Any]]:
    """Name, size and time of change of files: what stands for their content in the key of a resume."""
    return [[path.name, status.st_size, status.st_mtime_ns] for path in paths for status in (path.stat(),)]


def _tensor(name: str, dtype: str, shape: tuple[int, ...], reader: WeightFile) -> SourceTensor:
    size = element_count(shape) * DTYPE_BITS[dtype] // 8
    return SourceTensor(TensorInfo(name, dtype, shape, 0, size), "the merged model", reader)


def _place(items: Sequence[Item], shard_size: int) -> tuple[tuple[Item, ...], tuple[str, ...]]:
    """Fill shards in natural order of the names; a weight larger than a shard has its own."""
    home: dict[str, int] = {}
    shard, used = 0, 0
    for item in sorted(items, key=lambda item: natural_key(item.name)):
        size = item.specs[0].nbytes
        if used and used + size > shard_size:
            shard, used = shard + 1, 0
        home[item.name] = shard
        used += size
    return tuple(replace(item, shard=home[item.name]) for item in items), shard_names(shard + 1)
