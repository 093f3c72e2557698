"""Several adapters as one (`qlf merge --to adapter`): no base is read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qlformat import __version__
from qlformat.adapter import CONFIG_NAME, WEIGHTS_NAME, AdapterManifest, file_entries
from qlformat.errors import QlfError
from qlformat.manifest import FILE_NAME as MANIFEST_NAME
from qlformat.merge.adapter_files import AdapterFiles, config_json
from qlformat.merge.combining import SPARSE, Method, Part, concatenated, truncated, truncated_matrix
from qlformat.shards import ShardWriter, TensorSpec

F32 = npt.NDArray[np.float32]

_PAIR = re.compile(r"(.+)\.lora_(A|B)(\.weight)")
_EMBEDDING = re.compile(r"(.+)\.lora_embedding_(A|B)()")


def write(
    adapters: Sequence[AdapterFiles], directory: Path, method: Method, extra: Mapping[str, Any]
) -> tuple[int, float]:
    """Combine adapters into one in `directory`.

    cat keeps the ranks of all, and is exact. The other methods give the best approximation of `method.rank` (the
    largest rank of a part by default): an SVD of the sum, or of what the method makes of the task tensors.

    Args:
        adapters: of plain LoRA pairs only.
        directory: exists.
        method: how to combine; "linear" is the weighted sum.
        extra: further fields of its qlf.json.

    Returns:
        (rank, largest relative error of a module's delta).

    Raises:
        QlfError: an adapter holds more than LoRA pairs, a module's shapes differ, or the pins do.
    """
    modules = _modules(adapters)
    ranks = {name: _rank(parts, method) for name, parts in modules.items()}
    top = max(ranks.values())
    tensors: dict[str, F32] = {}
    worst = 0.0
    for (module, kind), parts in modules.items():
        left, right, error = _combine(module, parts, method, ranks[module, kind])
        worst = max(worst, error)
        suffix = ".weight" if kind == "" else ""
        tensors[f"{module}.lora_{kind}A{suffix}"] = _padded(right, top, 0)
        tensors[f"{module}.lora_{kind}B{suffix}"] = _padded(left, top, 1)
    _write_tensors(directory / WEIGHTS_NAME, tensors)
    (directory / CONFIG_NAME).write_bytes(config_json(_config(adapters, top)))
    pins = [adapter.pin for adapter in adapters if adapter.pin is not None]
    if pins and len(pins) == len(adapters):
        manifest = AdapterManifest(f"qlformat {__version__}", pins[0], files=file_entries(directory))
        (directory / MANIFEST_NAME).write_bytes(manifest.to_json(extra))
    return top, worst


def _modules(adapters: Sequence[AdapterFiles]) -> dict[tuple[str, str], list[Part]]:
    found: dict[tuple[str, str], list[Part]] = {}
    for adapter in adapters:
        pairs: dict[tuple[str, str], dict[str, str]] = {}
        for name in adapter.tensors:
            hit = _PAIR.fullmatch(name) or _EMBEDDING.fullmatch(name)
            if hit is None:
                raise QlfError(
                    f"the adapter {adapter.name} holds more than LoRA pairs, which cannot be combined into an adapter; "
                    "merge it into its base",
                    tensor=name,
                )
            pairs.setdefault((hit[1], "" if hit[3] else "embedding_"), {})[hit[2]] = name
        for key, pair in pairs.items():
            if len(pair) != 2:
                raise QlfError(f"the other half of this pair is missing in {adapter.name}", tensor=key[0])
            left, right = adapter.read(pair["B"]), adapter.read(pair["A"])
            if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0]:
                raise QlfError(f"found shapes {list(right.shape)} and {list(left.shape)}, needed a pair", tensor=key[0])
            module = key[0].removeprefix("base_model.model.")
            found.setdefault(key, []).append(Part(left, right, adapter.rank(module, left.shape[1]), adapter.weight))
    for (module, _), parts in found.items():
        if len({(part.left.shape[0], part.right.shape[1]) for part in parts}) != 1:
            raise QlfError("the adapters have different shapes here: they are of different models", tensor=module)
    return found


def _rank(parts: Sequence[Part], method: Method) -> int:
    if method.name == "cat":
        return sum(part.left.shape[1] for part in parts)
    return method.rank or max(part.left.shape[1] for part in parts)


def _combine(module: str, parts: Sequence[Part], method: Method, rank: int) -> tuple[F32, F32, float]:
    """(B, A, relative error of the product)."""
    if method.name in SPARSE:
        whole = method.combine(module, parts)
        left, right = truncated_matrix(whole, rank)
        size = float(np.linalg.norm(whole))
        return left, right, float(np.linalg.norm(left @ right - whole)) / size if size else 0.0
    if method.name == "cat" or sum(part.left.shape[1] for part in parts) <= rank:
        left, right = concatenated(parts)
        return left, right, 0.0
    left, right = truncated(parts, rank)
    kept, size = _norm(left, right), _norm(*concatenated(parts))
    return left, right, float(np.sqrt(max(size**2 - kept**2, 0.0)) / size) if size else 0.0


def _norm(left: F32, right: F32) -> float:
    """Frobenius norm of left @ right, without making it."""
    a, b = left.astype(np.float64), right.astype(np.float64)
    return float(np.sqrt(max(float(np.sum((a.T @ a) * (b @ b.T))), 0.0)))


def _padded(matrix: F32, rank: int, axis: int) -> F32:
    """Zeros to the common rank: they add nothing."""
    missing = rank - matrix.shape[axis]
    widths = [(0, missing if axis == dim else 0) for dim in (0, 1)]
    return np.ascontiguousarray(np.pad(matrix, widths)) if missing else np.ascontiguousarray(matrix)


def _config(adapters: Sequence[AdapterFiles], rank: int) -> dict[str, Any]:
    """The first adapter's configuration, for all modules and the new rank; the scale is 1, as peft sets it."""
    config = dict(adapters[0].config)
    targets = [adapter.config.get("target_modules") for adapter in adapters]
    if all(isinstance(target, list) for target in targets):
        config["target_modules"] = sorted({name for target in targets for name in target or ()})
    elif any(target != targets[0] for target in targets):
        raise QlfError("the adapters name their target modules by different patterns; merge them into their base")
    config |= {"r": rank, "lora_alpha": rank, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
    return config


def _write_tensors(path: Path, tensors: Mapping[str, F32]) -> None:
    writer = ShardWriter(path, [TensorSpec(name, "F32", value.shape) for name, value in tensors.items()])
    try:
        for name, value in tensors.items():
            writer.write(name, 0, value.data.cast("B"))
        writer.finish()
    finally:
        writer.close()
