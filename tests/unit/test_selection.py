"""select() on names and shapes alone. That it agrees with transformers is tested in interop."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from qlformat.selection import Selection, is_conv1d, select

ROOT = Path(__file__).resolve().parents[2]
Shapes = dict[str, tuple[int, ...]]

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2, "vocab_size": 100}
GPT2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": 1}
MIXTRAL = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_hidden_layers": 1}
CUSTOM = {"model_type": "somebodys_own", "architectures": ["TheirLM"], "vocab_size": 100}


def llama_shapes(layers: int = 2, head: bool = False) -> Shapes:
    shapes: Shapes = {"model.embed_tokens.weight": (100, 64), "model.norm.weight": (64,)}
    for i in range(layers):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"model.layers.{i}.self_attn.{name}.weight"] = (64, 64)
        for name in ("gate_proj", "up_proj", "down_proj"):
            shapes[f"model.layers.{i}.mlp.{name}.weight"] = (64, 64)
        shapes[f"model.layers.{i}.self_attn.q_proj.bias"] = (64,)
        shapes[f"model.layers.{i}.input_layernorm.weight"] = (64,)
    return shapes | ({"lm_head.weight": (100, 64)} if head else {})


def reasons(chosen: Selection) -> dict[str, str]:
    return {name: decision.reason for name, decision in chosen.decisions.items()}


def quantized(chosen: Selection) -> set[str]:
    return {name for name, decision in chosen.decisions.items() if decision.quantize}


@pytest.mark.parametrize("head", [False, True])
def test_llama(head: bool) -> None:
    chosen = select(LLAMA | {"tie_word_embeddings": not head}, llama_shapes(head=head))
    assert chosen.known_architecture and chosen.notes == []
    assert chosen.skip_modules == ["lm_head"], "listed where it is tied and absent as well"
    assert quantized(chosen) == {n for n in llama_shapes() if n.endswith("_proj.weight")}
    assert not any(decision.transpose for decision in chosen.decisions.values())
    why = reasons(chosen)
    assert why["model.embed_tokens.weight"] == "embedding"
    assert why["model.norm.weight"] == why["model.layers.1.input_layernorm.weight"] == "norm"
    assert why["model.layers.0.self_attn.q_proj.bias"] == "bias"
    assert why.get("lm_head.weight") == ("output-embedding" if head else None)


def test_a_wrapper_of_two_models_follows_the_rules_of_both() -> None:
    """Else GPT-2's Conv1D would be stored untransposed, and BERT's tied head be a 4-bit layer without a weight."""
    config = {"model_type": "encoder-decoder", "encoder": {"model_type": "bert"}, "decoder": {"model_type": "gpt2"}}
    shapes: Shapes = {
        "encoder.encoder.layer.0.attention.self.query.weight": (64, 64),
        "encoder.embeddings.word_embeddings.weight": (100, 64),
        "decoder.transformer.h.0.attn.c_attn.weight": (64, 192),
        "decoder.transformer.wte.weight": (100, 64),
        "decoder.lm_head.weight": (100, 64),
    }
    chosen = select(config, shapes)
    assert list(reasons(chosen).values()) == ["linear", "embedding", "conv1d", "embedding", "output-embedding"]
    assert chosen.decisions["decoder.transformer.h.0.attn.c_attn.weight"].transpose
    assert is_conv1d(config, "decoder.transformer.h.0.attn.c_attn.weight")
    assert {"lm_head", "cls.predictions.decoder"} <= set(chosen.skip_modules)
    assert not chosen.known_architecture and "unknown" in chosen.notes[0]


def test_decisions_keep_names_and_order() -> None:
    chosen = select(LLAMA, llama_shapes())
    assert [d.name for d in chosen.decisions.values()] == list(chosen.decisions) == list(llama_shapes())


def test_layers_and_heads_that_the_model_does_not_have() -> None:
    extra: Shapes = {"model.layers.2.mlp.up_proj.weight": (64, 64), "mtp.layers.0.fc.weight": (64, 64)}
    chosen = select(LLAMA, llama_shapes() | extra)
    assert {reasons(chosen)[name] for name in extra} == {"not-in-model"}
    assert chosen.skip_modules == ["lm_head"]


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_gpt2_conv1d(prefix: str) -> None:
    layer = {f"{prefix}h.0.{n}": (64, 192) for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}
    shapes: Shapes = {f"{name}.weight": shape for name, shape in layer.items()}
    shapes |= {f"{prefix}wte.weight": (100, 64), f"{prefix}wpe.weight": (32, 64), f"{prefix}ln_f.weight": (64,)}
    shapes |= {f"{prefix}h.0.attn.bias": (1, 1, 32, 32)}
    chosen = select(GPT2, shapes)
    assert quantized(chosen) == {f"{name}.weight" for name in layer}
    for name in shapes:
        assert chosen.decisions[name].transpose == (name in quantized(chosen)) == is_conv1d(GPT2, name)
    assert chosen.skip_modules == ["lm_head"]
    assert reasons(chosen)[f"{prefix}wpe.weight"] == "embedding"
    assert reasons(chosen)[f"{prefix}ln_f.weight"] == "norm"
    kept = select(GPT2, shapes, ["*.c_fc"])
    assert kept.skip_modules == ["lm_head", "transformer.h.0.mlp.c_fc"], "the module's name, whatever is on disk"
    assert not kept.decisions[f"{prefix}h.0.mlp.c_fc.weight"].transpose


def test_is_conv1d_of_other_models() -> None:
    assert not is_conv1d(LLAMA, "model.layers.0.mlp.up_proj.weight")
    assert not is_conv1d(CUSTOM, "transformer.h.0.attn.c_attn.weight")
    assert not is_conv1d(GPT2, "transformer.h.0.attn.c_attn.bias")


def test_mixtral_experts_stay_in_both_layouts() -> None:
    gate, old = "block_sparse_moe.gate", "block_sparse_moe.experts.3"
    hub: Shapes = {f"model.layers.0.{old}.{w}.weight": (64, 32) for w in ("w1", "w2", "w3")}
    hub |= {f"model.layers.0.{gate}.weight": (8, 64), "model.layers.0.self_attn.q_proj.weight": (64, 64)}
    fused: Shapes = {"model.layers.0.mlp.experts.gate_up_proj": (8, 64, 64)}
    fused |= {"model.layers.0.mlp.experts.down_proj": (8, 64, 32), "model.layers.0.mlp.gate.weight": (8, 64)}
    fused |= {"model.layers.0.self_attn.q_proj.weight": (64, 64)}
    for shapes in (hub, fused):
        chosen = select(MIXTRAL, shapes)
        assert quantized(chosen) == {"model.layers.0.self_attn.q_proj.weight"}
        assert chosen.skip_modules == ["lm_head"], "neither experts nor routers are linear modules"
        why = reasons(chosen)
        assert {why[name] for name in shapes if "experts" in name} == {"fused-experts"}
        assert {why[name] for name in shapes if name.endswith("gate.weight")} == {"router"}


def test_tensors_split_on_load_stay_and_name_what_they_become() -> None:
    config = {"model_type": "hrm_text", "architectures": ["HrmTextForCausalLM"]}
    layer = "model.H_module.layers.0"
    shapes: Shapes = {f"{layer}.mlp.gate_up_proj.weight": (128, 64), f"{layer}.mlp.down_proj.weight": (64, 64)}
    chosen = select(config, shapes)
    assert reasons(chosen) == {
        f"{layer}.mlp.gate_up_proj.weight": "merged-on-load",
        f"{layer}.mlp.down_proj.weight": "linear",
    }
    assert chosen.skip_modules == ["lm_head", f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj"]


def test_kept_in_float32_is_named() -> None:
    config = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}
    block = "encoder.block.0.layer.1.DenseReluDense"
    shapes: Shapes = {f"{block}.wi.weight": (64, 64), f"{block}.wo.weight": (64, 64), "shared.weight": (100, 64)}
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    chosen = select(config, shapes | {bias: (32, 8)})
    assert reasons(chosen)[f"{block}.wo.weight"] == "keep-in-fp32"
    assert reasons(chosen)[bias] == reasons(chosen)["shared.weight"] == "embedding"
    assert quantized(chosen) == {f"{block}.wi.weight"}
    assert chosen.skip_modules == [f"{block}.wo", "lm_head"]


@pytest.mark.parametrize(("tied", "expected"), [(True, "tied"), (False, "linear")])
def test_layers_tied_to_each_other(tied: bool, expected: str) -> None:
    config = {"model_type": "zamba", "architectures": ["ZambaForCausalLM"], "tie_word_embeddings": tied}
    name = "model.layers.2.shared_transf.self_attn.q_proj.weight"
    chosen = select(config, {name: (64, 64)})
    assert reasons(chosen)[name] == expected
    # The copies in other layers are not on disk; the entry has to cover them.
    entries = [re.compile(entry) for entry in chosen.skip_modules]
    assert any(e.match("model.layers.77.shared_transf.self_attn.q_proj") for e in entries) == tied


@pytest.mark.parametrize(
    "glob",
    [
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.1.mlp.up_proj",
        "*.1.mlp.up_proj",
        "*layers.[1].*up_proj*",
    ],
)
def test_skip_globs(glob: str) -> None:
    chosen = select(LLAMA, llama_shapes(), [glob])
    assert chosen.decisions["model.layers.1.mlp.up_proj.weight"].reason == "skip-pattern"
    assert len(quantized(chosen)) == 13
    assert chosen.skip_modules == ["lm_head", "model.layers.1.mlp.up_proj"]
    assert chosen.notes == []


def test_skip_glob_of_what_is_never_quantized_changes_no_reason() -> None:
    chosen = select(LLAMA, llama_shapes(head=True), ["*"])
    assert quantized(chosen) == set()
    assert reasons(chosen)["model.embed_tokens.weight"] == "embedding"
    assert reasons(chosen)["lm_head.weight"] == "output-embedding"
    assert len(chosen.skip_modules) == 15
    assert len(chosen.notes) == 1 and chosen.notes[0].startswith("no tensor is quantized")


def test_model_of_other_layers_than_linear() -> None:
    """Falcon's layers are of a class of their own, which transformers does not replace."""
    config = {"model_type": "falcon", "architectures": ["FalconForCausalLM"]}
    chosen = select(config, {"transformer.h.0.self_attention.query_key_value.weight": (192, 64)})
    assert [*reasons(chosen).values()] == ["not-linear"]
    assert chosen.known_architecture and len(chosen.notes) == 1 and chosen.skip_modules == ["lm_head"]


