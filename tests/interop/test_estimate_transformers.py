"""The estimate against transformers' own models: every count of parameters, and what autograd really keeps."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qlformat.causal_models import FAMILIES, describe
from qlformat.selection import select
from qlformat.training_memory import Run, activation_bytes, layer_bytes, lora_parameters

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((kind, {}) for kind in FAMILIES),
    ("llama", {"num_key_value_heads": 8, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    ("llama", {"hidden_size": 2048, "head_dim": 96}),
    ("mistral", {"head_dim": 64}),
    ("qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    ("qwen3", {"num_key_value_heads": 8, "attention_bias": True}),
    ("gemma", {"head_dim": 128}),
    (
        "opt",
        {"word_embed_proj_dim": 512, "hidden_size": 1024, "do_layer_norm_before": False, "num_attention_heads": 16},
    ),
    ("opt", {"enable_bias": False}),
    ("gpt2", {"n_inner": 1000, "tie_word_embeddings": False}),
    ("gpt_neox", {"attention_bias": False, "tie_word_embeddings": True}),
    ("phi", {"num_key_value_heads": 8}),
    ("stablelm", {"use_qkv_bias": True, "use_parallel_residual": True}),
    ("starcoder2", {"use_bias": False}),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 8, "hidden_size": 1024, "num_attention_heads": 16}),
    ("falcon", {"multi_query": False, "parallel_attn": False, "bias": True}),
    ("cohere", {"attention_bias": True}),
]


def on_meta(kind: str, **options: Any) -> tuple[Any, dict[str, Any]]:
    """(model without memory, its config.json as transformers writes it)."""
    config = AutoConfig.for_model(kind, **options)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    return model, {**config.to_diff_dict(), "model_type": kind, "architectures": [type(model).__name__]}


@pytest.mark.parametrize(("kind", "options"), VARIANTS, ids=lambda value: value if isinstance(value, str) else None)
def test_parameters(kind: str, options: dict[str, Any]) -> None:
    model, config = on_meta(kind, **options)
    found = describe(config)
    assert found.total == sum(parameter.numel() for parameter in model.parameters())
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert found.embedding == embedding.weight.numel()
    assert found.head == (0 if head.weight is embedding.weight else head.weight.numel())
    if found.quantized:
        state = model.state_dict()
        decisions = select(config, {name: tuple(tensor.shape) for name, tensor in state.items()}).decisions
        assert found.linear == sum(state[name].numel() for name, decision in decisions.items() if decision.quantize)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "phi3", "gpt2", "opt", "falcon", "gpt_neox"])
def test_trainable_parameters_are_those_of_peft(kind: str) -> None:
    model, config = on_meta(kind)
    found = describe(config)
    lora = peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    with torch.device("meta"):
        tuned = peft.get_peft_model(model, lora, low_cpu_mem_usage=True)
    assert lora_parameters(found, 8) == sum(p.numel() for p in tuned.parameters() if p.requires_grad)


SMALL = {
    "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 512, "pad_token_id": 0,
}  # fmt: skip
KEPT: dict[str, tuple[dict[str, Any], float]] = {
    "llama": (SMALL, 0.01), "mistral": (SMALL, 0.01), "qwen2": (SMALL, 0.01),
    "qwen3": ({**SMALL, "head_dim": 64}, 0.01),
    "gemma": ({**SMALL, "head_dim": 64}, 0.01), "gemma3_text": ({**SMALL, "head_dim": 64}, 0.01),
    "olmo2": (SMALL, 0.01), "stablelm": (SMALL, 0.03), "phi3": (SMALL, 0.01), "gpt_neox": (SMALL, 0.03),
    "gpt2": ({"n_embd": 256, "n_layer": 4, "n_head": 4, "vocab_size": 512, "attn_pdrop": 0.0, "resid_pdrop": 0.0,
              "embd_pdrop": 0.0}, 0.03),
}  # fmt: skip
"""Config, and by how much the estimate may be off."""


def kept_bytes(kind: str, options: dict[str, Any], run: Run) -> int:
    """Bytes that autograd keeps of one forward pass of the layers: bfloat16, float32 adapters, no dropout."""
    config = AutoConfig.for_model(kind, **options)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    lora = peft.LoraConfig(r=run.rank, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(model, lora)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if run.checkpointing:
        tuned.gradient_checkpointing_enable()
    tuned.enable_input_require_grads()
    tuned.train()
    own = {tensor.untyped_storage().data_ptr() for tensor in (*tuned.parameters(), *tuned.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # alive, so that no address is used twice
        return tensor

    ids = torch.arange(run.batch_size * run.seq_len).remainder(500).view(run.batch_size, run.seq_len)
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        tuned.get_base_model().base_model(input_ids=ids, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("kind", KEPT)
def test_activations(kind: str) -> None:
    options, tolerance = KEPT[kind]
    run = Run(rank=8, dropout=0.0, seq_len=64, batch_size=2, checkpointing=False)
    shape = describe({**AutoConfig.for_model(kind, **options).to_dict(), "model_type": kind})
    head_input = 2 * 128 * shape.hidden  # kept by the output layer, which does not run here
    expected = activation_bytes(shape, run) - head_input
    assert kept_bytes(kind, options, run) == pytest.approx(expected, rel=tolerance)


def test_activations_with_checkpointing() -> None:
    """The inputs of the layers and the last norm; the one layer that is computed again comes on top."""
    run = Run(rank=8, dropout=0.0, seq_len=64, batch_size=2)
    shape = describe({**SMALL, "model_type": "llama"})
    expected = activation_bytes(shape, run) - 128 * (layer_bytes(shape, run) + 2 * shape.hidden)
    assert kept_bytes("llama", SMALL, run) == pytest.approx(expected, rel=0.01)
