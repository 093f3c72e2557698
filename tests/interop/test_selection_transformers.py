"""select() against transformers + bitsandbytes themselves, for every language model that transformers knows.

A small model of each architecture is built on the meta device. The modules that transformers' own code replaces by
4-bit layers are compared with select()'s decisions for the names that `save_pretrained` writes, and with what
transformers replaces when it is given select()'s skip_modules; and every name of a quantized tensor and of its
companions is sent through transformers' renaming on load. Some architectures are also loaded for real.
"""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from qlformat import selection

ROOT = Path(__file__).resolve().parents[2]
COMPANIONS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__nf4")

# Architectures of transformers that no model can be built of here. Stale entries fail test_exceptions_are_needed.
NOT_BUILT = {
    ("gemma3n", "Gemma3nForConditionalGeneration"): "timm",
    ("fast_vlm", "FastVlmForConditionalGeneration"): "timm",
    ("perception_lm", "PerceptionLMForConditionalGeneration"): "timm",
    # Its configuration demands what its own kv_sharing_modes refuses (transformers 5.23).
    ("gemma4_assistant", "Gemma4AssistantForCausalLM"): "set of layer types producing a cache",
}

# nn.Linear modules that transformers quantizes on the fly and select() leaves alone, by class: endings of their names.
QKV = frozenset({"q_proj", "k_proj", "v_proj"})
LEFT_ALONE: dict[str, frozenset[str]] = {
    # Split, merged or permuted on load: packed weights cannot be.
    "HrmTextForCausalLM": QKV | {"self_attn.gate_proj", "mlp.gate_proj", "mlp.up_proj"},
    "Kimi_K25ForConditionalGeneration": QKV,
    "MiniMaxM3SparseForConditionalGeneration": frozenset({"shared_experts.gate_up_proj"}),
    "MistralLarge4ForConditionalGeneration": frozenset({"attention.q_proj", "attention.k_proj"}),
    "Molmo2ForConditionalGeneration": QKV | {"mlp.gate_proj", "mlp.up_proj"},
    "NemotronH_Omni_Reasoning_V3": QKV,
    "Nemotron3_5TranscribeForConditionalGeneration": QKV,
    "QianfanOCRForConditionalGeneration": QKV,
    "Step3p7ForConditionalGeneration": QKV,
    "UnlimitedOcrForConditionalGeneration": QKV,
    # The loader takes the name of the module for that of its weight.
    "Qwen4ExpForCausalLM": frozenset({"block_inject_weight"}),
    "Qwen4ExpForConditionalGeneration": frozenset({"block_inject_weight"}),
}
# The same for a checkpoint whose tensors have the names of the modules.
LEFT_ALONE_IN_MODULE_NAMES: dict[str, frozenset[str]] = {
    "Inkling2ForCausalLM": frozenset({"weight_proj"}),
    "Inkling2ForConditionalGeneration": frozenset({"weight_proj"}),
    "Qwen4ExpForCausalLM": frozenset({"block_inject_weight"}),
    "Qwen4ExpForConditionalGeneration": frozenset({"block_inject_weight"}),
}
# Classes whose 4-bit layers transformers cannot load from a checkpoint in the names of the modules, which only
# save_pretrained(save_original_format=False) writes: it renames them once more. Plain tensors have a second chance
# there under their own name, the companions of a packed one have not.
RENAMED_TWICE = frozenset(
    {
        "DeepseekOcr2ForConditionalGeneration",
        "LagunaForCausalLM",
        "MistralLarge4ForConditionalGeneration",
        "PI0ForConditionalGeneration",
        "UnlimitedOcrForConditionalGeneration",
    }
)
# Model types that a Llava of transformers can be made of, besides the usual Llama and CLIP.
PARTS = (
    ("mixtral", "siglip_vision_model"),
    ("qwen3_moe", "pixtral"),
    ("mistral", "siglip2_vision_model"),
    ("deepseek_v32", "clip_vision_model"),
)


