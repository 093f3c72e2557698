"""The base of a run: is it one to train on, and load it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlformat import adapter, manifest, remote, repository
from qlformat.checkpoint import Checkpoint
from qlformat.errors import QlfError
from qlformat.source import cached_identity

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Base:
    """A 4-bit checkpoint that was checked.

    Attributes:
        name: as the user gave it.
        directory: where its files are.
        fingerprint: of its tensors, computed from their bytes.
        recipe: how it was quantized, as qlf.json says; None for a plain bitsandbytes repository.
        params: weights of the model, 4-bit ones counted as what they stand for.
        modules: names of the modules with a weight; linears: last parts of the names of the quantized ones.
        context: the longest sequence that the model was made for, or None where config.json does not say.
        repo_id, revision: repository and commit on the Hub, or None.
        source: the Hub repository that it was converted from, or None.
    """

    name: str
    directory: Path
    fingerprint: str
    recipe: dict[str, Any] | None
    params: int
    modules: frozenset[str]
    linears: tuple[str, ...]
    context: int | None
    repo_id: str | None
    revision: str | None
    source: str | None = None


def open_base(name: str) -> Base:
    """Find a base and check that its bytes are what its manifest says.

    Raises:
        QlfError: no such directory or repository; an adapter, a 16-bit model, or a changed checkpoint.
        FormatError: the checkpoint breaks a rule.
    """
    directory = remote.local_directory(name)
    if (directory / adapter.CONFIG_NAME).is_file() and not (directory / "config.json").is_file():
        home = json.loads((directory / adapter.CONFIG_NAME).read_bytes()).get("base_model_name_or_path")
        raise QlfError(f"{name}: found an adapter, needed a base; its base is {home!r}")
    config = json.loads(repository.read_file(directory, "config.json"))
    if not isinstance(config, dict) or "quantization_config" not in config:
        dtype = config.get("dtype") or config.get("torch_dtype") if isinstance(config, dict) else None
        raise QlfError(
            f"{name}: found a model of {dtype or '16 or 32 bits'}, needed a 4-bit base; convert it first: "
            f"qlf convert {name} {Path(name).name}-nf4"
        )
    with Checkpoint(directory) as checkpoint:
        found = checkpoint.fingerprint()
        recorded = checkpoint.manifest
        if recorded is not None and recorded.fingerprint != found:
            raise QlfError(
                f"{name}: found the fingerprint {found}, its {manifest.FILE_NAME} records {recorded.fingerprint}: the "
                "weights were changed; fetch or convert it again (qlf verify says what differs)"
            )
        params = sum(weight.elements for weight in checkpoint.weights.values())
        modules = {name.removesuffix(".weight"): weight for name, weight in checkpoint.weights.items()}
        quantized = {name.rpartition(".")[2] for name, weight in modules.items() if weight.quant_state is not None}
        source = recorded.source.repo_id if recorded is not None else None
    text = config.get("text_config", config)
    repo_id, revision = cached_identity(directory)
    return Base(
        name, directory, found, _recipe(directory), params, frozenset(modules), tuple(sorted(quantized)),
        text.get("max_position_embeddings"), repo_id, revision, source,
    )  # fmt: skip


def check_fits(base: Base, seq_len: int, target: str | tuple[str, ...]) -> None:
    """Raise QlfError when sequences are longer than the model's context, or layers to adapt are not there."""
    if base.context is not None and seq_len > base.context:
        raise QlfError(
            f"seq_len is {seq_len}, the model's context is {base.context}; give --seq-len {base.context} or less"
        )
    if isinstance(target, str):
        return
    known = {part for name in base.modules for part in _endings(name)}
    unknown = [name for name in target if name not in known]
    if unknown:
        raise QlfError(
            f"found no layer {', '.join(unknown)} in the model; the linear layers are {', '.join(base.linears)}"
        )


def _endings(name: str) -> list[str]:
    """a.b.c -> a.b.c, b.c, c."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _recipe(directory: Path) -> dict[str, Any] | None:
    """The quantization recipe that qlf.json records."""
    path = directory / manifest.FILE_NAME
    if not path.is_file():
        return None
    recipe = json.loads(path.read_bytes()).get("recipe")
    return recipe if isinstance(recipe, dict) else None


def load_tokenizer(base: Base) -> Any:
    """The base's tokenizer, with a padding token.

    Raises:
        QlfError: the repository has none that transformers can read.
    """
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(base.directory)
    except (ValueError, OSError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise QlfError(f"{base.name}: found no tokenizer ({reason}); copy the model's tokenizer files there") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def load_for_training(base: Base, device: torch.device, dtype: torch.dtype, quant_storage: str = "uint8") -> Any:
    """The base as a frozen transformers model whose 4-bit layers compute in `dtype`.

    What is not quantized becomes `dtype` too: a graph with float16 in it fails under bfloat16 autocast on a CPU.
    `quant_storage` is what the packed weights are viewed as, see load_model.
    """
    import torch
    from bitsandbytes.nn.modules import Linear4bit

    from qlformat.model_loader import load_model

    model: Any = load_model(base.directory, device_map=str(device), dtype=dtype, quant_storage=quant_storage)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype = dtype
            module.compute_type_is_set = True
            # Where a CPU has AVX512-BF16, an evaluation would pack the weights for a product that has no gradient.
            module.support_avx512bf16_for_cpu = False
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if device.type == "cpu" and dtype == torch.float32:
        model.config.dtype = dtype
    model.config.use_cache = False
    return model
