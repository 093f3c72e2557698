"""A peft adapter on disk: its configuration, checked for what can be merged, and its tensors, read one at a time."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qlformat import reference, repository
from qlformat.adapter import CONFIG_NAME, WEIGHTS_NAME, BasePin, read_pin
from qlformat.checkpoint import NUMPY_DTYPES
from qlformat.errors import FormatError, QlfError, shown
from qlformat.layout import strict_json
from qlformat.shards import ShardReader, TensorInfo
from qlformat.source import TORCH_DTYPES, WeightFile, cached_identity

F32 = npt.NDArray[np.float32]

TORCH_WEIGHTS_NAME = "adapter_model.bin"

UNSUPPORTED = {
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "layer_replication": "layer replication",
    "megatron_config": "Megatron layers",
    "monteclora_config": "Monte Carlo LoRA",
    "target_parameters": "LoRA on parameters (target_parameters)",
    "use_bdlora": "block-diagonal LoRA",
    "use_qalora": "QA-LoRA",
}
"""Keys of adapter_config.json that change the formula, and what they are called."""

_CHANGES_BASE = ("corda", "loftq", "lora_ga", "olora", "pissa")
"""Values of init_lora_weights with which peft trains on a base that it changed first."""


@dataclass(frozen=True)
class AdapterFiles:
    """An open adapter.

    Attributes:
        path: its directory.
        weight: factor of the user.
        config: content of adapter_config.json.
        pin: the base it belongs to, None for a plain peft adapter.
        tensors: by name, as in the file.
        sha256: of the weights file.
        config_sha256: of adapter_config.json.
        name: what it is called in messages and reports; see `told_apart`.
        repo_id, revision: Hub repository and commit of one in the Hub cache, or None.
    """

    path: Path
    weight: float
    config: Mapping[str, Any]
    pin: BasePin | None
    tensors: Mapping[str, TensorInfo]
    sha256: str
    config_sha256: str
    reader: WeightFile
    name: str
    repo_id: str | None = None
    revision: str | None = None

    def read(self, name: str) -> F32:
        """A tensor as float32, in its shape."""
        info = self.tensors[name]
        raw = np.empty(info.nbytes, dtype=np.uint8)
        self.reader.read_into(info, 0, raw.data)
        dtype = TORCH_DTYPES[info.dtype]
        return reference.to_float32(raw.view(NUMPY_DTYPES[dtype]), dtype).reshape(info.shape)

    def rank(self, module: str, found: int) -> float:
        """The scale of a module's product of rank `found` (peft's rank_pattern, alpha_pattern and use_rslora).

        Raises:
            QlfError: the configuration says another rank.
        """
        rank = _by_pattern(self.config.get("rank_pattern"), module, self.config.get("r"))
        alpha = _by_pattern(self.config.get("alpha_pattern"), module, self.config.get("lora_alpha"))
        if rank != found:
            raise QlfError(f"rank {found} is stored, {CONFIG_NAME} says {shown(rank)}", tensor=module)
        if type(alpha) not in (int, float) or not math.isfinite(alpha):
            raise QlfError(f"lora_alpha is {shown(alpha)}, needed a number", file=CONFIG_NAME)
        return float(alpha / math.sqrt(found) if self.config.get("use_rslora") else alpha / found)

    def close(self) -> None:
        """Close the file."""
        self.reader.close()


def open_adapter(path: Path, weight: float) -> AdapterFiles:
    """Open the adapter in a directory.

    Raises:
        QlfError: there is none, its kind cannot be merged, or a tensor holds NaN or infinity.
        FormatError: a file of it is damaged.
    """
    if not path.is_dir():
        found = "a file" if path.exists() else "nothing"
        raise QlfError(f"{path}: found {found}, needed the directory of a peft adapter")
    pin = read_pin(path)
    data = repository.read_file(path, CONFIG_NAME)
    config = _config(data, path)
    file = next((name for name in (WEIGHTS_NAME, TORCH_WEIGHTS_NAME) if (path / name).is_file()), None)
    if file is None:
        raise QlfError(f"{path}: found no {WEIGHTS_NAME}, needed the adapter's weights")
    resolved = repository.resolve_file(path, file)
    reader: WeightFile
    tensors: Mapping[str, TensorInfo]
    if file == WEIGHTS_NAME:
        shard = ShardReader(resolved, file)
        reader, tensors = shard, shard.header.tensors
    else:
        from qlformat.torch_file import TorchFile

        loaded = TorchFile(resolved, file)
        reader, tensors = loaded, loaded.tensors
    sha256 = hashlib.sha256()
    with resolved.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            sha256.update(chunk)
    repo_id, revision = cached_identity(path)
    adapter = AdapterFiles(
        path, weight, config, pin, tensors, sha256.hexdigest(), hashlib.sha256(data).hexdigest(), reader,
        repo_id or path.resolve().name, repo_id, revision,
    )  # fmt: skip
    try:
        _check_tensors(adapter)
    except BaseException:
        adapter.close()
        raise
    return adapter


def told_apart(adapters: Sequence[AdapterFiles]) -> list[AdapterFiles]:
    """The adapters, those with the same last part of the path called by as many parts as tell them apart.

    One of the Hub is called by its repository id, with the commit where another commit of it is among them.
    """
    paths = [_places(adapter) for adapter in adapters]
    names = []
    for adapter, own in zip(adapters, paths, strict=True):
        count = 1
        while count < len(own) and sum(other[-count:] == own[-count:] for other in paths) > 1:
            count += 1
        names.append("@".join(own[::-1][:count]) if adapter.repo_id else "/".join(own[-count:]))
    return [replace(adapter, name=name) for adapter, name in zip(adapters, names, strict=True)]


def _places(adapter: AdapterFiles) -> tuple[str, ...]:
    if adapter.repo_id and adapter.revision:
        return adapter.revision, adapter.repo_id
    return adapter.path.resolve().parts


def _config(data: bytes, path: Path) -> dict[str, Any]:
    try:
        config = strict_json(data)
    except ValueError as error:
        raise QlfError(f"not valid JSON: {error}", file=f"{path.name}/{CONFIG_NAME}") from None
    if not isinstance(config, dict):
        raise QlfError("found JSON that is not an object", file=f"{path.name}/{CONFIG_NAME}")
    kind = config.get("peft_type")
    if kind != "LORA":
        raise QlfError(
            f"{path}: found an adapter of type {shown(kind)}, needed LORA; merge it with peft's merge_and_unload"
        )
    for key, what in UNSUPPORTED.items():
        if config.get(key):
            raise QlfError(f"{path}: the adapter uses {what} ({key}), which cannot be merged here")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise QlfError(
            f"{path}: the adapter was made with init_lora_weights {start!r} on a base that peft changed first; save it "
            "with path_initial_model_for_weight_conversion and merge that"
        )
    return config


def _check_tensors(adapter: AdapterFiles) -> None:
    """Refuse an adapter without tensors, with unusual dtypes, or with values that are not finite."""
    if not adapter.tensors:
        raise QlfError(f"{adapter.path}: the adapter holds no tensor")
    for name, info in adapter.tensors.items():
        if info.dtype not in TORCH_DTYPES:
            raise QlfError(
                f"found dtype {info.dtype} in the adapter {adapter.name}, needed F32, F16 or BF16", tensor=name
            )
        if not np.isfinite(adapter.read(name)).all():
            raise QlfError(
                f"found NaN or infinity in the adapter {adapter.name}, needed finite values; train it again",
                tensor=name,
            )


def _by_pattern(patterns: object, module: str, default: Any) -> Any:
    """peft's get_pattern_key: the first pattern that matches the end of the module's name."""
    if not isinstance(patterns, dict):
        return default
    for pattern, value in patterns.items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error:
            raise FormatError(
                f"the pattern {shown(pattern)} is no regular expression", rule="M1", file=CONFIG_NAME
            ) from None
    return default


def config_json(config: Mapping[str, Any]) -> bytes:
    """The bytes of an adapter_config.json."""
    return (json.dumps(dict(config), indent=2, sort_keys=True) + "\n").encode()