@functools.cache
def maker() -> ModuleType:
    """tools/make_architectures.py: it builds the models."""
    spec = importlib.util.spec_from_file_location("make_architectures", ROOT / "tools" / "make_architectures.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def table() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((ROOT / "qlformat" / "data" / "architectures.json").read_text())
    return loaded


def described() -> list[tuple[str, str]]:
    return [(model_type, name) for model_type, names in table()["types"].items() for name in names]


def as_json(config: Any, class_name: str) -> dict[str, Any]:
    """The config.json of a model of this class."""
    written: dict[str, Any] = json.loads(json.dumps(config.to_dict(), default=str))
    return written | {"architectures": [class_name]}


class Renaming:
    """transformers' renaming of a checkpoint on load: name on disk -> (name in the model, operations) in `targets`.

    quantizer: given for a 4-bit checkpoint.
    """

    def __init__(self, model: Any, names: Iterable[str], quantizer: Any = None) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key

        steps = get_model_conversion_mapping(model, None, quantizer)
        self._renamings = [step for step in steps if isinstance(step, WeightRenaming)]
        self._converters = [step for step in steps if isinstance(step, WeightConverter)]
        self._base, self._tensors = model.base_model_prefix, model.state_dict()
        # Some steps remember what they saw: names come in the order in which transformers sorts them.
        self.targets = {name: self._load(name) for name in sorted(names, key=dot_natural_key)}

    def _load(self, name: str) -> tuple[str, str]:
        from transformers.core_model_loading import rename_source_key

        loaded, source = rename_source_key(name, self._renamings, self._converters, self._base, self._tensors)
        if loaded not in self._tensors and name in self._tensors:
            loaded, source = rename_source_key(name, [], [], self._base, self._tensors)
        found = (repr(step.operations) for step in self._converters if source in step.source_patterns)
        return loaded, next(found, "")


def written_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that save_pretrained writes."""
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    model.tie_weights()
    state = {k: v for k, v in model.state_dict().items() if k not in (model._keys_to_ignore_on_save or ())}
    state = revert_weight_conversion(model, remove_tied_weights_from_state_dict(state, model))
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def modules_of(tensors: Iterable[str]) -> set[str]:
    return {name.removesuffix(".weight") for name in tensors}


def endings(modules: set[str], expected: frozenset[str]) -> set[str]:
    """Which expected endings the modules have; a module with none of them is returned as it is."""
    return {next((e for e in expected if f".{module}".endswith(f".{e}")), module) for module in modules}


def quantizer(skip_modules: list[str]) -> Any:
    from transformers import BitsAndBytesConfig
    from transformers.quantizers import AutoHfQuantizer

    return AutoHfQuantizer.from_config(BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=skip_modules))


def check(class_name: str, build: Callable[[], Any]) -> None:
    """All that the text at the top promises, for one architecture."""
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import HfQuantizer

    make = maker()
    model = build()
    config = as_json(model.config, class_name)
    # Before the weights are tied, as in from_pretrained.
    skipped = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    shapes = written_shapes(model)
    module_shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    loaded = Renaming(model, shapes).targets
    transposed = {name for name, module in model.named_modules() if isinstance(module, Conv1D)}
    replace_with_bnb_linear(model, skipped, quantizer([]).quantization_config)
    on_the_fly = {name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}

    chosen = selection.select(config, shapes)
    assert chosen.known_architecture, chosen.notes
    assert chosen.skip_modules == sorted(set(chosen.skip_modules))
    quantized = [name for name, decision in chosen.decisions.items() if decision.quantize]
    modules = modules_of(loaded[name][0] for name in quantized)
    assert not modules - on_the_fly, "quantized, but not by transformers"
    exceptions = LEFT_ALONE.get(class_name, frozenset())
    assert endings(on_the_fly - modules, exceptions) == exceptions, "quantized by transformers, but not by select()"
    turned = modules_of(loaded[name][0] for name in quantized if chosen.decisions[name].transpose)
    assert turned == transposed & modules

    # The list that goes into config.json makes transformers build the same 4-bit layers, and no others.
    reloaded = build()
    unpacks_experts = any("bitsandbytes" in make._patched(module) for module in reloaded.modules())
    assert unpacks_experts == any("fused experts" in note for note in chosen.notes)
    built = make.replaced_modules(reloaded, chosen.skip_modules, pre_quantized=True)
    assert {name for name in built if not (unpacks_experts and ".experts." in name)} == modules

    # Every tensor of the 4-bit checkpoint finds its place.
    assert misplaced(reloaded, chosen, {name: loaded[name][0] for name in quantized}) == []

    # The same for a checkpoint whose tensors have the names of the modules.
    renamed = selection.select(config, module_shapes)
    targets = {name: name for name, decision in renamed.decisions.items() if decision.quantize}
    exceptions = LEFT_ALONE_IN_MODULE_NAMES.get(class_name, frozenset())
    assert not modules_of(targets) - on_the_fly
    assert endings(on_the_fly - modules_of(targets), exceptions) == exceptions
    assert (misplaced(reloaded, renamed, targets) != []) == (class_name in RENAMED_TWICE)


def misplaced(model: Any, chosen: selection.Selection, targets: dict[str, str]) -> list[str]:
    """The tensors of `targets` and their companions that do not reach their module in a model with 4-bit layers."""
    companions = {f"{name}.{suffix}": name for name in targets for suffix in COMPANIONS} | {n: n for n in targets}
    renaming = Renaming(model, [*chosen.decisions, *companions], quantizer(chosen.skip_modules))
    found = {companion: renaming.targets[companion] for companion in companions}
    return [
        companion
        for companion, name in companions.items()
        if found[companion][0] != targets[name] or "Bnb4bitDeserialize" not in found[companion][1]
    ]


@pytest.mark.parametrize(("model_type", "class_name"), described())
def test_same_choice_as_transformers(model_type: str, class_name: str) -> None:
    make = maker()
    found = next(
        config
        for key, name in make.architectures()
        if name == class_name and (key, name) not in NOT_BUILT
        for config in [make.default_config(key, name)]
        if config.model_type == model_type
    )
    check(class_name, lambda: make.small_model(class_name, found))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen2", "gemma2", "bert", "opt", "t5", "zamba"])
def test_same_choice_whether_embeddings_are_tied(model_type: str, tied: bool) -> None:
    make = maker()
    class_name = table()["types"][model_type][0]
    config = make.default_config(model_type, class_name)
    config.tie_word_embeddings = tied
    check(class_name, lambda: make.small_model(class_name, config))


@pytest.mark.parametrize(("text", "vision"), PARTS)
def test_same_choice_for_other_parts(text: str, vision: str) -> None:
    """A model made of parts that its table entry was not made with."""
    from transformers import LlavaConfig

    config = LlavaConfig(text_config={"model_type": text}, vision_config={"model_type": vision})
    check("LlavaForConditionalGeneration", lambda: maker().small_model("LlavaForConditionalGeneration", config))


def test_every_architecture_is_described() -> None:
    make = maker()
    types = table()["types"]
    missing = [
        (model_type, name)
        for model_type, name in make.architectures()
        if (model_type, name) not in NOT_BUILT
        and name not in types.get(make.default_config(model_type, name).model_type, [])
    ]
    assert not missing


@pytest.mark.parametrize(("model_type", "class_name"), NOT_BUILT)
def test_exceptions_are_needed(model_type: str, class_name: str) -> None:
    make = maker()
    assert (model_type, class_name) in make.architectures()
    with pytest.raises((ImportError, ValueError), match=NOT_BUILT[model_type, class_name]):
        make.build(class_name, make.default_config(model_type, class_name))


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
    import torch
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**settings)
    return getattr(transformers, class_name)(config).to(torch.bfloat16)


def write_four_bit(source: Path, out: Path, skip: tuple[str, ...] = ()) -> tuple[selection.Selection, dict[str, Any]]:
    """The 4-bit checkpoint that select() asks for, made with bitsandbytes' own functions; its decoded weights."""
    import bitsandbytes.functional as bnb
    from safetensors.torch import load_file, save_file

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
    import bitsandbytes.functional as bnb
    import torch
    import transformers
    from safetensors.torch import load_file

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
    from safetensors.torch import load_file, save_file

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
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

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
