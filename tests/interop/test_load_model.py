"""load_model against transformers' from_pretrained of the same repository: the same model, to the last bit."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, conversion_mapping
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import qlformat
from qlformat import conversions, skeleton
from qlformat.adapter import AdapterManifest, BasePin
from qlformat.layout import Recipe
from qlformat.loader import load_state_dict
from tests.hub_server import Hub
from tests.shard_files import Tensor, read_tensors
from tests.sources import write_safetensors

TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16}
TINY |= {"num_key_value_heads": 2, "vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128, "bos_token_id": 1, "eos_token_id": 2}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
T5 = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "vocab_size": 128}
OPT = {"hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 64}
# Class -> model type, a small configuration, source dtype, and whether the fast path must take it.
MODELS: dict[str, tuple[str, dict[str, Any], str, bool]] = {
    "LlamaForCausalLM": ("llama", {**TINY, "tie_word_embeddings": True}, "float16", True),
    "MistralForCausalLM": ("mistral", TINY, "bfloat16", True),
    "Qwen2ForCausalLM": ("qwen2", {**TINY, "rope_theta": 50_000.0}, "bfloat16", True),
    "Qwen3ForCausalLM": ("qwen3", TINY, "float32", True),
    "Gemma2ForCausalLM": ("gemma2", TINY, "bfloat16", True),
    "Phi3ForCausalLM": ("phi3", TINY, "bfloat16", True),
    "GPT2LMHeadModel": ("gpt2", GPT2, "float32", True),
    "OPTForCausalLM": ("opt", {**OPT, "vocab_size": 128}, "float16", True),
    "BloomForCausalLM": ("bloom", {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128}, "float16", True),
    "T5ForConditionalGeneration": ("t5", T5, "float16", True),
    "GPTNeoXForCausalLM": ("gpt_neox", TINY, "float16", False),
    "MixtralForCausalLM": ("mixtral", {**TINY, **EXPERTS}, "bfloat16", False),
}
TOKENS = torch.tensor([[1, 5, 9, 30, 77, 4, 60, 3]])


def write_source(class_name: str, out: Path) -> Path:
    model_type, settings, dtype, _ = MODELS[class_name]
    torch.manual_seed(0)
    model = getattr(transformers, class_name)(CONFIG_MAPPING[model_type](**settings))
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms are born constant, which hides mistakes
            parameter.add_(torch.randn_like(parameter) * 0.02)
    model.to(getattr(torch, dtype)).save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The 4-bit checkpoint of a class of MODELS, made once."""
    made: dict[str, Path] = {}

    def make(class_name: str) -> Path:
        if class_name not in made:
            directory = tmp_path_factory.mktemp(class_name)
            source = write_source(class_name, directory / "source")
            qlformat.convert(source, directory / "out", recipe=Recipe(compute_dtype="float32"))
            made[class_name] = directory / "out"
        return made[class_name]

    return make