def test_skip_glob_that_matches_nothing_is_reported() -> None:
    chosen = select(LLAMA, llama_shapes(), ["*.c_fc", "*.up_proj"])
    assert chosen.notes == ["skip pattern '*.c_fc' matched no tensor"]


def test_skip_entries_hit_no_other_module() -> None:
    """transformers takes an entry for a suffix and for a prefix; the one for `proj` must not hit `x.proj`."""
    shapes: Shapes = {"proj.weight": (64, 64), "proj.inner.weight": (64, 64), "layers.0.proj.weight": (64, 64)}
    chosen = select(CUSTOM, shapes, ["proj", "proj.weight"])
    assert quantized(chosen) == {"proj.inner.weight", "layers.0.proj.weight"}
    assert chosen.skip_modules == ["^proj$", "lm_head"]
    odd = select(CUSTOM, {"a+b.weight": (64, 64), "layers.1.fc.weight": (64, 64)}, ["a+b"])
    assert odd.skip_modules == [r"^a\+b$", "lm_head"]


def test_unknown_type_goes_by_names() -> None:
    shapes: Shapes = {
        "model.embeddings.weight": (100, 64),
        "model.wte.weight": (100, 64),
        "model.blocks.0.attn.Wqkv.weight": (192, 64),
        "model.blocks.0.ffn.router.weight": (8, 64),
        "model.blocks.0.ffn.experts.0.w1.weight": (64, 64),
        "model.blocks.0.ffn.stacked_experts": (8, 64, 64),
        "model.blocks.0.conv.weight": (64, 1, 4),
        "model.blocks.0.norm_1.weight": (64,),
        "model.scale": (),
        "model.blocks.0.A_log": (64, 16),
        "model.blocks.0.gone.weight": (0, 64),
        "unembed.weight": (100, 64),
        "score.weight": (2, 64),
    }
    chosen = select(CUSTOM, shapes)
    assert not chosen.known_architecture
    assert chosen.notes == ["model type 'somebodys_own' is unknown: tensors were chosen by their names alone"]
    assert [*reasons(chosen).values()] == [
        "embedding",
        "embedding",
        "linear",
        "router",
        "linear",
        "fused-experts",
        "not-2d",
        "norm",
        "scalar",
        "not-linear",
        "empty",
        "output-embedding",
        "output-embedding",
    ]
    # Whatever may be an nn.Linear in the unknown model has to be named.
    assert chosen.skip_modules == [
        "lm_head",
        "model.blocks.0.ffn.router",
        "model.blocks.0.gone",
        "score",
        "unembed",
    ]


