"""One checkpoint, every loader, qlformat absent: each script runs in a process in which importing qlformat fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import qlformat
from qlformat.layout import Recipe
from qlformat.loader import load_state_dict

ROOT = Path(__file__).resolve().parents[2]
ABSENT = "import sys; sys.modules['qlformat'] = None\n"
PROMPT = "What is the capital of France?"

TRANSFORMERS = """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
chat = [{"role": "user", "content": sys.argv[2]}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
"""

PEFT = """
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM
torch.manual_seed(0)
tokens = torch.tensor([[1, 5, 9, 30, 77, 4, 60, 3]])
base = prepare_model_for_kbit_training(AutoModelForCausalLM.from_pretrained(sys.argv[1]))
model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
losses = []
for _ in range(3):
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
model.save_pretrained(sys.argv[2])
model.eval()
again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32), sys.argv[2])
with torch.no_grad():
    same = torch.allclose(model(tokens).logits.float(), again.eval()(tokens).logits.float(), atol=1e-3)
print(losses[-1] < losses[0], same)
"""

BY_HAND = """
import torch
from pathlib import Path
from bitsandbytes.functional import QuantState, dequantize_4bit
from safetensors import safe_open
from safetensors.torch import save_file
stored = {}
for path in sorted(Path(sys.argv[1]).glob("*.safetensors")):
    with safe_open(path, "pt") as file:
        stored |= {name: file.get_tensor(name) for name in file.keys()}
decoded = {}
for name in [name.removesuffix(".quant_map") for name in stored if name.endswith(".weight.quant_map")]:
    parts = {key.removeprefix(name + "."): value for key, value in stored.items() if key.startswith(name + ".")}
    decoded[name] = dequantize_4bit(stored[name], QuantState.from_dict(parts, device="cpu"))
save_file(decoded, sys.argv[2])
"""

# The rules of spec/format.md, appendix F, in the same order, over the files alone.
VLLM_RULES = r"""
import json, math, re
from pathlib import Path
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise
from safetensors import safe_open

repository = Path(sys.argv[1])
config = json.loads((repository / "config.json").read_text())
settings = config["quantization_config"]

# V1: which files
files = sorted(repository.glob("*.safetensors"))
index = repository / "model.safetensors.index.json"
if index.is_file():
    listed = {repository / name for name in json.loads(index.read_text())["weight_map"].values()}
    files = [path for path in files if path in listed]
assert files

# V2: the configuration
assert settings["quant_method"] == "bitsandbytes"
assert settings.get("load_in_8bit") is not True
assert settings.get("bnb_4bit_quant_storage") in (None, "uint8")
skipped = settings.get("llm_int8_skip_modules") or []
assert isinstance(skipped, list)

tensors = {}
for path in files:
    with safe_open(path, "pt") as file:
        for name in file.keys():
            assert name not in tensors
            tensors[name] = file.get_tensor(name)

# V3: a companion is known by the last part of its name
marks = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "bitsandbytes")
companions = {name for name in tensors if any(mark in name.split(".")[-1] for mark in marks)}
weights = {name for name in tensors if name not in companions}

# V4: a weight is quantized when its quant_state is there; its companions are all whose name holds its own
states, seen = {}, set()
for name in weights:
    if not any(f"{name}.quant_state.bitsandbytes__{kind}" in companions for kind in ("nf4", "fp4")):
        continue
    found = {key: tensors[key] for key in companions if name + "." in key}
    assert all(key.startswith(name + ".") for key in found), "companions of another weight"
    seen |= set(found)
    states[name] = QuantState.from_dict(dict(found), device=torch.device("cpu"))  # V5: no key that it does not know
assert seen == companions

# V6: the module of a quantized weight is not skipped, that of every other linear layer is
def skips(module):
    parts = module.split(".")
    prefixes = {".".join(parts[: i + 1]) for i in range(len(parts))}
    return any(entry in parts for entry in skipped) or bool(prefixes & set(skipped))

LINEAR = re.compile(r"layers\.\d+\.(self_attn|mlp)\.(\w+)\.weight$")
for name in weights:
    if LINEAR.search(name):
        assert (name in states) != skips(name.removesuffix(".weight")), name

