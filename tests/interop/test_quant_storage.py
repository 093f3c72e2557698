"""One checkpoint for vLLM (uint8) and FSDP2 (a float dtype): the packed bytes are viewed, never changed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from safetensors.torch import load_file

import qlformat
from qlformat.errors import QlfError

ROOT = Path(__file__).resolve().parents[2]
SMALL = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 256, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
TOKENS = torch.tensor([[1, 5, 9, 30, 77, 4, 60, 3]])


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 4-bit Llama of two layers."""
    source = tmp_path_factory.mktemp("storage") / "source"
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, tie_word_embeddings=False))
    model.bfloat16().save_pretrained(source)
    qlformat.convert(source, source.with_name("small"))
    return source.with_name("small")


def packed(model: Any) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if isinstance(p, Params4bit)}


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
def test_the_bytes_are_those_of_the_file(small: Path, name: str) -> None:
    dtype = getattr(torch, name)
    stored = load_file(small / "model.safetensors")
    model: Any = qlformat.load_model(small, device_map="cpu", quant_storage=name)
    weights = packed(model)
    assert len(weights) == 14
    for key, weight in weights.items():
        assert weight.dtype == dtype and weight.shape == (stored[key].numel() // dtype.itemsize, 1)
        assert torch.equal(weight.data.view(-1).view(torch.uint8), stored[key].view(-1)), key
    assert model.hf_quantizer.quantization_config.bnb_4bit_quant_storage == dtype
    assert all(m.quant_storage == dtype for m in model.modules() if isinstance(m, Linear4bit))
    plain: Any = qlformat.load_model(small, device_map="cpu")
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, plain(TOKENS).logits)


def test_the_file_says_uint8_and_so_does_the_default(small: Path) -> None:
    config = json.loads((small / "config.json").read_bytes())["quantization_config"]
    assert config["bnb_4bit_quant_storage"] == "uint8"
    assert {w.dtype for w in packed(qlformat.load_model(small, device_map="cpu")).values()} == {torch.uint8}


def test_a_view_takes_no_memory(small: Path) -> None:
    from qlformat import quant_storage

    model: Any = qlformat.load_model(small, device_map="cpu")
    before = {name: weight.data_ptr() for name, weight in packed(model).items()}
    quant_storage.view(model, torch.bfloat16)
    assert {name: weight.data_ptr() for name, weight in packed(model).items()} == before


def test_bytes_that_start_anywhere_are_copied(small: Path) -> None:
    from qlformat import quant_storage

    model: Any = qlformat.load_model(small, device_map="cpu")
    weight = model.model.layers[0].mlp.up_proj.weight
    content = weight.data.clone()
    odd = torch.cat([torch.zeros(1, dtype=torch.uint8), content.view(-1)])
    weight.data = odd[1:].unsqueeze(1)
    quant_storage.view(model, torch.bfloat16)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight.data.view(-1).view(torch.uint8), content.view(-1))


def test_what_does_not_fit_is_refused_and_nothing_is_changed(small: Path) -> None:
    from qlformat import quant_storage

    model: Any = qlformat.load_model(small, device_map="cpu")
    last = model.model.layers[1].mlp.down_proj
    last.weight.data = last.weight.data[:-1]
    with pytest.raises(QlfError, match=r"layers\.1\.mlp\.down_proj\.weight has 4095 packed bytes"):
        quant_storage.view(model, torch.bfloat16)
    assert {weight.dtype for weight in packed(model).values()} == {torch.uint8}
    with pytest.raises(QlfError, match="quant_storage 'int4' is not supported; use one of uint8, bfloat16"):
        qlformat.load_model(small, quant_storage="int4")
    with pytest.raises(QlfError, match="leaves no packed weights"):
        qlformat.load_model(small, quant_storage="bfloat16", dequantize=True)


SHARDED = """
import os, sys, torch, peft
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from bitsandbytes.nn.modules import Linear4bit, Params4bit
import qlformat

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
mesh = init_device_mesh("cpu", (world,))
policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)

def load():
    model = qlformat.load_model(sys.argv[1], device_map="cpu", dtype="bfloat16", quant_storage="bfloat16")
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False  # bitsandbytes would pack the weights anew, of one process
    return model.train()

def shard(model, layers):
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)

def raw(tensor):
    return tensor.detach().contiguous().view(-1).view(torch.uint8)

ids = (torch.arange(64) * 7 % 251).view(4, 16)

# Without adapters: every process has its half of the bytes, together they are the stored ones, the output is the same.
whole, model = load(), load()
stored = {name: raw(p) for name, p in model.named_parameters() if isinstance(p, Params4bit)}
shard(model, model.model.layers)
own = 0
for name, parameter in model.named_parameters():
    assert isinstance(parameter, DTensor), name
    if name in stored:
        own += raw(parameter.to_local()).numel()
        assert torch.equal(raw(parameter.full_tensor()), stored[name]), name
assert own * world == sum(part.numel() for part in stored.values()), own
with torch.no_grad():
    assert torch.equal(model(ids).logits, whole(ids).logits)

# With LoRA: steps of training equal those of one process on the whole batch, and the base stays what it was.
def tuned(model):
    model.requires_grad_(False)
    torch.manual_seed(1)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            if "lora_B" in name:
                torch.nn.init.normal_(parameter.data, std=0.02)
    return model.train()

whole, model = tuned(load()), tuned(load())
shard(model, model.get_base_model().model.layers)
base = {name: raw(p.full_tensor()) for name, p in model.named_parameters() if not p.requires_grad}
optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2) for m in (whole, model)]
losses = []
for step in range(3):
    mine = ids[rank * 2 : rank * 2 + 2]
    loss = model(mine, labels=mine).loss
    loss.backward()
    loss = loss.detach() / world
    dist.all_reduce(loss)
    expected = 0.0
    for half in (ids[:2], ids[2:]):
        with torch.autocast("cpu", torch.bfloat16):
            part = whole(half, labels=half).loss / 2
        part.backward()
        expected += part.item()
    assert abs(loss.item() - expected) < 1e-4, (step, loss.item(), expected)
    if step == 0:
        wanted = {name: p.grad for name, p in whole.named_parameters() if p.requires_grad}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                found = parameter.grad.full_tensor()
                assert wanted[name].norm() > 0 and (found - wanted[name]).norm() <= 1e-3 * wanted[name].norm(), name
    losses.append(loss.item())
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
assert losses[2] < losses[0], losses
for name, parameter in model.named_parameters():
    if name in base:
        assert torch.equal(raw(parameter.full_tensor()), base[name]), name
dist.barrier()
os.write(1, f"sharded {rank}\\n".encode())  # in one write: the other process prints too
os._exit(0)  # gloo's threads now and then abort a process that is being taken down
"""


def run_on_two(script: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a script in two processes of torchrun."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d",
        "--rdzv-endpoint=localhost:0", "--no-python", sys.executable, "-W", "ignore", "-c", script, *words,
    ]  # fmt: skip
    paths = os.pathsep.join([str(ROOT), str(ROOT / "cli"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)


def test_fsdp2_on_two_processes(small: Path) -> None:
    done = run_on_two(SHARDED, str(small))
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(re.findall(r"sharded (\d)", done.stdout)) == ["0", "1"], done.stdout