def test_unknown_class_of_a_known_type() -> None:
    config = LLAMA | {"architectures": ["LlamaForSequenceClassification"]}
    chosen = select(config, llama_shapes() | {"score.weight": (2, 64)})
    assert not chosen.known_architecture
    assert len(chosen.notes) == 1 and "LlamaForSequenceClassification" in chosen.notes[0]
    assert reasons(chosen)["score.weight"] == "output-embedding"
    assert chosen.skip_modules == ["lm_head", "score"]


def test_class_is_optional() -> None:
    chosen = select({"model_type": "llama"}, llama_shapes())
    assert chosen.known_architecture and len(quantized(chosen)) == 14


def test_modules_that_transformers_cannot_load_packed() -> None:
    config = {"model_type": "qwen4_exp_text", "architectures": ["Qwen4ExpForCausalLM"]}
    name = "model.layers.0.attn_hyper_connection.block_inject_weight"
    chosen = select(config, {f"{name}.weight": (64, 64)})
    assert reasons(chosen) == {f"{name}.weight": "unloadable-name"}
    assert name in chosen.skip_modules


def test_llama4_says_that_fused_experts_cannot_be_loaded() -> None:
    config = {"model_type": "llama4_text", "architectures": ["Llama4ForCausalLM"]}
    query: Shapes = {"model.layers.0.self_attn.q_proj.weight": (64, 64)}
    fused = select(config, query | {"model.layers.0.feed_forward.experts.gate_up_proj": (4, 64, 64)})
    assert len(fused.notes) == 1 and "fused experts" in fused.notes[0]
    single = select(config, {"model.layers.0.feed_forward.experts.0.gate_proj.weight": (64, 64)})
    assert quantized(single) and single.notes == []


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"model_type": None, "architectures": None},
        {"model_type": ["llama"], "architectures": [7], "vocab_size": "many", "num_hidden_layers": "few"},
        {"model_type": "llama", "architectures": "LlamaForCausalLM", "num_hidden_layers": None},
        {"model_type": "llava", "text_config": 3, "vision_config": {"model_type": {}}},
    ],
)
def test_odd_configs_are_no_error(config: dict[str, Any]) -> None:
    chosen = select(config, llama_shapes(head=True))
    assert "lm_head" in chosen.skip_modules
    assert "model.layers.0.mlp.up_proj.weight" in quantized(chosen)


def test_same_input_same_answer_in_any_order() -> None:
    shapes = llama_shapes(head=True)
    forward, backward = select(LLAMA, shapes), select(LLAMA, dict(reversed(shapes.items())))
    assert forward.skip_modules == backward.skip_modules
    assert forward.decisions == backward.decisions


def test_neither_torch_nor_transformers_is_imported() -> None:
    program = (
        "import sys; from qlformat.selection import select; "
        "select({'model_type': 'llama'}, {'lm_head.weight': (2, 2)}); "
        "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_table_is_small_and_says_what_made_it() -> None:
    path = ROOT / "qlformat" / "data" / "architectures.json"
    assert path.stat().st_size < 100_000
    assert re.fullmatch(r"\d+\.\d+\.\d+", json.loads(path.read_text())["transformers"])


def test_fast_enough_to_be_free() -> None:
    """A 300-tensor model takes 1 to 3 ms; the bound is wide because test machines are shared."""
    shapes = llama_shapes(layers=33, head=True)
    assert len(shapes) == 300
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        select(LLAMA | {"num_hidden_layers": 33}, shapes)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.02