@pytest.fixture
def llama(repository: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of the Llama, to be changed."""
    return Path(shutil.copytree(repository("LlamaForCausalLM"), tmp_path / "llama"))


def logits(model: Any) -> torch.Tensor:
    more = {"decoder_input_ids": TOKENS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=TOKENS, **more).logits
    return found


def state_of(weight: Any) -> dict[str, Any]:
    return {} if getattr(weight, "quant_state", None) is None else weight.quant_state.as_dict(packed=True)


def assert_same_model(found: Any, needed: Any) -> None:
    """Classes, settings, parameters, quant_states, buffers and configurations."""
    assert type(found) is type(needed)
    assert {n: type(m) for n, m in found.named_modules()} == {n: type(m) for n, m in needed.named_modules()}
    for kind in ("named_parameters", "named_buffers"):
        ours, theirs = dict(getattr(found, kind)()), dict(getattr(needed, kind)())
        assert list(ours) == list(theirs)
        for name, value in theirs.items():
            assert (ours[name].dtype, ours[name].requires_grad) == (value.dtype, value.requires_grad), name
            assert torch.equal(ours[name], value), name
            mine, other = state_of(ours[name]), state_of(value)
            assert mine.keys() == other.keys()
            assert all(torch.equal(mine[key], other[key]) for key in other), name
    for (name, ours), (_, theirs) in zip(found.named_modules(), needed.named_modules(), strict=True):
        for key in ("training", "compute_dtype", "compute_type_is_set", "quant_storage", "source_cls"):
            assert getattr(ours, key, None) == getattr(theirs, key, None), (name, key)
    for key in ("is_loaded_in_4bit", "is_quantized", "quantization_method", "name_or_path", "dtype", "device"):
        assert getattr(found, key, None) == getattr(needed, key, None), key
    assert found.config.to_dict() == needed.config.to_dict()
    assert found.generation_config == needed.generation_config
    assert found.hf_quantizer.quantization_config.to_dict() == needed.hf_quantizer.quantization_config.to_dict()


@pytest.mark.parametrize("class_name", MODELS)
def test_equals_from_pretrained(repository: Callable[[str], Path], class_name: str) -> None:
    found = qlformat.load_model(repository(class_name))
    assert (found.qlf_notes == ()) == MODELS[class_name][3], found.qlf_notes
    needed = getattr(transformers, class_name).from_pretrained(repository(class_name))
    assert any(isinstance(module, bnb.nn.Linear4bit) for module in found.modules())
    assert_same_model(found, needed)
    assert torch.equal(logits(found), logits(needed))


def test_an_architecture_that_is_merged_while_loading_says_so(repository: Callable[[str], Path]) -> None:
    (note,) = qlformat.load_model(repository("MixtralForCausalLM")).qlf_notes
    assert note.startswith("loaded by transformers' from_pretrained: transformers renames, splits or merges ")
    assert "experts.0.w1.weight of MixtralForCausalLM" in note


def test_smollm2_generates_what_from_pretrained_generates(smollm2_dir: Path, tmp_path: Path) -> None:
    qlformat.convert(smollm2_dir, tmp_path / "out", shard_size=40_000_000)
    found, needed = qlformat.load_model(tmp_path / "out"), AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert found.qlf_notes == ()
    assert_same_model(found, needed)
    ids = torch.tensor([[1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198]])
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    with torch.no_grad():
        assert torch.equal(found(ids).logits, needed(ids).logits)
        assert torch.equal(found.generate(ids, **settings), needed.generate(ids, **settings))


def test_weights_are_the_pages_of_the_file(llama: Path) -> None:
    """A byte written to the file shows in a weight that nobody touched yet; one written to the weight stays there."""
    with qlformat.open(llama) as checkpoint:
        name = "model.layers.1.mlp.down_proj.weight"
        begin = checkpoint.shards["model.safetensors"].header.data_start + checkpoint.tensors[name].info.begin
        packed = bytes(checkpoint.read(name))
    weight = qlformat.load_model(llama).get_parameter(name)
    before = (llama / "model.safetensors").read_bytes()
    assert before[begin : begin + len(packed)] == packed
    with (llama / "model.safetensors").open("r+b", buffering=0) as file:
        os.pwrite(file.fileno(), bytes([packed[7] ^ 0xFF]), begin + 7)
    assert weight.data[7, 0].item() == packed[7] ^ 0xFF
    weight.data.fill_(3)
    after = (llama / "model.safetensors").read_bytes()
    assert after[begin : begin + 7] == packed[:7] and after[begin + 8 : begin + len(packed)] == packed[8:]


def test_what_bitsandbytes_repacks_is_private(llama: Path) -> None:
    """On CPUs with AVX512-BF16 it reorders a layer at its first use; here its function is called by hand."""
    before = (llama / "model.safetensors").read_bytes()
    weight = qlformat.load_model(llama).model.layers[0].mlp.up_proj.weight
    old = weight.data.clone()
    weight.data, weight.quant_state = bnb.functional._convert_weight_packed_for_cpu(weight.data, weight.quant_state)
    assert weight.quant_state.packing_format_for_cpu
    assert not torch.equal(weight.data.flatten()[: old.numel()], old.flatten())
    assert (llama / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("target", ["all-linear", ["q_proj", "down_proj"]])
def test_lora_trains(llama: Path, target: Any) -> None:
    before = {path.name: path.read_bytes() for path in llama.iterdir()}
    model = qlformat.load_model(llama, dtype="float32")
    model = peft.prepare_model_for_kbit_training(model)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=target, task_type="CAUSAL_LM"))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    assert any(isinstance(module, peft.tuners.lora.Linear4bit) for module in model.modules())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    losses = []
    for _ in range(3):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert {path.name: path.read_bytes() for path in llama.iterdir()} == before


@pytest.mark.parametrize("dtype", ["float32", torch.bfloat16])
@pytest.mark.parametrize("class_name", ["LlamaForCausalLM", "Qwen2ForCausalLM", "MixtralForCausalLM"])
def test_dtype_is_that_of_everything_not_quantized(
    repository: Callable[[str], Path], class_name: str, dtype: Any
) -> None:
    model = qlformat.load_model(repository(class_name), dtype=dtype)
    wanted = getattr(torch, str(dtype).removeprefix("torch."))
    assert {p.dtype for p in model.parameters() if not isinstance(p, bnb.nn.Params4bit)} == {wanted}
    assert model.dtype == model.config.dtype == wanted
    assert torch.isfinite(logits(model)).all()


@pytest.mark.parametrize("class_name", ["LlamaForCausalLM", "GPT2LMHeadModel", "MixtralForCausalLM"])
def test_dequantize_equals_the_exported_model(
    repository: Callable[[str], Path], tmp_path: Path, class_name: str
) -> None:
    model = qlformat.load_model(repository(class_name), dequantize=True)
    dtype = MODELS[class_name][2]
    qlformat.export(repository(class_name), tmp_path / "plain", dtype=dtype)
    needed = getattr(transformers, class_name).from_pretrained(tmp_path / "plain")
    assert type(model) is type(needed)
    assert not any(isinstance(module, bnb.nn.Linear4bit) for module in model.modules())
    found, expected = model.state_dict(), needed.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in expected.items())
    assert torch.equal(logits(model), logits(needed))
    assert model.generation_config == needed.generation_config
    assert model.dtype == getattr(torch, dtype)
    assert not getattr(model, "is_quantized", False) and not hasattr(model.config, "quantization_config")
    assert not model.training


# ---- adapters


def save_adapter(base: Path, out: Path, seed: int = 0) -> Path:
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(seed)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    model.save_pretrained(out)
    return out


def pin(adapter: Path, fingerprint: str, **more: Any) -> None:
    manifest = AdapterManifest("qlformat test", BasePin(fingerprint, "ORG/base", "abc"))
    (adapter / "qlf.json").write_bytes(manifest.to_json(more))


def fingerprint_of(base: Path) -> str:
    found: str = json.loads((base / "qlf.json").read_text())["fingerprint"]
    return found


def test_an_adapter_gives_what_peft_gives(llama: Path, tmp_path: Path) -> None:
    adapter = save_adapter(llama, tmp_path / "adapter")
    needed = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), adapter)
    pin(adapter, fingerprint_of(llama), recipe={"blocksize": 64})
    found = qlformat.load_model(llama, adapter=adapter)
    assert isinstance(found, peft.PeftModel)
    assert found.qlf_notes == ()
    assert torch.equal(logits(found), logits(needed))
    assert not torch.equal(logits(found), logits(qlformat.load_model(llama)))
    dense = qlformat.load_model(llama, adapter=adapter, dequantize=True, dtype="float32")
    assert torch.isfinite(logits(dense)).all()


def test_an_adapter_of_another_base_is_refused(llama: Path, tmp_path: Path) -> None:
    adapter = save_adapter(llama, tmp_path / "adapter")
    pin(adapter, "0" * 64)
    with pytest.raises(qlformat.QlfError) as caught:
        qlformat.load_model(llama, adapter=adapter)
    message = str(caught.value)
    assert "0" * 64 in message and fingerprint_of(llama) in message and "ORG/base@abc" in message
    assert "--allow-base-mismatch" in message and "\n" not in message
    found = qlformat.load_model(llama, adapter=adapter, allow_base_mismatch=True)
    assert found.qlf_notes == ("the adapter adapter was trained on another base; used all the same, as asked",)


def test_a_plain_adapter_is_noted(llama: Path, tmp_path: Path) -> None:
    (note,) = qlformat.load_model(llama, adapter=save_adapter(llama, tmp_path / "mine")).qlf_notes
    assert note == "the adapter mine is not pinned to a base; only names and shapes were compared"


def test_a_pin_on_a_plain_repository_is_compared_with_the_computed_fingerprint(llama: Path, tmp_path: Path) -> None:
    adapter = save_adapter(llama, tmp_path / "adapter")
    pin(adapter, fingerprint_of(llama))
    (llama / "qlf.json").unlink()
    assert qlformat.load_model(llama, adapter=adapter).qlf_notes == ()
    pin(adapter, "f" * 64)
    with pytest.raises(qlformat.QlfError, match="belongs to the base with fingerprint ffff"):
        qlformat.load_model(llama, adapter=adapter)


@pytest.mark.parametrize(
    ("change", "rule", "text"),
    [
        ({"kind": "base"}, "M1", "needed 'adapter'"),
        ({"format_version": 2}, "M2", "found format_version 2"),
        ({"format_version": "1"}, "M1", "needed an integer"),
        ({"must_understand": ["telepathy"]}, "M3", "telepathy"),
        ({"must_understand": None}, "M1", "needed a list"),
        ({"writer": ""}, "M1", "writer"),
        ({"base": None}, "M1", "base is None"),
        ({"base": {"fingerprint": "12"}}, "M1", "needed 64 hexadecimal digits"),
        ({"base": {"fingerprint": "0" * 64, "repo_id": 3}}, "M1", "base.repo_id is 3"),
    ],
)
def test_a_broken_pin(llama: Path, tmp_path: Path, change: dict[str, Any], rule: str, text: str) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    pin(adapter, fingerprint_of(llama))
    root = json.loads((adapter / "qlf.json").read_text())
    (adapter / "qlf.json").write_text(json.dumps(root | change))
    with pytest.raises(qlformat.FormatError, match=text) as caught:
        qlformat.load_model(llama, adapter=adapter)
    assert caught.value.rule == rule


def test_what_is_no_adapter_and_what_is_no_base(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(qlformat.QlfError, match="needed the directory of a peft adapter"):
        qlformat.load_model(llama, adapter=tmp_path)
    adapter = save_adapter(llama, tmp_path / "adapter")
    with pytest.raises(qlformat.QlfError, match="found an adapter, needed a base"):
        qlformat.load_model(adapter)


def test_an_adapter_for_other_shapes_is_refused(repository: Callable[[str], Path], llama: Path, tmp_path: Path) -> None:
    adapter = save_adapter(llama, tmp_path / "adapter")
    with pytest.raises(qlformat.QlfError, match=r"peft .* cannot put this adapter on GPT2LMHeadModel") as caught:
        qlformat.load_model(repository("GPT2LMHeadModel"), adapter=adapter)
    assert "\n" not in str(caught.value)


# ---- repositories of other programs


def unsloth_style(llama: Path) -> None:
    """As unsloth and older transformers write it: no skip list, private keys, torch_dtype, no manifest."""
    config = json.loads((llama / "config.json").read_text())
    quantization = config["quantization_config"]
    quantization |= {"llm_int8_skip_modules": None, "_load_in_4bit": True, "_load_in_8bit": False}
    config |= {"torch_dtype": config.pop("dtype"), "unsloth_fixed": True, "unsloth_version": "2024.8"}
    (llama / "config.json").write_text(json.dumps(config))
    (llama / "qlf.json").unlink()


def older_states(llama: Path) -> None:
    """quant_states with other key orders and spaces, and the 8-bit table with -1.0 that older encoders left."""
    stored = load_file(llama / "model.safetensors")
    for name in [name for name in stored if "quant_state.bitsandbytes__" in name]:
        fields = json.loads(bytes(stored[name].tolist()))
        text = json.dumps(dict(sorted(fields.items())), separators=(",", ":"))
        stored[name] = torch.tensor(list(text.encode()), dtype=torch.uint8)
    for name in [name for name in stored if name.endswith(".nested_quant_map")]:
        stored[name][0] = -1.0
    save_file(stored, llama / "model.safetensors", metadata={"format": "pt"})
    (llama / "qlf.json").unlink()


def missing_defaults(llama: Path) -> None:
    """A configuration of the first releases: only what they knew."""
    config = json.loads((llama / "config.json").read_text())
    kept = ("load_in_4bit", "quant_method", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant")
    config["quantization_config"] = {key: config["quantization_config"][key] for key in kept}
    (llama / "config.json").write_text(json.dumps(config))
    (llama / "qlf.json").unlink()


@pytest.mark.parametrize("change", [unsloth_style, older_states, missing_defaults])
def test_repositories_of_other_programs(llama: Path, change: Callable[[Path], None]) -> None:
    change(llama)
    needed = AutoModelForCausalLM.from_pretrained(llama)
    found = qlformat.load_model(llama)
    assert found.qlf_notes == ()
    assert_same_model(found, needed)
    assert torch.equal(logits(found), logits(needed))
    state = load_state_dict(llama)
    with qlformat.open(llama) as checkpoint:
        for name, module in needed.named_modules():
            if isinstance(module, bnb.nn.Linear4bit):
                values = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
                assert torch.equal(state[f"{name}.weight"], values)
                assert checkpoint.weights[f"{name}.weight"].quant_state is not None


@pytest.mark.parametrize(("quant_type", "double_quant"), [("nf4", False), ("fp4", True), ("fp4", False)])
def test_what_transformers_itself_writes(tmp_path: Path, quant_type: str, double_quant: bool) -> None:
    source = write_source("LlamaForCausalLM", tmp_path / "source")
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=double_quant
    )
    AutoModelForCausalLM.from_pretrained(source, quantization_config=settings).save_pretrained(tmp_path / "plain")
    found, needed = qlformat.load_model(tmp_path / "plain"), AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert found.qlf_notes == ()
    assert_same_model(found, needed)
    assert torch.equal(logits(found), logits(needed))
    state = load_state_dict(tmp_path / "plain")
    for name, module in needed.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            values = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            assert torch.equal(state[f"{name}.weight"], values)


def test_another_storage_dtype_is_refused(llama: Path) -> None:
    """bfloat16 storage, as FSDP scripts write it: section 17 of the format refuses it."""
    stored = load_file(llama / "model.safetensors")
    for name in [name.removesuffix(".quant_map") for name in stored if name.endswith(".weight.quant_map")]:
        stored[name] = stored[name].flatten().view(torch.bfloat16).unsqueeze(1)
    save_file(stored, llama / "model.safetensors", metadata={"format": "pt"})
    (llama / "qlf.json").unlink()
    with pytest.raises(qlformat.FormatError) as caught:
        qlformat.load_model(llama)
    assert caught.value.rule == "T3"


def test_names_without_the_prefix_of_the_base_model(repository: Callable[[str], Path], tmp_path: Path) -> None:
    """Older GPT-2 repositories name their tensors as the bare model does."""
    plain = Path(shutil.copytree(repository("GPT2LMHeadModel"), tmp_path / "plain"))
    stored = {name.removeprefix("transformer."): t for name, t in load_file(plain / "model.safetensors").items()}
    save_file(stored, plain / "model.safetensors", metadata={"format": "pt"})
    (plain / "qlf.json").unlink()
    found, needed = qlformat.load_model(plain), AutoModelForCausalLM.from_pretrained(plain)
    assert found.qlf_notes == ()
    assert_same_model(found, needed)


def _parts(tensor: Tensor) -> tuple[str, tuple[int, ...], bytes]:
    return tensor.dtype, tensor.shape, tensor.data


def test_tensors_that_start_anywhere_are_copied(llama: Path) -> None:
    """Another writer may put a float tensor at an odd offset; safetensors allows it."""
    tensors = read_tensors(llama / "model.safetensors")
    odd_sizes_first = sorted(tensors, key=lambda name: ("quant_state" not in name, name))
    write_safetensors(llama / "model.safetensors", {name: _parts(tensors[name]) for name in odd_sizes_first})
    (llama / "qlf.json").unlink()
    found = qlformat.load_model(llama)
    assert_same_model(found, AutoModelForCausalLM.from_pretrained(llama))


# ---- what does not work


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"device_map": "cuda:99"}, "device 'cuda:99' was asked for, found"),
        ({"device_map": "gpu"}, "device 'gpu' is unknown"),
        ({"device_map": {"": "nonsense"}}, "device 'nonsense' is unknown"),
        ({"device_map": {}}, "found an empty device_map"),
        ({"device_map": "meta"}, "device 'meta' was asked for, found only cpu"),
        ({"device_map": "xpu:3"}, "device 'xpu:3' was asked for, found only cpu"),
        ({"dtype": "int8"}, "dtype 'int8' is not supported"),
        ({"dtype": torch.float64}, "dtype torch.float64 is not supported"),
    ],
)
@pytest.mark.parametrize("dequantize", [False, True])
def test_wrong_arguments(llama: Path, arguments: dict[str, Any], text: str, dequantize: bool) -> None:
    with pytest.raises(qlformat.QlfError, match=text):
        qlformat.load_model(llama, dequantize=dequantize, **arguments)


@pytest.mark.parametrize("device_map", ["cpu", torch.device("cpu"), {"": "cpu"}, "auto"])
def test_devices(llama: Path, device_map: Any) -> None:
    if device_map == "auto" and torch.accelerator.is_available():
        pytest.skip("auto is a GPU here")
    model = qlformat.load_model(llama, device_map=device_map)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


def test_a_model_that_transformers_does_not_know(llama: Path) -> None:
    config = json.loads((llama / "config.json").read_text())
    for change in ({"model_type": "nobody"}, {"model_type": "siglip_vision_model", "architectures": ["MyModel"]}):
        (llama / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(qlformat.QlfError, match="trust_remote_code=True") as caught:
            qlformat.load_model(llama)
        assert "\n" not in str(caught.value)


def reconfigured(llama: Path, **changes: Any) -> None:
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize("dequantize", [False, True])
def test_a_layer_that_the_checkpoint_lacks(llama: Path, dequantize: bool) -> None:
    """transformers would fill it with random numbers."""
    reconfigured(llama, num_hidden_layers=3)
    with pytest.raises(qlformat.QlfError, match=r"the checkpoint has no model\.layers\.2\.") as caught:
        qlformat.load_model(llama, dequantize=dequantize)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dequantize", [False, True])
def test_layers_of_another_size(llama: Path, dequantize: bool) -> None:
    """transformers compares no shapes of packed weights, and computed something with them."""
    reconfigured(llama, intermediate_size=128)
    with pytest.raises(qlformat.QlfError, match="config") as caught:
        qlformat.load_model(llama, dequantize=dequantize)
    assert "\n" not in str(caught.value)
    assert caught.value.tensor == "model.layers.0.mlp.down_proj.weight"
    assert "found shape [64, 96], needed [64, 128]" in str(caught.value)


@pytest.mark.parametrize("arguments", [{}, {"dequantize": True}, {"device_map": "balanced"}])
def test_nothing_is_printed(llama: Path, capfd: pytest.CaptureFixture[str], arguments: dict[str, Any]) -> None:
    transformers.utils.logging.enable_progress_bar()  # a command that ran in this process may have put it out
    qlformat.load_model(llama, **arguments)
    assert capfd.readouterr() == ("", "")
    assert transformers.utils.logging.is_progress_bar_enabled()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_a_scale_that_is_no_scale(llama: Path, value: float) -> None:
    stored = load_file(llama / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight.nested_absmax"
    stored[name][0] = value
    save_file(stored, llama / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(qlformat.FormatError) as caught:
        qlformat.load_model(llama)
    assert (caught.value.rule, caught.value.tensor) == ("D1", name)


def test_a_file_that_changes_while_it_is_loaded(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finish = skeleton.Skeleton.finish

    def write_first(self: Any, *arguments: Any) -> Any:
        with (llama / "model.safetensors").open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"}")
        os.utime(llama / "model.safetensors", ns=(1, 1))
        return finish(self, *arguments)

    monkeypatch.setattr(skeleton.Skeleton, "finish", write_first)
    with pytest.raises(qlformat.FormatError, match="changed while it was being loaded") as caught:
        qlformat.load_model(llama)
    assert caught.value.rule == "S5"


def test_another_transformers_is_left_to_itself(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.PreTrainedModel, "initialize_weights", lambda self, deep: None)
    with pytest.raises(skeleton.Unfit, match="another loader"):
        skeleton._require_known(transformers.LlamaForCausalLM)


def test_no_entry_of_the_table_of_conversions_is_overlooked() -> None:
    """conversions.may_convert looks for names among the constants of the function that makes the table."""
    maker = conversion_mapping._build_checkpoint_conversion_mapping
    keys = set(maker()) - {"legacy"}
    assert len(keys) > 100
    constants = set(conversions.string_constants(maker.__code__.co_consts))
    assert keys <= constants | set(conversion_mapping._MODEL_TO_CONVERSION_PATTERN)


def test_a_repository_of_the_hub(hub: Hub, llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, hub.root / "org" / "model")
    found = qlformat.load_model("org/model")
    assert torch.equal(logits(found), logits(qlformat.load_model(llama)))
    assert found.qlf_notes == ()
