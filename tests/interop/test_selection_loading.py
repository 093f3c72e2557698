"""transformers loads the 4-bit checkpoints that select() asks for, every tensor of them, for some tiny real models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from qlformat import selection
from tests.interop.selection_models import Renaming, quantizer

TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16}
TINY |= {"num_key_value_heads": 4, "vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
VISION = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION |= {"model_type": "siglip_vision_model", "image_size": 16, "patch_size": 8}
LLAVA = {"text_config": {"model_type": "llama", **TINY}, "vision_config": VISION, "image_token_index": 3}
LLAMA4 = {**TINY, "intermediate_size_mlp": 96, "num_local_experts": 4, "interleave_moe_layer_step": 1}
# Class -> model type, a tiny configuration, and the prefix that older checkpoints of the bare model lack. Mixtral,
# Phi-MoE, GPT-NeoX, HRM and Llava are written under names that transformers renames or converts on load.
REAL: dict[str, tuple[str, dict[str, Any], str]] = {
    "LlamaForCausalLM": ("llama", {**TINY, "tie_word_embeddings": True}, "model."),
    "GPT2LMHeadModel": ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128}, "transformer."),
    "MixtralForCausalLM": ("mixtral", {**TINY, **EXPERTS}, ""),
    "PhimoeForCausalLM": ("phimoe", {**TINY, **EXPERTS}, ""),
    "GPTNeoXForCausalLM": ("gpt_neox", TINY, ""),
    "HrmTextForCausalLM": ("hrm_text", TINY, ""),
    "LlavaForConditionalGeneration": ("llava", LLAVA, ""),
    "T5ForConditionalGeneration": (
        "t5",
        {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "vocab_size": 128},
        "",
    ),
}


def real_model(class_name: str, model_type: str, settings: dict[str, Any]) -> Any:
    """A model with weights, on the CPU."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**settings)
    return getattr(transformers, class_name)(config).to(torch.bfloat16)