# V7: shapes, for a model dtype of 16 bits
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
for name, state in states.items():
    packed = tensors[name]
    assert packed.dtype == torch.uint8 and tuple(packed.shape) == (math.prod(state.shape) // 2, 1)
    assert math.prod(state.shape) % 2 == 0
    assert len(state.shape) == 2

# V8: layers that vLLM fuses: all parts quantized or none, and their packed rows laid end to end
fused = 0
for name in list(states):
    for whole, parts in FUSED.items():
        if not name.endswith(f".{parts[0]}.weight"):
            continue
        names = [name.replace(f".{parts[0]}.", f".{part}.") for part in parts]
        assert all(part in states for part in names)
        width = states[name].shape[1]
        rows = [states[part].shape[0] for part in names]
        buffer = torch.empty(sum(rows) * width // 2, 1, dtype=torch.uint8)
        offsets = [0]
        for part, count in zip(names, rows):
            begin = sum(rows[: len(offsets) - 1]) * len(buffer) // sum(rows)
            size = count * len(buffer) // sum(rows)
            assert (begin, size) == (offsets[-1], len(tensors[part]))
            buffer[begin : begin + size] = tensors[part]
            offsets.append(offsets[-1] + math.prod(states[part].shape) // 2)
        # V9: each part is decoded from its slice, after its scales were decoded once
        for i, part in enumerate(names):
            state = states[part]
            before = dequantize_4bit(tensors[part], state)
            if state.nested:
                absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset
                assert absmax.dtype == torch.float32
                state = QuantState(absmax, state.shape, state.code, state.blocksize, state.quant_type, state.dtype)
            assert torch.equal(dequantize_4bit(buffer[offsets[i] : offsets[i + 1]], state), before)
        fused += 1
print(len(states), len(companions), fused)
"""


def run(script: str, *arguments: object, python: str = sys.executable, timeout: float = 300) -> str:
    """Run a script where qlformat cannot be imported; its stdout."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [python, "-c", ABSENT + script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def checkpoint(smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 in three shards."""
    out = tmp_path_factory.mktemp("smollm2") / "out"
    qlformat.convert(smollm2_dir, out, shard_size=45_000_000)
    assert len(list(out.glob("*.safetensors"))) > 2
    return out


def test_qlformat_is_absent() -> None:
    with pytest.raises(AssertionError, match="ModuleNotFoundError"):
        run("import qlformat")


def test_transformers(checkpoint: Path) -> None:
    assert "Paris" in run(TRANSFORMERS, checkpoint, PROMPT)


def test_peft_trains_and_loads_on_top(stories_dir: Path, tmp_path: Path) -> None:
    qlformat.convert(stories_dir, tmp_path / "out", recipe=Recipe(compute_dtype="float32"))
    assert run(PEFT, tmp_path / "out", tmp_path / "adapter").split() == ["True", "True"]
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_bitsandbytes_by_hand_decodes_what_qlformat_decodes(checkpoint: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    run(BY_HAND, checkpoint, tmp_path / "decoded.safetensors")
    theirs = load_file(tmp_path / "decoded.safetensors")
    ours = load_state_dict(checkpoint, names=list(theirs))
    assert len(theirs) == 210
    assert all(torch.equal(ours[name], value) and ours[name].dtype == value.dtype for name, value in theirs.items())


def test_the_rules_of_vllm(checkpoint: Path) -> None:
    weights, companions, fused = map(int, run(VLLM_RULES, checkpoint).split())
    assert (weights, companions, fused) == (210, 210 * 5, 60)


def lose_a_quant_state(header: dict[str, object]) -> None:
    header["renamed"] = header.pop("model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4")


def rename_a_companion(header: dict[str, object]) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    header[f"{name}.scale_absmax"] = header.pop(f"{name}.nested_absmax")


@pytest.mark.parametrize("change", [lose_a_quant_state, rename_a_companion])
def test_the_rules_of_vllm_can_fail(
    smollm2_dir: Path, tmp_path: Path, change: Callable[[dict[str, object]], None]
) -> None:
    from tests.shard_files import edit_header

    qlformat.convert(smollm2_dir, tmp_path / "out")
    edit_header(tmp_path / "out" / "model.safetensors", change)
    with pytest.raises(AssertionError):
        run(VLLM_RULES, tmp_path / "out")


def test_the_rules_of_vllm_see_a_layer_that_is_not_skipped(smollm2_dir: Path, tmp_path: Path) -> None:
    """vLLM would wait for 4-bit weights of a 16-bit layer that the configuration does not name."""
    qlformat.convert(smollm2_dir, tmp_path / "out", skip=["model.layers.0.mlp.down_proj"])
    run(VLLM_RULES, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["quantization_config"]["llm_int8_skip_modules"] = ["lm_head"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(AssertionError, match="down_proj"):
        run(VLLM_RULES, tmp_path / "out")


@pytest.mark.slow
def test_vllm_itself(checkpoint: Path) -> None:
    """The real thing, on the CPU: needs a Python of its own, since vLLM pins an older transformers."""
    python = os.environ.get("QLF_VLLM_PYTHON")
    if not python:
        pytest.skip(
            "set QLF_VLLM_PYTHON to a Python with vLLM and vllm-bnb-plugin (docs/loading.md says how to make one)"
        )
    script = (ROOT / "tools" / "ask_vllm.py").read_text(encoding="utf-8")
    assert "Paris" in run(script, checkpoint, PROMPT, python=python, timeout=900)
