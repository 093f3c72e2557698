"""Every formula against peft's merge_and_unload on the dequantized model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from qlformat.merge.merger import merge
from qlformat.merge.options import AdapterSpec, MergeOptions
from tests.merge.conftest import MakeAdapter, live_logits, peft_merged, save_adapter
from tests.sources import write_source


def merged(base: Path, out: Path, *adapters: Path, to: str = "float32", **options: Any) -> dict[str, torch.Tensor]:
    merge(base, [AdapterSpec(path) for path in adapters], out, MergeOptions(to, **options))
    found: dict[str, torch.Tensor] = {}
    for file in sorted(out.glob("*.safetensors")):
        found |= load_file(file)
    return found


def assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float = 0.0) -> None:
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        if tolerance:
            torch.testing.assert_close(value, wanted[name], rtol=tolerance, atol=tolerance, msg=name)
        else:
            assert torch.equal(value, wanted[name]), name


EXACT = {
    "plain": {},
    "rslora": {"use_rslora": True, "r": 3},
    "patterns": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6}, "alpha_pattern": {"v_proj": 5}},
    "one layer": {"layers_to_transform": [1], "target_modules": ["q_proj", "down_proj"]},
    "regex": {"target_modules": r".*layers\.0\.self_attn\.(q|k)_proj"},
    "modules_to_save": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "lm_head": {"target_modules": ["lm_head", "q_proj"]},
    "tokens": {"trainable_token_indices": {"embed_tokens": [3, 11, 40]}},
}


@pytest.mark.parametrize("options", EXACT.values(), ids=EXACT)
def test_bit_equal_to_peft(
    options: dict[str, Any], small_base: Path, exact_base: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter = make_adapter(**options)
    wanted = peft_merged(exact_base, adapter)
    assert_equal(merged(small_base, tmp_path / "out", adapter), wanted)
    assert_equal(merged(exact_base, tmp_path / "out2", adapter), wanted)


def test_a_large_rank(small_base: Path, exact_base: Path, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    """The BLAS of torch and that of NumPy add up long products in different orders."""
    adapter = make_adapter(r=64)
    assert_equal(merged(small_base, tmp_path / "out", adapter), peft_merged(exact_base, adapter), 1e-6)


def test_dora(small_base: Path, exact_base: Path, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    """The norms are summed in another order than torch's."""
    adapter = make_adapter(use_dora=True)
    assert_equal(merged(small_base, tmp_path / "out", adapter), peft_merged(exact_base, adapter), 1e-6)


def test_dora_of_an_embedding(exact_base: Path, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    adapter = make_adapter(use_dora=True, target_modules=["embed_tokens", "v_proj"])
    assert_equal(merged(exact_base, tmp_path / "out", adapter), peft_merged(exact_base, adapter), 1e-6)


def test_several_adapters(small_base: Path, exact_base: Path, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    adapters = [make_adapter("a", seed=1), make_adapter("b", seed=2, r=8, target_modules=["q_proj", "up_proj"])]
    assert_equal(merged(small_base, tmp_path / "out", *adapters), peft_merged(exact_base, *adapters), 1e-6)


def test_a_bfloat16_adapter(small_base: Path, exact_base: Path, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    adapter = make_adapter()
    from safetensors.torch import save_file

    path = adapter / "adapter_model.safetensors"
    save_file({name: value.bfloat16() for name, value in load_file(path).items()}, path)
    assert_equal(merged(small_base, tmp_path / "out", adapter), peft_merged(exact_base, adapter))


def biased(path: Path) -> Path:
    config = transformers.Qwen2Config(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=80, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(config)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape)
    model.save_pretrained(path)
    return path


@pytest.mark.parametrize("options", [{"lora_bias": True}, {"bias": "all"}, {"bias": "lora_only"}], ids=str)
def test_biases(options: dict[str, Any], tmp_path: Path) -> None:
    base = biased(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "a", target_modules=["q_proj", "k_proj", "v_proj"], **options)
    assert_equal(merged(base, tmp_path / "out", adapter), peft_merged(base, adapter))


@pytest.mark.parametrize("use_dora", [False, True])
def test_conv1d(tmp_path: Path, use_dora: bool) -> None:
    """GPT-2 stores [in, out]: fan_in_fan_out."""
    config = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=80, n_positions=64)
    torch.manual_seed(0)
    base = tmp_path / "base"
    transformers.GPT2LMHeadModel(config).save_pretrained(base)
    targets = ["c_attn", "c_fc", "attn.c_proj", "mlp.c_proj"]
    adapter = save_adapter(base, tmp_path / "a", target_modules=targets, fan_in_fan_out=True, use_dora=use_dora)
    wanted = peft_merged(base, adapter)
    found = merged(base, tmp_path / "out", adapter)
    wanted = {name.removeprefix("transformer."): value for name, value in wanted.items() if name != "lm_head.weight"}
    found = {name.removeprefix("transformer."): value for name, value in found.items()}
    assert_equal(found, wanted, 1e-6 if use_dora else 1e-7)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": {"embed_tokens": [3, 11, 40]}},
    ],
    ids=str,
)
def test_tied_embeddings_answer_as_in_training(options: dict[str, Any], tied_source: Path, tmp_path: Path) -> None:
    """peft merges a delta of one of the two into both; the merged model must answer as the live adapter does."""
    adapter = save_adapter(tied_source, tmp_path / "a", **options)
    found = merged(tied_source, tmp_path / "out", adapter)
    wanted = live_logits(tied_source, adapter)
    torch.testing.assert_close(live_logits(tmp_path / "out"), wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(live_logits(tied_source), wanted, atol=1e-3)
    assert ("lm_head.weight" in found) is ("trainable_token_indices" not in options)


@pytest.mark.parametrize("to", ["bfloat16", "float16"])
def test_one_rounding_at_the_end(
    to: str, small_base: Path, exact_base: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter = make_adapter()
    found = merged(small_base, tmp_path / "out", adapter, to=to)
    wanted = {name: value.to(getattr(torch, to)) for name, value in peft_merged(exact_base, adapter).items()}
    assert_equal(found, wanted)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_model_that_is_not_quantized(dtype: str, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    base = write_source(tmp_path / "base", dtype=dtype)
    adapter = make_adapter()
    assert_equal(merged(base, tmp_path / "out", adapter), peft_merged(base, adapter))


def test_nf4_is_the_nearest_of_the_float32_merge(
    small_base: Path, make_adapter: MakeAdapter, exact_base: Path, tmp_path: Path
) -> None:
    """Against the reference encoder on peft's own float32 weights; and the checkpoint is sound."""
    from qlformat import open as open_checkpoint
    from qlformat import reference, verify

    adapter = make_adapter()
    wanted = peft_merged(exact_base, adapter)
    merge(small_base, [AdapterSpec(adapter)], tmp_path / "out", MergeOptions("nf4"))
    assert [finding for finding in verify(tmp_path / "out") if finding.severity == "error"] == []
    with open_checkpoint(tmp_path / "out") as checkpoint:
        quantized = [weight for weight in checkpoint.weights.values() if weight.quant_state is not None]
        assert len(quantized) == 14
        for weight in quantized:
            state = weight.quant_state
            assert state is not None and state.dtype == "bfloat16"
            packed, absmax = reference.quantize(wanted[weight.name].numpy().reshape(-1), "nf4", 64)
            assert checkpoint.read(weight.name) == packed.tobytes()
            codes, _, offset = reference.double_quantize(absmax)
            assert checkpoint.read(f"{weight.name}.absmax") == codes.tobytes()
            assert np.float32(state.nested_offset) == offset