def write_four_bit(source: Path, out: Path, skip: tuple[str, ...] = ()) -> tuple[selection.Selection, dict[str, Any]]:
    """The 4-bit checkpoint that select() asks for, made with bitsandbytes' own functions; its decoded weights."""
    config = json.loads((source / "config.json").read_text())
    tensors = load_file(source / "model.safetensors")
    chosen = selection.select(config, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, skip)
    written, decoded = {}, {}
    for name, tensor in tensors.items():
        written[name] = tensor
        if chosen.decisions[name].quantize:
            weight = tensor.T if chosen.decisions[name].transpose else tensor
            packed, state = bnb.quantize_4bit(
                weight.contiguous(), quant_type="nf4", compress_statistics=True, blocksize=64
            )
            written |= {name: packed, **{f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}}
            decoded[name] = bnb.dequantize_4bit(packed, state)
    settings = quantizer(chosen.skip_modules).quantization_config.to_dict()
    settings |= {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    out.mkdir()
    save_file(written, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": settings}, default=str))
    return chosen, decoded


def assert_loads(class_name: str, source: Path, out: Path, decoded: dict[str, Any]) -> None:
    """transformers loads every tensor: the 4-bit layers decode to `decoded`, the others equal the source's."""
    cls = getattr(transformers, class_name)
    model, info = cls.from_pretrained(out, output_loading_info=True, dtype=torch.bfloat16)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs", "conversion_errors"):
        assert not info.get(problem), problem
    plain = cls.from_pretrained(source, dtype=torch.bfloat16)
    layers = {name: module for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}
    targets = Renaming(plain, load_file(source / "model.safetensors")).targets
    assert {targets[name][0] for name in decoded} == {f"{name}.weight" for name in layers}
    for name, expected in decoded.items():
        weight = layers[targets[name][0].removesuffix(".weight")].weight
        assert torch.equal(bnb.dequantize_4bit(weight.data, weight.quant_state), expected), name
    others = {name: tensor for name, tensor in model.state_dict().items() if name in plain.state_dict()}
    for name, tensor in others.items():
        if name.removesuffix(".weight") not in layers:
            assert torch.equal(tensor, plain.state_dict()[name]), name


@pytest.mark.parametrize("class_name", REAL)
def test_transformers_loads_the_result(class_name: str, tmp_path: Path) -> None:
    model_type, settings, _ = REAL[class_name]
    real_model(class_name, model_type, settings).save_pretrained(tmp_path / "source")
    chosen, decoded = write_four_bit(tmp_path / "source", tmp_path / "out")
    assert decoded and chosen.known_architecture
    assert_loads(class_name, tmp_path / "source", tmp_path / "out", decoded)


@pytest.mark.parametrize("class_name", [name for name, (_, _, prefix) in REAL.items() if prefix])
def test_transformers_loads_the_result_of_a_bare_model(class_name: str, tmp_path: Path) -> None:
    """A checkpoint of the model without its head, under names without the prefix; with a layer left out."""
    model_type, settings, prefix = REAL[class_name]
    source = tmp_path / "source"
    real_model(class_name, model_type, settings).save_pretrained(source)
    tensors = {name.removeprefix(prefix): tensor for name, tensor in load_file(source / "model.safetensors").items()}
    assert not any(name.startswith(prefix) for name in tensors)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    chosen, decoded = write_four_bit(source, tmp_path / "out", ("*.0.mlp.*",))
    assert any(decision.reason == "skip-pattern" for decision in chosen.decisions.values())
    assert_loads(class_name, source, tmp_path / "out", decoded)


def test_llama4_loads_experts_one_by_one_and_not_fused(tmp_path: Path) -> None:
    """The exception that select() notes: transformers builds one linear layer an expert for any 4-bit checkpoint."""
    source, name = tmp_path / "source", "Llama4ForCausalLM"
    real_model(name, "llama4_text", LLAMA4).save_pretrained(source)
    chosen, _ = write_four_bit(source, tmp_path / "fused")
    assert any("fused experts" in note for note in chosen.notes)
    # It takes the fused experts for missing ones and tries to initialize packed weights.
    with pytest.raises(NotImplementedError, match="Byte"):
        getattr(transformers, name).from_pretrained(tmp_path / "fused", dtype=torch.bfloat16)

    tensors = load_file(source / "model.safetensors")
    single = {key: tensor for key, tensor in tensors.items() if ".experts." not in key}
    for key in set(tensors) - set(single):
        stem = key.rpartition(".")[0]
        for i, expert in enumerate(tensors[key]):
            parts = {"down_proj": expert} if key.endswith("down_proj") else {}
            parts = parts or dict(zip(("gate_proj", "up_proj"), expert.chunk(2, dim=-1), strict=True))
            single |= {f"{stem}.{i}.{part}.weight": weight.T.contiguous() for part, weight in parts.items()}
    save_file(single, source / "model.safetensors", metadata={"format": "pt"})
    chosen, decoded = write_four_bit(source, tmp_path / "single")
    assert chosen.notes == [] and any(".experts." in key for key in decoded)
    model, info = getattr(transformers, name).from_pretrained(
        tmp_path / "single", output_loading_info=True, dtype=torch.bfloat16
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert {f"{key}.weight" for key, m in model.named_modules() if type(m).__name__ == "Linear4bit"} == set(decoded)


def test_laguna_does_not_load_in_the_names_of_its_modules(tmp_path: Path) -> None:
    """One of RENAMED_TWICE: the companions do not reach their layer, and transformers only warns of them."""
    source, cls = tmp_path / "source", transformers.LagunaForCausalLM
    model = real_model("LagunaForCausalLM", "laguna", {**TINY, "num_experts": 4, "num_experts_per_tok": 2})
    model.save_pretrained(source)
    _, decoded = write_four_bit(source, tmp_path / "out")
    assert_loads("LagunaForCausalLM", source, tmp_path / "out", decoded)

    model.save_pretrained(tmp_path / "renamed", save_original_format=False)
    write_four_bit(tmp_path / "renamed", tmp_path / "broken")
    loaded, info = cls.from_pretrained(tmp_path / "broken", output_loading_info=True, dtype=torch.bfloat16)
    assert any("shared_experts" in name for name in info["unexpected_keys"])
    with pytest.raises(ValueError, match="quant_state"):
        loaded(torch.tensor([[1, 5, 9]]))


BERT = {"model_type": "bert", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128}
BERT |= {"num_attention_heads": 4}
CROSS = {"is_decoder": True, "add_cross_attention": True}
GPT2 = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128, **CROSS}
VIT = {**VISION, "model_type": "vit"}
# Models that no table entry describes: wrappers of any two, and a class of another task.
UNDESCRIBED = {
    "bert and bert": ("EncoderDecoderModel", "encoder-decoder", {"encoder": BERT, "decoder": {**BERT, **CROSS}}),
    "bert and gpt2": ("EncoderDecoderModel", "encoder-decoder", {"encoder": BERT, "decoder": GPT2}),
    "vit and gpt2": ("VisionEncoderDecoderModel", "vision-encoder-decoder", {"encoder": VIT, "decoder": GPT2}),
    "whisper": (
        "WhisperForConditionalGeneration",
        "whisper",
        {"d_model": 64, "vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        | {f"{part}_{key}": n for part in ("encoder", "decoder") for key, n in (("layers", 2), ("ffn_dim", 96))}
        | {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_start_token_id": 1},
    ),
}


@pytest.mark.parametrize("case", UNDESCRIBED)
def test_a_model_that_is_not_described(case: str, tmp_path: Path) -> None:
    """Chosen by name and by the parts: here that equals transformers' own choice, and the result loads and runs."""
    class_name, model_type, settings = UNDESCRIBED[case]
    tokens = torch.tensor([[1, 5, 9]])
    inputs = {
        "EncoderDecoderModel": {"input_ids": tokens},
        "VisionEncoderDecoderModel": {"pixel_values": torch.ones(1, 3, 16, 16, dtype=torch.bfloat16)},
        "WhisperForConditionalGeneration": {"input_features": torch.ones(1, 80, 3000, dtype=torch.bfloat16)},
    }[class_name]
    cls = getattr(transformers, class_name)
    real_model(class_name, model_type, settings).save_pretrained(tmp_path / "source")
    chosen, _ = write_four_bit(tmp_path / "source", tmp_path / "out")
    assert not chosen.known_architecture
    assert len(chosen.notes) == 1 and "unknown" in chosen.notes[0]
    config = quantizer([]).quantization_config
    config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant, config.llm_int8_skip_modules = "nf4", True, None
    on_the_fly = cls.from_pretrained(tmp_path / "source", quantization_config=config, dtype=torch.bfloat16)
    model, info = cls.from_pretrained(tmp_path / "out", output_loading_info=True, dtype=torch.bfloat16)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    expected, found = (
        {name for name, module in one.named_modules() if type(module).__name__ == "Linear4bit"}
        for one in (on_the_fly, model)
    )
    assert found == expected
    with torch.no_grad():
        logits, needed = (one.eval()(**inputs, decoder_input_ids=tokens).logits for one in (model, on_the_fly))
    torch.testing.assert_close(logits, needed)
