"""Memory of fine-tuning from config.json alone: the paper's numbers, exact bytes, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qlformat.causal_models import FAMILIES, describe
from qlformat.errors import QlfError
from qlformat.estimate import estimate, finetune_memory, read_config
from qlformat.layout import Recipe
from qlformat.summary import summarize
from qlformat.training_memory import (
    RUNTIME_BYTES,
    Run,
    activation_bytes,
    advice,
    full_memory,
    lora_parameters,
    smallest,
    weight_bytes,
)
from tests.builders import LLAMA_CONFIG, build_checkpoint, build_source
from tests.hub_server import Hub

GB = 10**9


def llama(hidden: int, inner: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "vocab_size": 32000, "tie_word_embeddings": False,
    }  # fmt: skip


# arXiv 2302.13971, table 2, and the released weights.
LLAMAS = {
    "7B": llama(4096, 11008, 32, 32), "13B": llama(5120, 13824, 40, 40),
    "33B": llama(6656, 17920, 60, 52), "65B": llama(8192, 22016, 80, 64),
}  # fmt: skip
PARAMETERS = {"7B": 6_738_415_616, "13B": 13_015_864_320, "33B": 32_528_943_616, "65B": 65_285_660_672}
PAPER = {"rank": 64, "seq_len": 512}


@pytest.mark.parametrize("size", LLAMAS)
def test_parameters_of_the_released_models(size: str) -> None:
    assert describe(LLAMAS[size]).total == PARAMETERS[size]


def test_the_paper_numbers() -> None:
    """arXiv 2305.14314: abstract, sections 1 and 3, with the rank and the length of its OASST1 runs."""
    models = {size: describe(config) for size, config in LLAMAS.items()}
    assert 780 * GB < full_memory(models["65B"]) < 790 * GB
    for adapter_bytes in (2, 4):
        memory = {size: finetune_memory(model, adapter_bytes=adapter_bytes, **PAPER) for size, model in models.items()}
        assert memory["65B"].fits(48 * GB) and not memory["65B"].fits(40 * GB)
        assert memory["33B"].fits(24 * GB) and not memory["33B"].fits(20 * GB)
        assert memory["13B"].fits(12 * GB) and memory["7B"].fits(8 * GB)
    # 33B leaves almost nothing of 24 GB: that is what the paged optimizer is for.
    assert 24 * GB - finetune_memory(models["33B"], **PAPER).needed < 0.2 * GB
    assert not finetune_memory(models["33B"], optimizer="adamw_torch", **PAPER).fits(24 * GB)
    assert finetune_memory(models["33B"], optimizer="paged_adamw_32bit", **PAPER).fits_paged(24 * GB)


@pytest.mark.parametrize("size", LLAMAS)
def test_double_quantization_saves_0_373_bits(size: str) -> None:
    model = describe(LLAMAS[size])
    single = weight_bytes(model, Recipe(double_quant=False))
    saved = 8 * (single - weight_bytes(model, Recipe())) / model.linear
    assert round(saved, 3) == 0.373
    assert size != "65B" or round((single - weight_bytes(model, Recipe())) / GB, 1) == 3.0  # "about 3 GB on 65B"


def test_lora_parameters() -> None:
    """r (d + k) of every linear layer; written out for 7B."""
    model = describe(LLAMAS["7B"])
    attention, feed_forward = 4 * (4096 + 4096), 3 * (4096 + 11008)
    assert lora_parameters(model, 64) == 64 * 32 * (attention + feed_forward) == 159_907_840


@pytest.mark.parametrize("recipe", [Recipe(), Recipe(double_quant=False), Recipe(blocksize=128)])
def test_bytes_of_weights_are_those_of_a_checkpoint(tmp_path: Path, recipe: Recipe) -> None:
    """Against the tensors of a real one: all but the quant_state JSON."""
    shapes = {"self_attn.q_proj": (16, 16), "self_attn.k_proj": (8, 16), "self_attn.v_proj": (8, 16),
              "self_attn.o_proj": (16, 16), "mlp.gate_proj": (24, 16), "mlp.up_proj": (24, 16),
              "mlp.down_proj": (16, 24)}  # fmt: skip
    plain = {"model.embed_tokens.weight": (32, 16), "model.norm.weight": (16,), "lm_head.weight": (32, 16),
             "model.layers.0.input_layernorm.weight": (16,), "model.layers.0.post_attention_layernorm.weight": (16,)}  # fmt: skip # noqa: E501
    quantized = {f"model.layers.0.{name}.weight": shape for name, shape in shapes.items()}
    checkpoint = build_checkpoint(tmp_path, quantized=quantized, plain=plain, recipe=recipe)
    stored = sum(len(tensor.data) for name, tensor in checkpoint.tensors.items() if "quant_state" not in name)
    model = describe(read_config(tmp_path))
    assert weight_bytes(model, recipe) == stored
    assert model.total == summarize(tmp_path).total_params
    assert model.linear == summarize(tmp_path).quantized_params


def test_activations_by_hand() -> None:
    """One token of the tiny Llama with dropout and float32 adapters: bfloat16 activations, byte by byte."""
    model = describe(LLAMA_CONFIG)
    norms = 2 * 16 * 4
    attention = 2 * (16 + 8 + 8 + 16)
    feed_forward = 2 * (24 + 24 + 24)
    inputs = 16 + 16 + 16 + 16 + 16 + 16 + 24
    lora = inputs * (2 + 1) + 7 * 2 * 4
    layer, last = norms + attention + feed_forward + lora, 16 * (4 + 2)
    run = Run(rank=4, seq_len=10, batch_size=3)
    assert activation_bytes(model, run) == 30 * (2 * 16 + layer + last)
    cast = 2 * lora_parameters(model, 4)
    assert activation_bytes(model, Run(rank=4, seq_len=10, batch_size=3, checkpointing=False)) == 30 * (layer + last) + cast  # fmt: skip # noqa: E501


def test_what_each_option_changes() -> None:
    model = describe(LLAMAS["7B"])
    base = finetune_memory(model)
    assert base.total == sum((base.weights, base.adapters, base.gradients, base.optimizer, base.activations, base.workspace))  # fmt: skip # noqa: E501
    assert base.needed == base.total + RUNTIME_BYTES and base.paged
    assert finetune_memory(model, rank=32).adapters == 2 * base.adapters
    assert finetune_memory(model, batch_size=2).activations == finetune_memory(model, seq_len=2048).activations
    assert finetune_memory(model, checkpointing=False).activations > 10 * base.activations
    plain = finetune_memory(model, optimizer="adamw_torch")
    assert plain.optimizer == 8 * plain.trainable and not plain.paged
    assert base.optimizer == pytest.approx(2.03125 * base.trainable)
    assert finetune_memory(model, recipe=None).weights == 2 * model.total
    assert finetune_memory(LLAMAS["7B"]) == base == finetune_memory(model, Run())


SMOLLM2 = {
    "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
}  # fmt: skip
# Anonymous memory of `qlf finetune` beyond that of the imported libraries, in MB, by sequence length: SmolLM2-135M in
# float32 on two cores, rank 16, checkpointing, plain AdamW, one sequence a pass.
MEASURED = {256: 647, 1024: 1532}


def test_measured_peaks_on_a_cpu() -> None:
    """The packed weights are pages of the file, so they are not in what was measured; see tests/finetune for a run."""
    options: dict[str, Any] = {"optimizer": "adamw_torch", "compute_bytes": 4, "plain_bytes": 4, "on_cpu": True}
    found = {length: finetune_memory(SMOLLM2, seq_len=length, **options) for length in MEASURED}
    for length, measured in MEASURED.items():
        assert found[length].total / 1e6 == pytest.approx(measured, rel=0.17) and found[length].total < measured * 1e6
    grown = (found[1024].total - found[256].total) / 1e6
    assert grown == pytest.approx(MEASURED[1024] - MEASURED[256], rel=0.03)


def test_advice_is_true_and_complete() -> None:
    model = describe(LLAMAS["33B"])
    run = Run(seq_len=4096, batch_size=2, rank=64, optimizer="adamw_torch")
    gpu = 24 * GB
    assert not finetune_memory(model, run).fits(gpu) and advice(model, run, gpu) == []
    assert smallest(model).fits(gpu)
    for run, change in (
        (Run(checkpointing=False), "gradient checkpointing"),
        (Run(recipe=None), "quantize the base"),
        (Run(rank=64, seq_len=512, optimizer="adamw_torch"), "--optimizer paged_adamw_8bit"),
        (Run(batch_size=8), "--batch-size 2"),
        (Run(seq_len=8192), "--seq-len 2048"),
        (Run(rank=256, seq_len=512), "--rank 64"),
    ):
        assert not finetune_memory(model, run).fits(gpu)
        found = advice(model, run, gpu)
        assert any(text.startswith(change) for text, _ in found), (run, [text for text, _ in found])
        assert all(memory.fits(gpu) for _, memory in found)
    # The change named is the smallest of its kind that fits.
    assert not finetune_memory(model, batch_size=4).fits(gpu)


def test_reading_a_config(tmp_path: Path, hub: Hub) -> None:
    source = build_source(hub.root / "org" / "model")
    (source / "tokenizer.json").write_text("{}")
    assert estimate("org/model").model == estimate(source).model == estimate(source / "config.json").model
    assert {name for name, _ in hub.requests} == {"config.json"}


BAD = {
    "[1]": "found a JSON list, needed an object",
    "{": "not valid JSON",
    "{}": "model type None is not known to the estimate, needed one of llama",
    '{"model_type": "mixtral"}': "model type 'mixtral' is not known",
    '{"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}': "config.json of its language model alone",
    '{"model_type": "llama"}': "found no hidden_size",
    '{"model_type": "llama", "hidden_size": "big"}': "hidden_size is 'big', needed a positive integer",
    '{"model_type": "llama", "hidden_size": -1}': "hidden_size is -1, needed a positive integer",
    '{"model_type": "llama", "hidden_size": true}': "hidden_size is True, needed a positive integer",
}


@pytest.mark.parametrize("text", BAD)
def test_configs_that_say_too_little(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(QlfError) as caught:
        estimate(tmp_path)
    assert BAD[text] in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(QlfError, match=r"found no config\.json"):
        estimate(tmp_path)
    with pytest.raises(QlfError, match="found no directory 'nothing'"):
        estimate("nothing")
    with pytest.raises(QlfError, match="rank is 0, needed 1 or more"):
        finetune_memory(LLAMAS["7B"], rank=0)
    with pytest.raises(QlfError, match="optimizer 'adam' is not known here, needed one of paged_adamw_8bit"):
        finetune_memory(LLAMAS["7B"], optimizer="adam")


def test_notes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMAS["7B"], "max_position_embeddings": 2048}))
    assert estimate(tmp_path).notes == ()
    assert estimate(tmp_path, seq_len=4096).notes == ("4096 tokens are more than the model's context of 2048",)
    falcon = {"model_type": "falcon", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 9}  # fmt: skip # noqa: E501
    (tmp_path / "config.json").write_text(json.dumps(falcon))
    found = estimate(tmp_path)
    assert "stay in 16 bits" in found.notes[0] and found.memory.weights == 2 * found.model.total


def test_neither_torch_nor_transformers_is_imported(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMAS["7B"]))
    script = (
        "import sys, qlformat.estimate as e; e.estimate(sys.argv[1], gpu=10**10).as_dict(); "
        "print(*{'torch', 'transformers', 'peft', 'huggingface_hub', 'numpy'} & {n.split('.')[0] for n in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True,
                          cwd=Path(__file__).parents[2])  # fmt: skip
    assert set(done.stdout.split()) <= {"numpy"}
    assert len(FAMILIES) > 20
