"""A small model, its 4-bit checkpoint, its dequantized twin, and adapters that peft made for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from qlformat import convert, export
from tests.sources import CONFIG, write_source

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

MakeAdapter = Callable[..., Path]


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Give every trainable parameter values that are not its first ones."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)


def save_adapter(model_path: Path, out: Path, seed: int = 1, **options: Any) -> Path:
    """An adapter as peft saves it, trained by nobody."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    given = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **options}
    config = peft.LoraConfig(**given)
    adapted = peft.get_peft_model(model, config)
    randomize(adapted, seed)
    adapted.save_pretrained(str(out))
    return out


def peft_merged(model_path: Path, *adapters: Path) -> dict[str, torch.Tensor]:
    """The state of the model after peft merged the adapters into it, one after the other."""
    model = transformers.AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    for adapter in adapters:
        model = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def live_logits(model_path: Path, adapter: Path | None = None) -> torch.Tensor:
    """What the model answers to some tokens."""
    model = transformers.AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter)
    with torch.inference_mode():
        return model.eval()(torch.arange(1, 33)[None]).logits


@pytest.fixture(scope="session")
def small_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny bfloat16 Llama, in two files."""
    return write_source(tmp_path_factory.mktemp("merge") / "source", dtype="bfloat16", shards=2)


@pytest.fixture(scope="session")
def small_base(small_source: Path) -> Path:
    """Its 4-bit checkpoint."""
    out = small_source.parent / "nf4"
    convert(small_source, out)
    return out


@pytest.fixture(scope="session")
def exact_base(small_base: Path) -> Path:
    """The 4-bit checkpoint, decoded to float32."""
    out = small_base.parent / "float32"
    export(small_base, out, dtype="float32")
    return out


@pytest.fixture
def make_adapter(exact_base: Path, tmp_path: Path) -> MakeAdapter:
    """make_adapter("name", seed=1, r=4, ...): an adapter for the small model."""

    def make(name: str = "adapter", *, model: Path = exact_base, seed: int = 1, **options: Any) -> Path:
        return save_adapter(model, tmp_path / name, seed, **options)

    return make


@pytest.fixture
def tied_source(tmp_path: Path) -> Path:
    """A small float32 Llama whose output embedding is its input embedding."""
    return write_source(tmp_path / "tied", dtype="float32", config={**CONFIG, "tie_word_embeddings": True})


def edit_config(adapter: Path, **changes: Any) -> None:
    """Change keys of adapter_config.json."""
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
