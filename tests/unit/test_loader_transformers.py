"""Loaded state dicts against what transformers and bitsandbytes decode from the same repositories."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
import transformers

import qlformat
from qlformat.layout import Recipe
from tests.sources import write_source


def dequantized(path: Path, dtype: torch.dtype) -> dict[str, Any]:
    """The state dict of the model that transformers loads in 4 bits and bitsandbytes decodes."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    found: dict[str, Any] = model.dequantize(dtype=dtype).state_dict()
    return found


@pytest.mark.parametrize(
    ("recipe", "shard_size", "threads"),
    [(Recipe(), 30_000_000, 2), (Recipe(double_quant=False), 5_000_000_000, 1), (Recipe("fp4"), 5_000_000_000, 2)],
)
def test_smollm2(smollm2_dir: Path, tmp_path: Path, recipe: Recipe, shard_size: int, threads: int) -> None:
    qlformat.convert(smollm2_dir, tmp_path / "out", recipe=recipe, shard_size=shard_size)
    found = qlformat.load_state_dict(tmp_path / "out", dtype=torch.float16, threads=threads)
    needed = dequantized(tmp_path / "out", torch.float16)
    assert found.keys() == needed.keys() - {"lm_head.weight"}  # tied to the embedding
    for name, tensor in found.items():
        assert tensor.dtype == torch.float16
        assert torch.equal(tensor, needed[name]), name
    config = transformers.AutoConfig.from_pretrained(smollm2_dir)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    outcome = model.load_state_dict(found, strict=False, assign=True)
    assert (outcome.missing_keys, outcome.unexpected_keys) == (["lm_head.weight"], [])


def test_gpt2_loads_into_the_plain_model(tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=64, n_embd=64, n_layer=2, n_head=4, n_positions=32)
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).to(torch.bfloat16).save_pretrained(tmp_path / "source")
    qlformat.convert(tmp_path / "source", tmp_path / "out")
    found = qlformat.load_state_dict(tmp_path / "out")
    model = transformers.GPT2LMHeadModel(config).to(torch.bfloat16)
    keys = {name if name.startswith("transformer.") else f"transformer.{name}": value for name, value in found.items()}
    outcome = model.load_state_dict(keys, strict=False)  # a Conv1D of another shape would raise
    assert (outcome.missing_keys, outcome.unexpected_keys) == (["lm_head.weight"], [])
    needed = dequantized(tmp_path / "out", torch.bfloat16)
    for name, tensor in keys.items():
        # bitsandbytes leaves a dequantized Conv1D as a Linear, [out, in].
        turned = tensor.dim() == 2 and ".c_" in name
        assert torch.equal(tensor.T if turned else tensor, needed[name]), name


def test_a_repository_that_bitsandbytes_wrote(tmp_path: Path) -> None:
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        write_source(tmp_path / "source", dtype="bfloat16"), quantization_config=quantization, dtype=torch.bfloat16
    )
    model.save_pretrained(tmp_path / "theirs")
    assert not (tmp_path / "theirs" / "qlf.json").exists()
    found = qlformat.load_state_dict(tmp_path / "theirs")
    needed = dequantized(tmp_path / "theirs", torch.bfloat16)
    assert found.keys() == needed.keys()
    assert all(torch.equal(found[name], needed[name]) for name in needed)
