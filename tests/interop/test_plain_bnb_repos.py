"""Repositories that transformers and bitsandbytes wrote themselves: opened, verified, summarized and exported.

The exports of our own checkpoints are compared with transformers here, too.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
import transformers

from qlformat.checkpoint import open_checkpoint
from qlformat.converter import convert
from qlformat.exporter import export
from qlformat.layout import Recipe
from qlformat.summary import summarize
from qlformat.verifier import verify
from tests import builders

TOKENS = torch.tensor([[1, 5, 9, 2, 30, 17, 8, 4]])


@dataclass(frozen=True)
class Repositories:
    """A 16-bit model and its 4-bit form, both saved by transformers, and the 4-bit form that qlformat makes."""

    source: Path
    plain: Path
    ours: Path


def llama() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def gpt2() -> Any:
    config = transformers.GPT2Config(
        vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    return transformers.GPT2LMHeadModel(config)


def save_both(model: Any, directory: Path, dtype: Any, quant_type: str, double_quant: bool) -> Repositories:
    source, plain, ours = directory / "source", directory / "plain", directory / "ours"
    model.to(dtype).save_pretrained(source)
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=double_quant
    )
    loaded = transformers.AutoModelForCausalLM.from_pretrained(source, quantization_config=quantization, dtype=dtype)
    loaded.save_pretrained(plain)
    convert(source, ours, recipe=Recipe(quant_type, double_quant=double_quant))
    return Repositories(source, plain, ours)


VARIANTS = [
    ("llama", "bfloat16", "nf4", True),
    ("llama", "float16", "fp4", True),
    ("llama", "float32", "nf4", False),
    ("gpt2", "float16", "nf4", True),
]


@pytest.fixture(scope="module", params=VARIANTS, ids=["-".join(map(str, v)) for v in VARIANTS])
def repositories(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Repositories:
    kind, dtype, quant_type, double_quant = request.param
    torch.manual_seed(0)
    model = {"llama": llama, "gpt2": gpt2}[kind]()
    return save_both(model, tmp_path_factory.mktemp(kind), getattr(torch, dtype), quant_type, double_quant)


def test_verify_has_notes_only(repositories: Repositories) -> None:
    found = verify(repositories.plain)
    assert {finding.severity for finding in found} == {"note"}
    assert any("could not be checked" in finding.message for finding in found)


def test_verify_with_the_source_has_notes_only(repositories: Repositories) -> None:
    found = verify(repositories.plain, repositories.source)
    assert [str(finding) for finding in found if finding.severity == "error"] == []


def test_a_changed_code_differs_from_the_source(repositories: Repositories, tmp_path: Path) -> None:
    for path in repositories.plain.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    header, _ = builders.read_container(tmp_path / "model.safetensors")
    name = next(key for key in header if f"{key}.quant_map" in header)
    with open_checkpoint(tmp_path) as checkpoint:
        reader = checkpoint.shards["model.safetensors"]
        position = reader.header.data_start + checkpoint.tensors[name].info.begin + 5
    builders.flip_bit(tmp_path / "model.safetensors", position, 4)
    found = [finding for finding in verify(tmp_path, repositories.source) if finding.severity == "error"]
    assert [(finding.rule, finding.tensor) for finding in found] == [("E5", name)]


def test_decoded_values_equal_bitsandbytes(repositories: Repositories) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(repositories.plain)
    modules = {name: module for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    assert modules
    with open_checkpoint(repositories.plain) as checkpoint:
        quantized = {name for name, weight in checkpoint.weights.items() if weight.quant_state}
        prefix = "" if next(iter(modules)) + ".weight" in quantized else "transformer."
        assert {f"{name}.weight".removeprefix(prefix) for name in modules} == quantized
        for name, module in modules.items():
            weight = module.weight
            state = weight.quant_state
            needed = bnb.functional.dequantize_4bit(weight.data, state)
            found = checkpoint.dequantize(f"{name}.weight".removeprefix(prefix))
            tensor = torch.from_numpy(found)
            tensor = tensor.view(torch.bfloat16) if found.dtype == np.uint16 else tensor
            assert tensor.shape == needed.shape
            assert torch.equal(tensor, needed)  # -0.0 equals 0.0: fp4 has both


@pytest.mark.parametrize("writer", ["plain", "ours"])
def test_export_loads_and_computes_the_same(repositories: Repositories, tmp_path: Path, writer: str) -> None:
    base = getattr(repositories, writer)
    dtype = json.loads((repositories.source / "config.json").read_text())["dtype"]
    report = export(base, tmp_path / "out", dtype=dtype, shard_size=60_000)
    assert len(report.files) > 1
    assert report.notes == ()
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert exported.dtype == getattr(torch, dtype)
    assert not hasattr(exported.config, "quantization_config")
    reference = transformers.AutoModelForCausalLM.from_pretrained(base)
    reference = reference.dequantize(dtype=getattr(torch, dtype))
    needed_state, found_state = reference.state_dict(), exported.state_dict()
    assert needed_state.keys() == found_state.keys()
    for name, needed in needed_state.items():
        found = found_state[name]
        # model.dequantize() leaves a Conv1D as a Linear, [out, in]; the export is a GPT-2 again.
        if found.dim() == 2 and "c_" in name:
            found = found.T
        assert found.dtype == needed.dtype
        assert torch.equal(found, needed), name
    with torch.no_grad():
        found_logits, needed_logits = exported(TOKENS).logits, reference(TOKENS).logits
    if exported.config.model_type == "gpt2":  # the same products, added in another order
        torch.testing.assert_close(found_logits, needed_logits, rtol=1e-3, atol=1e-4)
    else:
        assert torch.equal(found_logits, needed_logits)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_export_equals_dequantize_4bit_in_every_dtype(repositories: Repositories, tmp_path: Path, dtype: str) -> None:
    export(repositories.plain, tmp_path / "out", dtype=dtype)
    from safetensors.torch import load_file

    exported = load_file(tmp_path / "out" / "model.safetensors")
    stored = load_file(repositories.plain / "model.safetensors")
    names = {name.removesuffix(".quant_map") for name in stored if name.endswith(".weight.quant_map")}
    conv1d = json.loads((repositories.source / "config.json").read_text())["model_type"] == "gpt2"
    for name in names:
        parts = {key.removeprefix(f"{name}."): stored[key] for key in stored if key.startswith(f"{name}.")}
        state = bnb.functional.QuantState.from_dict(parts, device=torch.device("cpu"))
        state.dtype = getattr(torch, dtype)
        needed = bnb.functional.dequantize_4bit(stored[name], state)
        assert torch.equal(exported[name].T if conv1d else exported[name], needed)
    plain = {name for name in stored if name in exported and name not in names}
    assert plain == exported.keys() - names
    for name in plain:
        assert torch.equal(exported[name], stored[name].to(getattr(torch, dtype)))


def test_our_checkpoint_is_sound_and_has_the_weights_of_theirs(repositories: Repositories) -> None:
    assert verify(repositories.ours, repositories.source) == []
    with open_checkpoint(repositories.ours) as ours, open_checkpoint(repositories.plain) as plain:
        assert {w.name: (w.shape, w.transposed, w.quant_state is None) for w in ours.weights.values()} == {
            w.name: (w.shape, w.transposed, w.quant_state is None) for w in plain.weights.values()
        }


def test_summary(repositories: Repositories) -> None:
    found = summarize(repositories.plain)
    config = json.loads((repositories.plain / "config.json").read_text())
    assert found.format == "bitsandbytes 4-bit"
    assert found.recipe is not None
    assert found.recipe.quant_type == config["quantization_config"]["bnb_4bit_quant_type"]
    assert found.recipe.double_quant == config["quantization_config"]["bnb_4bit_use_double_quant"]
    before = summarize(repositories.source)
    assert (found.total_params, found.quantized_params) == (before.total_params, before.quantized_params)
    assert found.bits_per_weight == pytest.approx(4.5 if not found.recipe.double_quant else 4.127, abs=0.05)


@pytest.mark.parametrize("repositories", [variant for variant in VARIANTS if variant[3]], indirect=True)
def test_the_table_of_older_bitsandbytes(repositories: Repositories, tmp_path: Path) -> None:
    """Its CPU encoder overwrote entry 0 by -1.0; the table on disk is the one that bitsandbytes decodes with."""
    config = json.loads((repositories.plain / "config.json").read_text())
    from safetensors.torch import load_file, save_file

    stored = load_file(repositories.plain / "model.safetensors")
    names = [name.removesuffix(".nested_quant_map") for name in stored if name.endswith(".nested_quant_map")]
    for name in names:
        stored[f"{name}.nested_quant_map"][0] = -1.0
        stored[f"{name}.absmax"][3] = 0
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = verify(tmp_path)
    assert {finding.severity for finding in found} == {"note"}
    assert {finding.tensor for finding in found if finding.rule == "D2"} == {f"{n}.nested_quant_map" for n in names}
    with open_checkpoint(tmp_path) as checkpoint:
        for name in names:
            parts = {key.removeprefix(f"{name}."): stored[key] for key in stored if key.startswith(f"{name}.")}
            state = bnb.functional.QuantState.from_dict(parts, device=torch.device("cpu"))
            state.dtype = torch.float32
            needed = bnb.functional.dequantize_4bit(stored[name], state).numpy()
            assert np.array_equal(checkpoint.dequantize(name, "float32"), needed)
